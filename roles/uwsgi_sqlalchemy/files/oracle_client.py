"""Install Oracle's Instant Client on this host, choose the active one, or remove all. Runs as root.

    oracle_client.py install SHA256 [--archive FILE]   make that client the active one, out of the archive if it is new
    oracle_client.py activate NAME                     make an installed client the active one again
    oracle_client.py remove                            remove every client that was installed in this way

Clients lie side by side in /opt/oracle, each in a folder named by its version and its archive's checksum, which appears
whole or not at all. The link /opt/oracle/instantclient names the active one, and one file leads ldconfig there: uWSGI
could not set LD_LIBRARY_PATH for itself, as the loader reads it when a program starts. The answer is one line of JSON;
what is refused is said on the error output.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

VARIABLE = "uwsgi_sqlalchemy_oracle_client"
FOLDER = re.compile(r"instantclient_(\d+)_(\d+)")  # the folder in Oracle's zip; its name is the version
LIBRARY = re.compile(FOLDER.pattern + r"/libclntsh\.so\.[\d.]+")
MACHINES = {3: "i386", 62: "x86_64", 183: "aarch64"}  # e_machine in an ELF header (elf.h)


class Failure(Exception):
    """Something a person has to know: what is wrong, and which variable to change."""


class Archive:
    """Oracle's zip of a client. Raises Failure where it is none, or another than the given checksum (SHA-256) says."""

    def __init__(self, path: Path, sha256: str) -> None:
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            for part in iter(lambda: stream.read(1 << 20), b""):
                digest.update(part)
        if digest.hexdigest() != sha256:
            raise Failure(
                f"{VARIABLE}.archive has the checksum {digest.hexdigest()}, but {VARIABLE}.sha256 is {sha256}. Oracle "
                "issues new files under the same URL now and then: when you trust the file, change sha256."
            )
        try:
            self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise Failure(f"{VARIABLE}.archive is no zip file ({error}). Take Oracle's zip, not its RPM.") from error
        self.members = [member for member in self.zip.infolist() if FOLDER.match(member.filename)]
        found = [member for member in self.members if LIBRARY.fullmatch(member.filename) and not self.is_link(member)]
        if not found or len({member.filename.split("/")[0] for member in self.members}) != 1:
            tops = sorted({member.filename.split("/")[0] for member in self.zip.infolist()})
            raise Failure(
                f"{VARIABLE}.archive is not Oracle's Instant Client: it has no "
                f"instantclient_VERSION/libclntsh.so.* but {', '.join(tops[:5]) or 'nothing'}. Take the "
                "package Basic or Basic Light."
            )
        self.library = found[0]
        self.name = self.library.filename.split("/")[0]

    @staticmethod
    def is_link(member: zipfile.ZipInfo) -> bool:
        """Return whether a member is a symbolic link: zip keeps a file's mode in the upper half of its attributes."""
        return stat.S_ISLNK(member.external_attr >> 16)

    def check_machine(self, machine: str) -> None:
        """Raise Failure unless the library is made for this machine."""
        with self.zip.open(self.library) as stream:
            header = stream.read(20)
        number = struct.unpack_from("<H", header, 18)[0] if header[:4] == b"\x7fELF" and len(header) == 20 else 0
        made_for = MACHINES.get(number, f"machine {number}")
        if made_for != machine:
            raise Failure(
                f"{VARIABLE}.archive is made for {made_for}, but this host is {machine}. Oracle's packages for "
                "x86_64 have x64 in their names, those for aarch64 arm64."
            )

    def unpack(self, folder: Path) -> None:
        """Unpack the client into an empty folder: links as links, and nothing that another account may write to."""
        for member in self.members:
            parts = PurePosixPath(member.filename).parts[1:]
            target = folder.joinpath(*parts)
            link = self.zip.read(member).decode() if self.is_link(member) else ""
            # Oracle's links stay in their folder.
            if ".." in (*parts, link) or "/" in link:
                raise Failure(f"{VARIABLE}.archive is not Oracle's: {member.filename} leads out of its folder.")
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if link:
                target.symlink_to(link)
                continue
            with self.zip.open(member) as source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy)
            target.chmod(0o755 if member.external_attr >> 16 & 0o100 else 0o644)
        plain = folder / "libclntsh.so"
        if not plain.is_symlink() and not plain.exists():
            # python-oracledb asks for this name; the zips of version 12 lack it.
            plain.symlink_to(PurePosixPath(self.library.filename).name)


class Host:
    """The clients on a host. `root` is for tests."""

    def __init__(self, root: Path = Path("/"), *, check: bool = False) -> None:
        self.root = root
        self.check = check
        self.top = root / "opt/oracle"
        self.link = self.top / "instantclient"
        self.conf = root / "etc/ld.so.conf.d/oracle-instantclient.conf"

    def installed(self) -> list[Path]:
        """Return the folders of the clients that were installed in this way."""
        return sorted(path for path in self.top.glob("*") if re.fullmatch(FOLDER.pattern + r"-[0-9a-f]{12}", path.name))

    def active(self) -> str:
        """Return the name of the active client's folder, or an empty text."""
        if self.link.is_symlink():
            return os.readlink(self.link)
        if self.link.exists():
            raise Failure(f"{self.link} is not the role's link. Move it away, so that the link can be made.")
        return ""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs on this host away, and clear what one that was cut short left behind."""
        self.top.mkdir(mode=0o755, parents=True, exist_ok=True)
        handle = os.open(self.top, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            for torso in self.top.glob(".new-*"):
                shutil.rmtree(torso)
            yield
        finally:
            os.close(handle)

    @staticmethod
    def check_version(name: str, least: int) -> None:
        """Raise Failure where a client is older than the driver wants it."""
        major, minor = map(int, FOLDER.match(name).groups())  # type: ignore[union-attr]
        if major < least:
            raise Failure(
                f"{VARIABLE}.archive is Instant Client {major}.{minor}, but python-oracledb's thick mode needs "
                f"{least} or newer. Take a newer one: 19 still talks to Oracle Database 11.2."
            )

    def install(self, sha256: str, archive: Path | None, least: int) -> dict[str, Any]:
        """Make the client of this checksum the active one, unpacking it first where it is not there yet.

        Without an archive and with nothing installed the answer is `missing`. Raises Failure.
        """
        there = [path.name for path in self.installed() if path.name.endswith(sha256[:12])]
        if there:
            self.check_version(there[0], least)
            return self.activate(there[0])
        if archive is None:
            return {"changed": self.check, "missing": True}
        opened = Archive(archive, sha256)
        opened.check_machine(platform.machine())
        self.check_version(opened.name, least)
        self.active()
        name = f"{opened.name}-{sha256[:12]}"
        with self.alone():
            new = Path(tempfile.mkdtemp(prefix=".new-", dir=self.top))
            try:
                new.chmod(0o755)
                opened.unpack(new)
                os.sync()  # a folder with its final name is whole, after a power cut too
                new.rename(self.top / name)
            except (OSError, zipfile.BadZipFile) as error:
                needed = sum(member.file_size for member in opened.members) >> 20
                raise Failure(
                    f"the Oracle client could not be unpacked to {self.top}: {error}. It needs {needed + 1} MiB "
                    "there. The client that was active before still is."
                ) from error
            finally:
                shutil.rmtree(new, ignore_errors=True)
        return {**self.activate(name), "changed": True}

    def activate(self, name: str) -> dict[str, Any]:
        """Make an installed client the active one. `previous` in the answer names the one that it replaced."""
        before = self.active()
        changed = before != name
        wanted = f"# Oracle's Instant Client; the link names the active version.\n{self.link}\n"
        stale = not self.conf.exists() or self.conf.read_text(encoding="utf-8") != wanted
        libaio = self.missing_libaio(name)
        if not self.check:
            if libaio:
                folder = self.top / name / "libaio"
                folder.mkdir(exist_ok=True)
                (folder / "libaio.so.1").unlink(missing_ok=True)
                (folder / "libaio.so.1").symlink_to(libaio)
            if changed:
                new = self.top / ".new-link"
                new.unlink(missing_ok=True)
                new.symlink_to(name)
                new.replace(self.link)
            if stale:
                new = self.conf.with_suffix(".new")
                new.write_text(wanted, encoding="utf-8")
                new.replace(self.conf)
            self.ldconfig()  # always: a run that was cut short may have left the loader's cache behind
        return {"changed": changed or stale or bool(libaio), "previous": before if changed else "", "name": name}

    def ldconfig(self, *options: str) -> str:
        """Renew the loader's cache, or list it with `-p`."""
        done = subprocess.run(
            ("/sbin/ldconfig", *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise Failure(f"ldconfig failed: {done.stdout.strip()}")
        return done.stdout

    def missing_libaio(self, name: str) -> str:
        """Return what the client's libaio/libaio.so.1 should name, or an empty text where it is not needed.

        Since Debian 13 the library is called libaio.so.1t64; on these machines nothing but the name differs. The
        link has a folder of its own, which the service knows by LD_LIBRARY_PATH: ldconfig lists a library by the name
        inside it, so it would overlook this link and add one with the library's name.
        """
        link = self.top / name / "libaio" / "libaio.so.1"
        libraries = dict(re.findall(r"^\s+(\S+) .*=> (\S+)$", self.ldconfig("-p"), re.MULTILINE))
        renamed = str(libraries.get("libaio.so.1t64", ""))
        there = "libaio.so.1" in libraries or (link.is_symlink() and os.readlink(link) == renamed)
        return "" if there else renamed

    def users(self) -> list[str]:
        """Return the services, or else the processes, that have a client's library in their memory."""
        found = set()
        for process in self.root.glob("proc/[0-9]*"):
            with contextlib.suppress(OSError):
                if f" {self.top}/instantclient" in (process / "maps").read_text(errors="replace"):
                    unit = (process / "cgroup").read_text().strip().rpartition("/")[2]
                    found.add(unit or f"process {process.name}")
        return sorted(found)

    def remove(self) -> dict[str, Any]:
        """Remove every client, the link and the loader's file. Raises Failure while a process uses one of them."""
        there = [path for path in (*self.installed(), self.conf, self.link) if path.is_symlink() or path.exists()]
        if there and (users := self.users()):
            raise Failure(
                f"{VARIABLE}.remove is true, but {', '.join(users)} still use Oracle's client. Change or stop "
                "them first."
            )
        if there and not self.check:
            self.active()
            with self.alone():
                for path in (self.conf, self.link):
                    path.unlink(missing_ok=True)
                self.ldconfig()
                for path in self.installed():
                    shutil.rmtree(path)
            with contextlib.suppress(OSError):
                self.top.rmdir()  # where nothing else is in it
        return {"changed": bool(there)}


def main(arguments: list[str]) -> int:
    """Carry out the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, only say what would change")
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install")
    install.add_argument("sha256")
    install.add_argument("--archive", type=Path)
    install.add_argument("--least", type=int, default=0, help="oldest major version that the driver takes")
    commands.add_parser("activate").add_argument("name")
    commands.add_parser("remove")
    options = parser.parse_args(arguments)
    os.umask(0o022)
    host = Host(check=options.check)
    try:
        if options.command == "install":
            result = host.install(options.sha256, options.archive, options.least)
        else:
            result = host.remove() if options.command == "remove" else host.activate(options.name)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
