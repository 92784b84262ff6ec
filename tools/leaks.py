"""Find names of this machine in the repository: package mirrors, proxies, folders. None may be committed.

What to look for is read from the machine at run time, and is what would tie the repository to it.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import machine

ROOT = Path(__file__).resolve().parent.parent
# Folders that belong to no machine in particular: a checkout right below one of them gives its own path away, no more.
COMMON = {Path(name) for name in ("/", "/home", "/mnt", "/opt", "/root", "/srv", "/tmp", "/usr/local/src", "/var/tmp")}  # noqa: S108


def registries() -> set[str]:
    """Return the host names of this machine's package registries and proxies, of those that pip and npm bring too."""
    ask_pip = "from pip._internal.models.index import PyPI as p; print(p.url, 'https://' + p.file_storage_domain)"
    urls = set(machine.output("apt-get", "indextargets", "--format", "$(SITE)").split())
    urls |= set(machine.output(sys.executable, "-c", ask_pip).split())
    settings = machine.pip_settings()
    urls |= {url for key in ("index-url", "extra-index-url", "proxy") for url in settings.get(key, "").split()}
    urls |= {value for name, value in machine.proxies().items() if "no_" not in name.lower()}
    urls |= set(re.findall(r'"(\w+://[^"]+)"', "\n".join(machine.apt_network_settings())))
    if npm := shutil.which("npm"):
        urls.add(machine.output(npm, "config", "get", "registry").strip())
    hosts = {urlsplit(url).hostname or "" for url in urls}
    return {host for host in hosts if "." in host and not host.startswith("127.")}


def folders() -> set[str]:
    """Return the folders whose mention in a file would tie it to this checkout."""
    return {f"{ROOT}/"} | ({f"{ROOT.parent}/"} - {f"{folder}/" for folder in COMMON})


def pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Return what finds any of the names, on its own or at the front of something longer."""
    return re.compile("|".join(rf"(?<![\w.-]){re.escape(name)}" for name in sorted(names)), re.IGNORECASE)


def leaks(paths: Iterable[Path], wanted: re.Pattern[str]) -> Iterator[str]:
    """Yield 'file:line: match' for each mention; files that are not text are passed over."""
    for file in paths:
        try:
            lines = file.read_text().splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # not text, or deleted and not committed yet, or a link to a folder
        for number, line in enumerate(lines, 1):
            if found := wanted.search(line):
                yield f"{file}:{number}: {found.group()}"


def files() -> list[Path]:
    """Return the files that git has or would take; of an unpacked archive, all but what was installed into it."""
    if not (ROOT / ".git").exists():
        return [path for path in ROOT.rglob("*") if path.relative_to(ROOT).parts[0] not in (".run", ".venv")]
    listing = machine.output("git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return [ROOT / name for name in listing.split("\0") if name]


def main() -> int:
    """Search the repository and return the exit status."""
    found = list(leaks(files(), pattern(registries() | folders())))
    print("\n".join(found) or "clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
