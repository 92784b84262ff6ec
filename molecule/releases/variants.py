"""Make the good and the broken releases of the scenario from the application in `app`: variants.py FOLDER."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

APP, TINY = Path(__file__).parent / "app", Path(__file__).parent / "tiny"
BALLAST = 64 * 2**20  # bytes that tiny-2 has more than tiny-1

# For each variant: file, text in it, what takes its place. Everywhere else it differs by its version alone.
HEALTH = 'return f"200 OK'
CHANGES: dict[str, tuple[str, str, str] | None] = {
    "v1": None,
    "v2": None,
    "v3": None,
    "v4": None,
    "broken-import": ("wsgi.py", "time.sleep(1)", 'raise RuntimeError("this release cannot be imported")'),
    "missing-dependency": ("wsgi.py", "import importlib\n", "import absent_dependency\nimport importlib\n"),
    "no-callable": ("wsgi.py", "def application(", "def app("),
    "broken-request": ("wsgi.py", "    _, page, value", "    absent_name()\n    _, page, value"),
    "broken-health": ("wsgi.py", HEALTH, 'raise RuntimeError("never healthy")\n    return f"200 OK'),
    # It answers once, to the rehearsal, and not when it serves; unless somebody repairs what it needs.
    "broken-live": (
        "wsgi.py",
        HEALTH,
        'state = Path(os.environ["STATE_DIRECTORY"])\n'
        '    if (state / "asked").exists() and not (state / "repaired").exists():\n'
        '        raise RuntimeError("healthy no more")\n'
        '    (state / "asked").touch()\n'
        '    return f"200 OK',
    ),
    "redirected-health": ("wsgi.py", HEALTH, 'return f"302 Found'),
    "silent-health": ("wsgi.py", HEALTH, 'time.sleep(20)\n    return f"200 OK'),
    "failing-migration": ("migrate.py", "SECONDS = 0.0", 'raise RuntimeError("this migration fails")'),
    "slow-migration": ("migrate.py", "SECONDS = 0.0", "SECONDS = 2.0"),
    # It looks for its modules behind the link `current`, as every worker did without uwsgi_sqlalchemy_pin.py.
    "unpinned": (
        "wsgi.py",
        "engine = create_engine(",
        "import sys\nsys.path.insert(0, str(Path(__file__).resolve().parents[3] / 'current' / 'app'))\n"
        "engine = create_engine(",
    ),
    "mixed": ("answers.py", 'VERSION = "mixed"', 'VERSION = "v1"'),
}


def make(name: str, folder: Path) -> None:
    """Write the source of one variant. Raises ValueError if the text that it replaces is not there."""
    shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.glob("*.py"):
        path.write_text(path.read_text().replace('VERSION = "v1"', f'VERSION = "{name}"'))
    if change := CHANGES[name]:
        path, old, new = folder / change[0], *change[1:]
        if old not in path.read_text():
            raise ValueError(f"{name}: {change[0]} has no {old!r}")
        path.write_text(path.read_text().replace(old, new, 1))


def main(target: Path) -> None:
    """Write all variants into a folder that is empty or not there."""
    for name in CHANGES:
        make(name, target / name)
    for name in ("tiny-1", "tiny-2"):
        shutil.copytree(TINY, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        wsgi = target / name / "wsgi.py"
        wsgi.write_text(wsgi.read_text().replace('VERSION = "tiny-1"', f'VERSION = "{name}"'))
    (target / "tiny-2" / "ballast").write_bytes(bytes(BALLAST))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
