"""Name a directory by its content, and pack it. Runs on the controller, with the standard library alone.

    pack.py DIRECTORY [EXCLUDE …]            print the digest of what would be packed
    pack.py --to FILE DIRECTORY [EXCLUDE …]  write it as a tar.gz, too

Neither the digest nor the archive depends on times, owners or the order of the directory, so the same content has the
same name on every controller.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What lies beside the code but is not the application. `.env` files hold a developer's secrets.
USUAL = [
    ".git", ".hg", ".svn", ".venv", "venv", ".env", "__pycache__", "*.py[co]", ".mypy_cache", ".pytest_cache",
    ".ruff_cache", ".tox", ".nox", ".coverage", "node_modules", ".DS_Store", "*.swp",
]  # fmt: skip


def entries(top: Path, exclude: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield the names and paths of what belongs to the application, in the order of the names.

    A pattern is compared with each name and with the path from `top`. Links stay links; other special files are
    left out.
    """
    for folder, folders, files in os.walk(top):
        here = Path(folder)
        linked = [name for name in folders if (here / name).is_symlink()]
        keep = {
            name: (here / name).relative_to(top).as_posix()
            for name in folders + files
            if not any(
                fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch((here / name).relative_to(top).as_posix(), pattern)
                for pattern in exclude
            )
        }
        folders[:] = sorted(name for name in folders if name in keep and name not in linked)
        for name in sorted(files + linked):
            if name in keep and ((here / name).is_symlink() or (here / name).is_file()):
                yield keep[name], here / name


def member(name: str, path: Path) -> tuple[tarfile.TarInfo, bytes]:
    """Return a file or link as a member of an archive, without anything that differs between two checkouts."""
    info = tarfile.TarInfo(name)
    if path.is_symlink():
        info.type, info.linkname, content = tarfile.SYMTYPE, os.readlink(path), b""
    else:
        content = path.read_bytes()
        info.size = len(content)
    info.mode = 0o755 if not path.is_symlink() and os.access(path, os.X_OK) else 0o644
    return info, content


def pack(top: Path, exclude: list[str], to: Path | None = None) -> str:
    """Return the digest (SHA-256) of a directory's content and write it to the archive `to`, if given, as a whole."""
    found = sorted(entries(top, USUAL + exclude))
    if not found:
        raise SystemExit(f"{top} holds no files")
    digest = hashlib.sha256()
    for name, path in found:
        info, content = member(name, path)
        for part in (info.tobuf(), content):
            digest.update(len(part).to_bytes(8, "big") + part)
    if to:
        to.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=to.parent)
        try:
            with (
                os.fdopen(handle, "wb") as raw,
                gzip.GzipFile("", "wb", 6, raw, mtime=0) as compressed,
                tarfile.open(fileobj=compressed, mode="w") as archive,
            ):
                for name, path in found:
                    info, content = member(name, path)
                    archive.addfile(info, io.BytesIO(content))
            os.replace(temporary, to)
        except BaseException:  # an interrupt, too, leaves nothing behind
            os.unlink(temporary)
            raise
    return digest.hexdigest()


def main(arguments: list[str]) -> int:
    """Carry out the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="archive to write")
    parser.add_argument("directory", type=Path)
    parser.add_argument("exclude", nargs="*", help="patterns of names to leave out besides the usual ones")
    options = parser.parse_args(arguments)
    if not options.directory.is_dir():
        raise SystemExit(f"{options.directory} is not a directory")
    print(pack(options.directory, options.exclude, options.to))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
