"""A host for the on-host program, without a host: a folder, real processes and sockets, and a systemd made of Python.

What the program reads for itself is real: files, links, the unix sockets of uWSGI (application and statistics), its
master FIFO, and worker processes whose working directory the kernel knows. What it calls is not: every command goes to
`FakeHost.run`, which knows the few that the program uses and refuses any other.

    host = FakeHost(folder, program)      one application, called shop
    host.build("r1", answer="200 ok")     a finished release, and what its application answers
    host.want(processes=2)                the configuration as the role's templates write it for these variables
    host.call("activate", "shop", "r1")   the program's command line
    host.failing["nginx -t"] = "emerg"    from now on commands with these words fail and say so
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from templating import render

# The files in the folder `wanted` and the templates that the role makes them of.
WANTED = {
    "uwsgi.ini": "uwsgi-APP/uwsgi.ini",
    "environment": "uwsgi-APP/environment",
    "service": "systemd/system/uwsgi-APP.service",
    "socket": "systemd/system/uwsgi-APP.socket",
    "nginx.conf": "nginx/sites-available/uwsgi-APP.conf",
    "settings.json": "uwsgi-APP/settings.json",
}


@cache
def rendered(variables: str) -> dict[str, str]:
    """Return the files that the role wants for variables, given as JSON."""
    return {name: render(template, **json.loads(variables)) for name, template in WANTED.items()}


class Listener:
    """A listening unix socket and the thread that answers on it. Connections left open are closed with it."""

    def __init__(self, path: Path, answer: Callable[[socket.socket], bool]) -> None:
        """Listen on `path`; `answer` gets each connection and returns whether it is done with it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.answer, self.open = path, answer, list[socket.socket]()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(64)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        """Answer one connection after the other until the socket is shut down."""
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                if not self.answer(connection):
                    self.open.append(connection)
                    continue
            connection.close()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        for connection in [self.socket, *self.open]:
            connection.close()
        self.path.unlink()


def asked(connection: socket.socket) -> dict[str, str]:
    """Return the variables of a request in the uwsgi protocol (uWSGI documentation, "The uwsgi Protocol")."""
    with connection.makefile("rb") as stream:
        _, size, _ = struct.unpack("<BHB", stream.read(4))
        rest = stream.read(size)
    parts: list[str] = []
    while rest:
        (length,) = struct.unpack_from("<H", rest)
        parts.append(rest[2 : 2 + length].decode())
        rest = rest[2 + length :]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def say(connection: socket.socket, answer: str, _request: dict[str, str] | None = None) -> bool:
    """Answer a request, once it is read, with "STATUS BODY", with "silence", or by closing the connection ("close")."""
    if answer == "silence":
        return False
    if answer != "close":
        status, _, body = answer.partition(" ")
        connection.sendall(f"HTTP/1.1 {status} X\r\nContent-Type: text/plain\r\n\r\n{body}".encode())
    return True


@dataclass
class Release:
    """How a release behaves: what it answers, where it can be imported, and whether its workers get ready.

    What it answers to the rehearsal is another thing, as the rehearsal would find most of what tests want to see fail.
    """

    answer: str
    imports: bool
    proves: bool
    ready: bool
    rehearsal: str
    audit: str


@dataclass
class Worker:
    """A worker: a process in the folder of its release; until when (on the monotonic clock) it imports that."""

    process: subprocess.Popen[bytes]
    release: str
    imports_until: float = 0.0


@dataclass
class Result:
    """What the program did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return what it printed, as JSON."""
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """Return why it failed, from its answer in JSON or from the end of what it said."""
        if self.out:
            return str(self.json["message"])
        return self.err.rpartition("uwsgi-sqlalchemy: ")[2].removesuffix("\n")


class Waiting:
    """A process that carries out its command when it is told to go, and ends without it when it is not."""

    def __init__(self, host: FakeHost, command: tuple[str, ...]) -> None:
        self.host, self.command = host, command
        self.returncode: int | None = None

    def communicate(self, text: str = "") -> tuple[str, None]:
        if text != "go\n":
            self.returncode = 0
            self.host.dismissed.append(" ".join(self.command))
            return "", None
        done = self.host.run(*self.command)
        self.returncode = done.returncode
        return done.stdout, None


class FakeHost:
    """The host, with systemd and uWSGI for one application."""

    def __init__(self, root: Path, program: ModuleType, app: str = "shop") -> None:
        """Make an empty host in the folder `root`, which must have a short path for its sockets."""
        self.root, self.program, self.app, self.unit = root, program, app, f"uwsgi-{app}"
        self.etc, self.home, self.wanted = (
            root / "etc" / self.unit,
            root / "srv" / self.unit,
            root / "etc" / self.unit / "wanted",
        )
        self.current, self.releases = self.home / "current", self.home / "releases"
        self.units = root / "etc/systemd/system"
        self.site = root / "etc/nginx/sites-enabled" / f"{self.unit}.conf"
        self.behaviour: dict[str, Release] = {}
        # What tests look at and steer.
        self.commands: list[str] = []
        self.failing: dict[str, str] = {}
        self.requests: list[dict[str, str]] = []
        self.said = ""  # the service's journal
        self.migrated = ""  # what a migration says
        self.pause = 0.0  # seconds between two workers that a chain replaces
        self.dismissed: list[str] = []  # commands that waited and were never told to go
        self.nginx: str | None = None  # the site that Nginx has loaded
        self.nginx_warns = ""  # of its configuration
        # What systemd and uWSGI know.
        self.state, self.main_pid = "inactive", 0
        self.loaded: set[str] = set()
        self.enabled: set[str] = set()
        self.workers: list[Worker] = []
        self.listeners: dict[str, Listener] = {}
        self.fifo: threading.Thread | None = None
        self.obeyed: list[str] = []
        for folder in (self.wanted, self.releases, self.units, root / "run", self.site.parent):
            folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """End every process and thread."""
        self.stop_service()
        for name in list(self.listeners):
            self.stop_listening(name)

    # --- what a deployment prepares ----------------------------------------------------------------------------------

    def build(
        self,
        release: str,
        answer: str = "200 ok",
        imports: bool = True,
        proves: bool = True,
        ready: bool = True,
        rehearsal: str = "200 ok",
        audit: str = "[]",
        **more: Any,
    ) -> None:
        """Make a finished release.

        What it `answer`s; whether the service can `import` it; whether its proof succeeds; whether its workers get
        `ready` for requests; what it answers in its `rehearsal` ("500 x then 200 ok": when it is loaded once and once
        more); what its `audit` reports. `more` are entries of its release.json.
        """
        folder = self.releases / release
        (folder / "app").mkdir(parents=True, exist_ok=True)
        built = f"2026-01-01T00:00:{len(self.behaviour):02}.000000+00:00Z"
        told = {"release": release, "built": built, "by": "ada@laptop", "source": "0" * 64}
        told |= {"python": "cpython-311 /usr/bin/python3", "uwsgi": "debian", **more}
        (folder / "release.json").write_text(json.dumps(told))
        self.behaviour[release] = Release(answer, imports, proves, ready, rehearsal, audit)

    def want(self, settings: dict[str, Any] | None = None, **variables: Any) -> None:
        """Write the wanted configuration; `settings` overrule those that the variables lead to."""
        for name, text in rendered(
            json.dumps({"app": self.app, "processes": 2, "health_timeout": 10, **variables})
        ).items():
            content = json.dumps({**json.loads(text), **(settings or {})}) if name == "settings.json" else text
            (self.wanted / name).write_text(content)

    def call(self, *arguments: str) -> Result:
        """Call the program's command line."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = self.program.main(list(arguments))
            except SystemExit as end:
                code = end.code
        return Result(code, out.getvalue(), err.getvalue())

    # --- what tests look at ------------------------------------------------------------------------------------------

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker.process.pid for worker in self.workers]

    def running(self) -> list[str]:
        """Return the releases of the workers."""
        return [worker.release for worker in self.workers]

    def live(self, name: str) -> Path:
        """Return the place where a file of the configuration is live."""
        return {
            "service": self.units / f"{self.unit}.service",
            "socket": self.units / f"{self.unit}.socket",
            "nginx.conf": self.root / "etc/nginx/sites-available" / f"{self.unit}.conf",
        }.get(name, self.etc / name)

    def files(self) -> dict[str, tuple[int, str]]:
        """Return mode and content (of links the target) of everything but /run and the program's notes."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if not name.startswith("run") and path.name not in ("failed.json", "journal.jsonl"):
                content = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
                found[name] = (stat.S_IMODE(path.lstat().st_mode), content)
        return found

    def acted(self, *ignored: str) -> list[str]:
        """Return the commands that changed something, in order."""
        looking = ("systemctl show", "systemctl is-enabled", "journalctl", "nginx -t", *ignored)
        others = ("--version", f"{self.unit}-rehearsal.service")
        left = [command for command in self.commands if not command.startswith(looking)]
        return [command for command in left if not any(part in command for part in others)]

    # --- the commands ------------------------------------------------------------------------------------------------

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Carry out a command in place of the program's `run`."""
        line = " ".join(command)
        self.commands.append(line)
        for part, said in self.failing.items():
            if part in line:
                return subprocess.CompletedProcess(command, 1, said)
        carry_out: dict[str, Callable[..., tuple[int, str]]] = {
            "systemctl": self.systemctl,
            "journalctl": lambda *_: (0, self.said),
            "nginx": lambda *_: (0, self.nginx_warns),
            "systemd-run": self.systemd_run,
            "uwsgi": lambda *_: (0, "2.0.21\n"),
        }
        code, said = carry_out[Path(command[0]).name](*command[1:])
        return subprocess.CompletedProcess(command, code, said)

    def start(self, *command: str) -> Waiting:
        """Have a command wait until it is told to go, in place of the program's `start`."""
        return Waiting(self, command)

    def systemd_run(self, *arguments: str) -> tuple[int, str]:
        """Carry out a command in the service's sandbox: proof, migration, hook, or the rehearsal of a release."""
        folder = next(line for line in arguments if line.startswith("--property=WorkingDirectory="))
        release = Path(folder).parent.name
        if f"--unit={self.unit}-rehearsal" in arguments:
            if not self.behaviour[release].proves:
                self.said = (
                    "*** Starting uWSGI ***\nTraceback (most recent call last):\n"
                    "ModuleNotFoundError: No module named 'shop'\n"
                )
                return 1, f"Job for {self.unit}-rehearsal.service failed.\n"
            answers = self.behaviour[release].rehearsal.split(" then ")
            answer = answers.pop(0)
            self.behaviour[release].rehearsal = " then ".join(answers or [answer])
            place = self.root / "run" / f"{self.unit}-rehearsal" / "uwsgi.socket"
            place.parent.mkdir(exist_ok=True)
            ini = Path(arguments[arguments.index("--ini") + 1]).read_text()
            if "import = uwsgi_sqlalchemy_audit\n" in ini:
                place.with_name("audit.json").write_text(self.behaviour[release].audit)
            self.listeners["rehearsal"] = Listener(place, lambda connection: say(connection, answer, asked(connection)))
            return 0, ""
        return 0, self.migrated

    def systemctl(self, verb: str, *arguments: str) -> tuple[int, str]:
        """Carry out systemctl for the units of the application, and for Nginx."""
        units = [name for name in arguments if name.endswith((".service", ".socket"))]
        if verb == "show":
            return 0, f"ActiveState={self.state}\nMainPID={self.main_pid}\n"
        if verb == "daemon-reload":
            self.loaded = {path.name for path in self.units.iterdir()}
            return 0, ""
        if verb == "is-enabled":
            return 0, "".join("enabled\n" if unit in self.enabled else "disabled\n" for unit in units)
        done = (0, "")
        if units == ["nginx.service"]:
            self.nginx = self.site.read_text() if self.site.exists() else None
            units = []
        if units == [f"{self.unit}-rehearsal.service"]:
            self.stop_listening("rehearsal")
            units = []
        for unit in units:
            if unit not in self.loaded and verb in ("start", "restart", "enable"):
                return 5, f"Unit {unit} not found."
            if verb == "enable":
                self.enabled.add(unit)
            if verb == "disable":
                self.enabled.discard(unit)
            if verb in ("stop", "restart") or "--now" in arguments:
                (self.stop_listening if unit.endswith(".socket") else self.stop_service)()
            if verb in ("start", "restart"):
                done = self.start_socket() if unit.endswith(".socket") else self.start_service()
        return done

    # --- the socket and the service ----------------------------------------------------------------------------------

    def start_socket(self) -> tuple[int, str]:
        """Listen where Nginx asks; without a worker requests wait."""
        if "socket" not in self.listeners:
            self.listeners["socket"] = Listener(self.root / "run" / f"{self.unit}.socket", self.answer)
        return 0, ""

    def stop_listening(self, name: str = "socket") -> None:
        """Stop listening where Nginx asks, or on another socket."""
        if listener := self.listeners.pop(name, None):
            listener.close()

    def answer(self, connection: socket.socket) -> bool:
        """Answer a request as the application of a worker does."""
        self.requests.append(asked(connection))
        ready = [self.behaviour[worker.release] for worker in self.workers if self.behaviour[worker.release].ready]
        return say(connection, ready[0].answer if ready else "silence")

    def start_service(self) -> tuple[int, str]:
        """Start uWSGI as the unit describes it: note the start, start the master, wait for health."""
        self.call("note-start", self.app)
        self.main_pid += 1000
        found = re.search(r"^processes = (\d+)$", self.live("uwsgi.ini").read_text(), re.M)
        if not self.spawn(int(found[1]) if found else 1):
            return 1, f"Job for {self.unit}.service failed.\n"
        run = self.root / "run" / self.unit
        run.mkdir(exist_ok=True)
        self.listeners["stats"] = Listener(run / "stats.sock", self.tell_statistics)
        os.mkfifo(run / "master.fifo")
        self.fifo = threading.Thread(target=self.obey, args=(os.open(run / "master.fifo", os.O_RDWR),), daemon=True)
        self.fifo.start()
        self.state = "activating"
        asked_health = self.call("health", self.app)
        if asked_health.code:
            self.stop_service()
            self.state = "activating"  # Restart=always
            self.said += asked_health.message + "\n"
            return 1, f"Job for {self.unit}.service failed.\n"
        self.state = "active"
        return 0, ""

    def stop_service(self) -> None:
        """Stop the master and its workers."""
        fifo = self.root / "run" / self.unit / "master.fifo"
        if self.fifo and self.fifo is not threading.current_thread():
            if self.fifo.is_alive():
                fifo.write_bytes(b"q")
                self.fifo.join()
            self.fifo = None
            fifo.unlink(missing_ok=True)
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        self.workers = []
        self.stop_listening("stats")
        self.state = "inactive"

    def spawn(self, count: int) -> bool:
        """Start workers of the current release; one that cannot be imported ends the master (need-app)."""
        release = os.readlink(self.current).rpartition("/")[2]
        if not self.behaviour[release].imports:
            self.said += "ModuleNotFoundError: No module named 'shop'\n"
            self.stop_service()
            self.state = "failed"
            return False
        for _ in range(count):
            process = subprocess.Popen(["sleep", "60"], cwd=self.current / "app")
            self.workers.append(Worker(process, release))
        return True

    def tell_statistics(self, connection: socket.socket) -> bool:
        """Send uWSGI's statistics: a worker counts as accepting when it has imported the application."""
        told = [
            {"id": number, "pid": worker.process.pid, "accepting": int(self.accepts(worker))}
            for number, worker in enumerate(self.workers, 1)
        ]
        connection.sendall(
            json.dumps({"version": "2.0.21", "workers": [*told, {"id": 9, "pid": 0, "accepting": 0}]}).encode()
        )
        return True

    def accepts(self, worker: Worker) -> bool:
        """Return whether a worker is ready for requests."""
        return self.behaviour[worker.release].ready and time.monotonic() >= worker.imports_until

    def obey(self, fifo: int) -> None:
        """Obey the commands on the master FIFO: c reloads one worker after the other, r the whole service, q ends.

        As in uWSGI, a chain passes over workers that do not accept requests, waits for each that it has replaced, and
        no other is begun until it is over.
        """
        with os.fdopen(fifo, "rb", buffering=0) as commands:
            while (command := commands.read(1)) != b"q":
                if command == b"r":
                    self.obeyed.append("graceful reload")
                for old in list(self.workers) if command in b"cr" else []:
                    if command == b"c" and not self.accepts(old):
                        continue
                    if not self.spawn(1):
                        return
                    old.process.kill()
                    old.process.wait()
                    self.workers.remove(old)
                    new, wait = self.workers[-1], self.pause
                    while command == b"c" and (wait or not self.accepts(new)):
                        if select.select([commands], [], [], wait or 0.01)[0] and b"q" in commands.read(64):
                            return
                        wait = 0.0
