"""Make archives of Instant Client for the tests: stubs that know nothing but their version, and Oracle's own 19.3.

    instant_client.py FOLDER URL

PyOracleClient, a package of the Python registry, holds Oracle's Instant Client Basic 19.3 for x86-64 with its licence
(Oracle Free Use Terms: unmodified redistribution with the licence). It is a third party's repack, not checked against a
checksum of Oracle's: good for tests and nothing else. Where no registry has it there are the stubs alone. The last line
of the output tells, in JSON, where each archive can be fetched when the folder is served at the URL, and its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "PyOracleClient==0.0.5 --hash=sha256:ed2cfac158b0417617779b60749dd56f0979706b4515fe1b1adc1f2b609dd017\n"
INSIDE = "pyoracleclient/instantclient/"
MOMENT = (2019, 6, 1, 0, 0, 0)  # always the same, and so is the checksum


class Archive:
    """A zip as Oracle's are: one folder on top, links as links."""

    def __init__(self, path: Path, top: str) -> None:
        self.path = path
        self.top = top
        self.zip = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)

    def add(self, name: str, content: bytes, mode: int) -> None:
        """Add a file, or a link to what `content` names, with its mode."""
        member = zipfile.ZipInfo(f"{self.top}/{name}", MOMENT)
        member.create_system = 3  # Unix, whose modes these are
        member.external_attr = mode << 16
        member.compress_type = zipfile.ZIP_DEFLATED
        self.zip.writestr(member, content)

    def close(self) -> dict[str, str]:
        """Finish the archive and return its name and its checksum."""
        self.zip.close()
        return {"archive": self.path.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}


def real(folder: Path) -> dict[str, str] | None:
    """Rebuild Oracle's zip; return None where no registry has the package. A wheel keeps links as small text files."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(PACKAGE)
        options = ("--quiet", "--no-deps", "--require-hashes", "--dest", scratch, "-r", str(requirements))
        if subprocess.run((sys.executable, "-m", "pip", "download", *options), check=False).returncode:
            return None
        (wheel,) = Path(scratch).glob("*.whl")
        archive = Archive(folder / "instantclient-basic-linux.x64-19.3.0.0.0dbru.zip", "instantclient_19_3")
        with zipfile.ZipFile(wheel) as packed:
            for member in packed.infolist():
                name = member.filename.removeprefix(INSIDE)
                if name == member.filename or name.endswith("__init__.py"):
                    continue
                content = packed.read(member)
                link = len(content) < 64 and name.startswith("lib")
                program = ".so" in name or name in ("adrci", "genezi", "uidrvci")
                mode = stat.S_IFLNK | 0o777 if link else stat.S_IFREG | (0o755 if program else 0o644)
                archive.add(name, content, mode)
        return archive.close()


def stub(folder: Path, version: str) -> dict[str, str]:
    """Build a client that only tells its version, such as 21.1."""
    major, minor = version.split(".")
    told = f"*a = {major}; *b = {minor}; *c = *d = *e = 0;"
    library = f"libclntsh.so.{major}.1"
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / library
        options = ("-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{library}", "-xc", "-")
        code = f"void OCIClientVersion(int *a, int *b, int *c, int *d, int *e) {{ {told} }}"
        subprocess.run(("gcc", "-o", str(built), *options), input=code, text=True, check=True)
        archive = Archive(folder / f"instantclient-stub-{version}.zip", f"instantclient_{major}_{minor}")
        archive.add(library, built.read_bytes(), stat.S_IFREG | 0o755)
        archive.add("libclntsh.so", library.encode(), stat.S_IFLNK | 0o777)
        return archive.close()


def main(folder: Path, url: str) -> None:
    """Make all of them and say which there are."""
    made = {version: stub(folder, version) for version in ("21.1", "21.2")}
    if oracles := real(folder):
        made["oracle"] = oracles
    for one in made.values():
        one["archive"] = f"{url}/{one['archive']}"
    print(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
