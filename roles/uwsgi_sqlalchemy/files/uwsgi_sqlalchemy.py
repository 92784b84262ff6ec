#!/usr/bin/python3 -I
"""Switch the releases of applications that uWSGI serves on this host, and say how they are.

Everything of an application APP is called uwsgi-APP. Its releases lie in /srv/uwsgi-APP/releases, and the link
/srv/uwsgi-APP/current names the one that serves. What its configuration should be lies in /etc/uwsgi-APP/wanted.
`activate` makes that and a release live as one transaction: proved first, switched, workers renewed, health asked.
When the application does not serve afterwards, everything is put back as it was. A run that is cut short at any moment
leaves the old or the new release serving, and the next run finishes it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

EXIT_CODES = """exit codes:
  0  done
  1  the health path does not answer as it should
  2  wrong usage
  3  refused; what served before serves on, untouched
  4  another run holds the lock
  5  it did not serve; the state before is back and serves
  6  it did not serve, and the state before does not serve either
  7  it serves, but the command after the activation failed"""

UNHEALTHY, REFUSED, LOCKED, PUT_BACK, BROKEN, AFTER = 1, 3, 4, 5, 6, 7

PATIENCE = 5.0  # seconds for which a wrong answer of the health path may still become a right one

# How workers are replaced without a new service: by the command that uWSGI's master takes on its FIFO.
RELOADS = {"chain reload": b"c", "graceful reload": b"r"}

# What a running service has read when it started: where it differs from then, the service has to be restarted.
READ_AT_START = ("uwsgi.ini", "environment", "service")

# The files of an application's configuration: their name in /etc/uwsgi-APP/wanted, and the place where they are live.
CONFIGURATION = {
    "settings.json": "etc/uwsgi-{app}/settings.json",
    "uwsgi.ini": "etc/uwsgi-{app}/uwsgi.ini",
    "environment": "etc/uwsgi-{app}/environment",
    "service": "etc/systemd/system/uwsgi-{app}.service",
    "socket": "etc/systemd/system/uwsgi-{app}.socket",
    "nginx.conf": "etc/nginx/sites-available/uwsgi-{app}.conf",
}


# Asks Oracle's client for its version (OCIClientVersion), found by its name as the drivers find it.
ORACLE_VERSION = """
import ctypes
version = [ctypes.c_int() for _ in range(5)]
ctypes.CDLL("libclntsh.so").OCIClientVersion(*map(ctypes.byref, version))
print(".".join(str(number.value) for number in version))
"""


class Failure(Exception):
    """Something a person has to know: the message says what and what to do, the code becomes the exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return its result, whatever its exit code; its output is text."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def start(*command: str) -> subprocess.Popen[str]:
    """Start a command whose input is still to come and return it; its output is text."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def write(path: Path, content: bytes, mode: int) -> None:
    """Replace a file as a whole: a reader, or a crash at any moment, finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        os.fchmod(stream.fileno(), mode)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def digest(content: bytes | None) -> str:
    """Return a short name for a content; no file has the empty name."""
    return "" if content is None else hashlib.sha256(content).hexdigest()[:16]


def ask_uwsgi(path: Path, target: str, host: str, timeout: float) -> tuple[int, str]:
    """Ask a uWSGI socket for a page, as Nginx would, and return its status and the beginning of its body.

    The packet is the uwsgi protocol's: modifier1, size, modifier2, then keys and values with their sizes, all little
    endian (uWSGI documentation, "The uwsgi Protocol"). `timeout` is in seconds. Raises OSError when there is no answer.
    """
    url_path, _, query = target.partition("?")
    variables = {
        "REQUEST_METHOD": "GET",
        "REQUEST_URI": target,
        "PATH_INFO": url_path,
        "QUERY_STRING": query,
        "SCRIPT_NAME": "",
        "CONTENT_LENGTH": "",
        "CONTENT_TYPE": "",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_NAME": host,
        "SERVER_PORT": "80",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": host,
        "HTTP_USER_AGENT": "uwsgi-sqlalchemy health check",
    }
    body = b"".join(
        struct.pack("<H", len(part)) + part for pair in variables.items() for part in map(os.fsencode, pair)
    )
    deadline = time.monotonic() + timeout
    answer = b""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(struct.pack("<BHB", 0, len(body), 0) + body)
        while len(answer) < 65536:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise socket.timeout("timed out")
            connection.settimeout(remaining)
            part = connection.recv(65536)
            if not part:
                break
            answer += part
    head, _, content = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/\d\.\d (\d{3})", head)
    if not status:
        # What uWSGI does when the application raises before it has begun to answer.
        raise ConnectionResetError("the connection was closed without an answer")
    return int(status.group(1)), content.decode("utf-8", "replace")


@dataclass
class Worker:
    """A worker process as uWSGI's statistics and /proc show it; `release` is where its working directory lies."""

    pid: int
    accepting: bool
    release: str


@dataclass
class Plan:
    """What `activate` has to do: how to renew the service, and the reasons, for the report."""

    action: str = "none"
    reasons: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether anything on the host would change."""
        return bool(self.reasons)


def say(text: str) -> None:
    """Tell the person at the terminal."""
    print(f"uwsgi-sqlalchemy: {text}", file=sys.stderr, flush=True)


def step(name: str, text: str) -> None:
    """Say what is done next. Each step is a place where a run may be cut short; `name` is for the tests of that."""
    del name
    say(text)


class App:
    """An application on this host: its places, its service and what is live of it. `root` is for tests."""

    def __init__(self, name: str, root: Path = Path("/")) -> None:
        self.name = name
        self.unit = f"uwsgi-{name}"
        self.root = root
        self.etc = root / "etc" / self.unit
        self.wanted = self.etc / "wanted"
        self.undo = self.etc / "undo"
        self.home = root / "srv" / self.unit
        self.releases = self.home / "releases"
        self.current = self.home / "current"
        self.journal = self.home / "journal.jsonl"
        self.socket = root / "run" / f"{self.unit}.socket"
        self.started = root / "run" / f"{self.unit}.started"
        self.proof = root / "run" / f"{self.unit}.proof.ini"
        self.rehearsal = root / "run" / f"{self.unit}-rehearsal" / "uwsgi.socket"
        self.audit_report = self.rehearsal.with_name("audit.json")
        self.locked = root / "run" / f"{self.unit}.lock"
        self.stats = root / "run" / self.unit / "stats.sock"
        self.fifo = root / "run" / self.unit / "master.fifo"
        self.site_link = root / "etc/nginx/sites-enabled" / f"{self.unit}.conf"
        if not (self.wanted / "settings.json").is_file():
            known = sorted(path.parent.parent.name[6:] for path in root.glob("etc/uwsgi-*/wanted/settings.json"))
            raise Failure(REFUSED, f"no application '{name}' on this host; there are: {', '.join(known) or 'none'}")
        # What is live: an answer is judged by the rules of what serves. Before the first activation, the wanted.
        self.settings = self.read_settings(self.etc if (self.etc / "settings.json").exists() else self.wanted)

    # --- what is there ---------------------------------------------------------------------------------------------

    @staticmethod
    def content(path: Path) -> bytes | None:
        """Return a file's content, or None where there is none."""
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    @staticmethod
    def read_settings(folder: Path) -> dict[str, Any]:
        """Return the settings of a configuration, as the role's settings.json.j2 writes them."""
        settings: dict[str, Any] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        return settings

    def live_path(self, name: str) -> Path:
        """Return the place where a file of the configuration is live."""
        return self.root / CONFIGURATION[name].format(app=self.name)

    def configuration(self, folder: Path | None) -> dict[str, bytes | None]:
        """Return the files of the configuration in a folder (wanted or undo) or, without one, of what is live."""
        return {name: self.content(folder / name if folder else self.live_path(name)) for name in CONFIGURATION}

    def current_release(self) -> str:
        """Return the id of the release that `current` names, or an empty text."""
        try:
            return os.path.basename(os.readlink(self.current))
        except OSError:
            return ""

    def record(self, release: str) -> dict[str, Any]:
        """Return what was recorded when a release was finished. Raises Failure for one that is not whole."""
        content = self.content(self.releases / release / "release.json") if re.fullmatch(r"[\w.-]+", release) else None
        if content is None:
            known = ", ".join(sorted(path.parent.name for path in self.releases.glob("*/release.json")))
            raise Failure(REFUSED, f"{self.unit} has no release '{release}'; there are: {known or 'none'}")
        found: dict[str, Any] = json.loads(content.decode())
        return found

    def runtime(self, release: str) -> str:
        """Return what a running master cannot exchange: the interpreter, and uWSGI where it is part of the release."""
        record = json.loads((self.content(self.releases / release / "release.json") or b"{}").decode())
        return f"Python {record.get('python', '?')}, uWSGI {record.get('uwsgi', '?')}"

    def unit_state(self) -> dict[str, str]:
        """Return systemd's view of the service: ActiveState and MainPID."""
        shown = run("systemctl", "show", "-p", "ActiveState,MainPID", f"{self.unit}.service")
        return dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)

    def enabled_units(self) -> list[str]:
        """Return whether the service and the socket start at boot, in systemd's words."""
        return run("systemctl", "is-enabled", f"{self.unit}.service", f"{self.unit}.socket").stdout.split()

    def workers(self) -> list[Worker]:
        """Return the workers that uWSGI's statistics name. Raises OSError or ValueError when it gives none."""
        data = b""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.stats))
            while True:
                part = connection.recv(65536)
                if not part:
                    break
                data += part
        return [
            Worker(int(worker["pid"]), bool(worker["accepting"]), self.release_of(int(worker["pid"])))
            for worker in json.loads(data.decode("utf-8", "replace"))["workers"]
            if int(worker["pid"]) > 0
        ]

    def release_of(self, pid: int) -> str:
        """Return the release that a process works in. Every worker enters its release's folder when it is forked."""
        try:
            place = os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            return ""
        found = re.match(re.escape(str(self.releases)) + r"/([^/]+)/", place + "/")
        return found.group(1) if found else ""

    def running_releases(self) -> list[str] | None:
        """Return the releases that the workers run from, each once, or None when uWSGI does not tell."""
        try:
            return sorted({worker.release for worker in self.workers()})
        except (OSError, ValueError):
            return None

    def health(
        self,
        timeout: float,
        settings: dict[str, Any] | None = None,
        address: Path | None = None,
        unit: str = "",
    ) -> tuple[bool, str]:
        """Ask the health path until it answers 2xx; return whether it did and what was last seen.

        It has `timeout` seconds for an answer. One that is not 2xx, or is broken off, is asked again for PATIENCE
        seconds: a database that was just starting is there by then, and a broken release should not serve for longer.
        Asked is what serves, or what listens at `address` with other settings, as long as its `unit` runs.
        """
        settings = settings or self.settings
        path = str(settings["health_path"])
        deadline = time.monotonic() + timeout
        seen = f"no answer within {timeout:g} s"
        answered = False
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False, f"{path}: {seen}"
            try:
                status, body = ask_uwsgi(address or self.socket, path, str(settings["health_host"]), remaining)
                if 200 <= status < 300:
                    return True, f"{path}: {status}"
                seen, answers = f"it answers {status}, not 2xx ({' '.join(body.split())[:200]})", True
            except socket.timeout:
                continue
            except OSError as error:
                seen, answers = f"no answer ({error.strerror or error})", isinstance(error, ConnectionResetError)
                if unit and run("systemctl", "is-active", "-q", f"{unit}.service").returncode:
                    return False, f"{path}: {seen}"
            if answers and not answered:
                answered, deadline = True, min(deadline, time.monotonic() + PATIENCE)
            time.sleep(max(0.0, min(0.5 if answered else 0.1, deadline - time.monotonic())))

    def said(self, since: float, unit: str = "") -> str:
        """Return what the service's journal says since a moment (seconds of the epoch), at most 40 lines of it."""
        run("journalctl", "--sync")  # what a process said that has just ended may not be there yet
        command = ("journalctl", "-u", f"{unit or self.unit}.service", f"--since=@{int(since)}", "-o", "cat")
        return run(*command, "--no-pager", "-n", "40").stdout.strip()

    # --- the journal of activations --------------------------------------------------------------------------------

    def note(self, action: str, release: str, result: str, **more: Any) -> None:
        """Add a line to the journal: who did what, when, and how it ended."""
        entry = {"when": now(), "who": caller(), "action": action, "release": release, "result": result, **more}
        with open(self.journal, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def entries(self) -> list[dict[str, Any]]:
        """Return the journal, oldest first; a line that a crash cut short is left out."""
        found = []
        for line in (self.content(self.journal) or b"").decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def previous(self) -> str:
        """Return the release to roll back to: the good one before the current, or an empty text.

        A release that was left by a rollback is not a good one any more, until it is activated again.
        """
        good: list[str] = []
        for entry in self.entries():
            release = entry["release"]
            if entry["result"] != "ok" or entry["action"] not in ("activate", "rollback"):
                continue
            if entry["action"] == "rollback" and release in good:
                del good[good.index(release) + 1 :]
            else:
                good = [*(known for known in good if known != release), release]
        there = [known for known in good if (self.releases / known / "release.json").exists()]
        current = self.current_release()
        earlier = there[: there.index(current)] if current in there else there
        return earlier[-1] if earlier else ""

    def schema(self, release: str = "") -> str:
        """Return the schema that the database had when a release was last migrated to, as far as it was recorded.

        Without a release it is the one that the database was left at by whichever was the last.
        """
        found = [entry for entry in self.entries() if entry.get("schema") and release in ("", entry["release"])]
        return str(found[-1]["schema"]) if found else ""

    # --- called by the unit ----------------------------------------------------------------------------------------

    def note_start(self) -> None:
        """Note which configuration the service is being started with, so that a later run knows what is stale.

        When an activation was cut short (power, SIGKILL), what was live before it comes back first: it is known to
        serve.
        """
        with contextlib.suppress(Failure), self.lock():
            before = self.content(self.undo / "release")
            if before:
                target = (self.content(self.undo / "target") or b"").decode()
                for name, content in self.configuration(self.undo).items():
                    self.place(name, content)
                self.point_current_to(before.decode())
                self.note("heal", before.decode(), "ok", note=f"started while the activation of {target} was cut short")
                shutil.rmtree(self.undo)
        noted = {name: digest(self.content(self.live_path(name))) for name in READ_AT_START}
        noted["runtime"] = self.runtime(self.current_release())
        write(self.started, json.dumps(noted).encode(), 0o600)

    # --- proving ---------------------------------------------------------------------------------------------------

    def sandboxed(self, folder: Path | None, release: str, options: Sequence[str], *command: str) -> tuple[str, ...]:
        """Return what runs a command in a release's source folder just as the service: account, environment, sandbox.

        What the configuration's unit says of them is handed to a transient unit; what belongs to serving is left out.
        `options` are systemd-run's.
        """
        serving = re.compile(r"Exec|Type=|Notify|Restart|Timeout|Kill|RuntimeDirectory|EnvironmentFile=")
        unit = (self.configuration(folder)["service"] or b"").decode()
        lines = unit.partition("[Service]")[2].partition("\n[Install]")[0].splitlines()
        properties = [line for line in lines if "=" in line and not line.startswith("#") and not serving.match(line)]
        place = self.releases / release
        return (
            *("systemd-run", "--quiet", "--collect", *options, *(f"--property={line}" for line in properties)),
            f"--property=EnvironmentFile={(folder or self.etc) / 'environment'}",
            f"--property=WorkingDirectory={place / 'app'}",
            f"--setenv=PATH={place / 'venv/bin'}:/usr/local/bin:/usr/bin:/bin",
            *command,
        )

    def binary(self, release: str, settings: dict[str, Any]) -> str:
        """Return the uWSGI that serves a release: Debian's, or the one in its virtual environment."""
        inside = settings["uwsgi"] == "pyuwsgi"
        return str(self.releases / release / "venv/bin/uwsgi") if inside else "/usr/bin/uwsgi"

    def check_ini(self, folder: Path | None, release: str) -> None:
        """Have uWSGI read the ini; strict mode refuses an option that it does not know."""
        ini = (folder or self.etc) / "uwsgi.ini"
        checked = run(self.binary(release, self.read_settings(folder or self.etc)), "--ini", str(ini), "--version")
        if checked.returncode:
            raise Failure(
                REFUSED,
                f"uWSGI refuses its configuration {ini}: {checked.stdout.strip()}\n"
                "Correct uwsgi_sqlalchemy_uwsgi_options; nothing was changed.",
            )

    @contextlib.contextmanager
    def loaded(self, release: str, folder: Path | None, *, audit: bool = False) -> Iterator[None]:
        """Have the release loaded just as the service would, on a socket that no traffic reaches, until the end.

        Raises Failure with what uWSGI said when it cannot be. It is loaded in one process and not in a lazy worker:
        there uWSGI reports itself ready whatever becomes of the application. With `audit` there are `findings` then.
        """
        self.record(release)
        self.check_ini(folder, release)
        settings, unit = self.read_settings(folder or self.etc), f"{self.unit}-rehearsal"
        if settings.get("oracle_client"):
            self.prove_oracle_client(release, folder)
        since = time.time()
        run("systemctl", "stop", f"{unit}.service")  # of a run that was killed
        ini = self.proof_ini(release, folder)
        write(self.proof, (ini + "import = uwsgi_sqlalchemy_audit\n" * audit).encode(), 0o644)
        module = re.search(r"^module = (\S+)", ini, re.MULTILINE)
        try:
            options = (
                *(f"--unit={unit}", f"--property=RuntimeDirectory={unit}"),
                *("--property=Type=notify", f"--property=TimeoutStartSec={settings['health_timeout']}"),
                *("--property=TimeoutStopSec=5", "--property=RuntimeMaxSec=1h"),
                # Not UWSGI_…, which uWSGI takes for its options.
                f"--setenv=FORK_AUDIT_MODULE={module.group(1) if module else ''}",
                f"--setenv=FORK_AUDIT_REPORT={self.audit_report}",
            )
            uwsgi = (
                *(self.binary(release, settings), "--ini", str(self.proof), "--need-app", "--disable-logging"),
                *(f"--socket={self.rehearsal}", "--processes=1"),
            )
            done = run(*self.sandboxed(folder, release, options, *uwsgi))
            if done.returncode:
                slow = time.time() - since >= float(settings["health_timeout"])
                within = f" within {settings['health_timeout']} s" if slow else ""
                said = clean(self.said(since, unit) or done.stdout)
                raise Failure(
                    REFUSED, f"release {release} cannot be loaded{within}; it was not activated. uWSGI said:\n{said}"
                )
            yield
        finally:
            run("systemctl", "stop", "--no-block", f"{unit}.service")
            self.proof.unlink()

    def prove_oracle_client(self, release: str, folder: Path | None) -> None:
        """Have the service's account, in its sandbox, ask Oracle's client for its version. Raises Failure."""
        ask = ("/usr/bin/python3", "-I", "-c", ORACLE_VERSION)
        done = run(*self.sandboxed(folder, release, ("--wait", "--pipe"), *ask))
        said = done.stdout.strip()
        if done.returncode:
            raise Failure(
                REFUSED,
                f"Oracle's client cannot be loaded as the service would load it; release {release} was not activated."
                f" {said.splitlines()[-1] if said else 'No reason was given.'}\n"
                "Look with `ldd /opt/oracle/instantclient/libclntsh.so` for a library that is not found.",
            )
        active = os.path.basename(os.path.realpath(self.root / "opt/oracle/instantclient"))
        wanted = active.partition("_")[2].partition("-")[0].replace("_", ".")
        if not f"{said}.".startswith(f"{wanted}."):
            raise Failure(
                REFUSED,
                f"the service would load Oracle's client {said} instead of {wanted}; release {release} was not"
                " activated. `ldconfig -p | grep libclntsh` shows the one that comes first.",
            )
        step("client", f"the service can load Oracle's client {said}")

    def proof_ini(self, release: str, folder: Path | None) -> str:
        """Return the ini that loads a release: the service's without what belongs to serving."""
        loads = re.compile(
            r"(\[|strict|plugins?(-dir)?|virtualenv|pythonpath|module|single-interpreter|need-app|enable-threads"
            r"|env|set(-ph|-placeholder)?|(py|python-)?import|py-?argv|buffer-size|post-buffering)\b"
        )
        ini = (self.configuration(folder)["uwsgi.ini"] or b"").decode()
        kept = "\n".join(line for line in ini.splitlines() if loads.match(line))
        return kept.replace(f"{self.current}/", f"{self.releases / release}/") + "\n"

    def findings(self, release: str) -> list[dict[str, str]]:
        """Return what the audit of the release that is `loaded` found. Raises Failure when there is no report."""
        try:
            found: list[dict[str, str]] = json.loads(self.content(self.audit_report) or b"")
        except ValueError as error:
            raise Failure(REFUSED, f"the audit of release {release} ended without a report: {error}") from error
        return found

    @contextlib.contextmanager
    def proved(self, release: str, folder: Path | None) -> Iterator[None]:
        """Have the release loaded, and audited where a master is to import it. Raises Failure with what is wrong."""
        prefork = self.read_settings(folder or self.etc).get("fork_mode") == "prefork"
        with self.loaded(release, folder, audit=prefork):
            unfit = [one for one in (self.findings(release) if prefork else []) if one["verdict"] == "refused"]
            if unfit:
                raise Failure(
                    REFUSED,
                    f"release {release} is not fit for uwsgi_sqlalchemy_fork_mode prefork; it was not activated. What"
                    f" its import did cannot be made safe for a fork:\n{audit_text(unfit)}\n"
                    "Correct that, or set uwsgi_sqlalchemy_fork_mode to lazy.",
                )
            yield

    def audit(self, release: str) -> list[dict[str, str]]:
        """Return what a fork would share or lose after the import of a release. Raises Failure where that fails."""
        with self.loaded(release or self.current_release(), self.wanted, audit=True):
            return self.findings(release)

    def rehearse(self, release: str, folder: Path | None, again: Callable[[], None] | None) -> None:
        """Ask the health path of a release that is `loaded`. Raises Failure.

        It finds what loads and then fails at the first request, with the wanted configuration, before anybody sees it.
        `again` loads the release anew: what it read of the database then may be older than its migration.
        """
        settings, since, unit = self.read_settings(folder or self.etc), time.time(), f"{self.unit}-rehearsal"
        timeout = float(settings["health_timeout"])
        healthy, seen = self.health(timeout, settings, self.rehearsal, unit)
        if not healthy and again:
            again()
            healthy, seen = self.health(timeout, settings, self.rehearsal, unit)
        if not healthy:
            migrated = "\nThe migration has run." if again else ""
            raise Failure(
                REFUSED,
                f"release {release} does not answer its health path with this configuration; it was not activated."
                f" {seen}\n{clean(self.said(since, unit))}{migrated}",
            )

    def run_for(self, release: str, setting: str) -> None:
        """Run one of the release's hooks, if there is one. Raises Failure with what it said when it fails."""
        if command := str(self.settings_wanted[setting]):
            program = ("/usr/bin/env", *shlex.split(command))
            done = run(*self.sandboxed(self.wanted, release, ("--wait", "--pipe"), *program))
            self.judge(release, setting, done.returncode, done.stdout)

    def judge(self, release: str, setting: str, code: int, said: str) -> None:
        """Raise Failure with what one of the release's commands (migration, hooks) said where it failed."""
        if code:
            raise Failure(
                AFTER if setting == "after_activate" else REFUSED,
                f"uwsgi_sqlalchemy_{setting} of release {release} failed ({self.settings_wanted[setting]}):\n"
                f"{said.strip()[-4000:]}",
            )

    @property
    def settings_wanted(self) -> dict[str, Any]:
        """Return the settings that are wanted."""
        return self.read_settings(self.wanted)

    @contextlib.contextmanager
    def migration(self, release: str) -> Iterator[Callable[[], str]]:
        """Have the release's migration wait until what this gives is called, which returns the schema afterwards.

        It runs under a lock in its database. Python and SQLAlchemy, of which that lock is made, start meanwhile. It is
        not run when the call never comes, be it that this program dies. The schema is empty where it is not known, or
        where there is no migration. The call raises Failure when the migration fails.
        """
        command = shlex.split(str(self.settings_wanted["migrate_command"]))
        if not command:
            yield lambda: ""
            return
        helper = self.root / "usr/local/lib/uwsgi-sqlalchemy/python/uwsgi_sqlalchemy_migrate.py"
        program = (str(self.releases / release / "venv/bin/python"), str(helper), self.unit, *command)
        waiting = start(*self.sandboxed(self.wanted, release, ("--wait", "--pipe"), *program))

        def go() -> str:
            said = waiting.communicate("go\n")[0]
            self.judge(release, "migrate_command", waiting.returncode, said)
            schema = re.search(r"^uwsgi-sqlalchemy schema: (.+)$", said, re.MULTILINE)
            return schema.group(1) if schema else ""

        try:
            yield go
        finally:
            if waiting.returncode is None:
                waiting.communicate()

    # --- activating ------------------------------------------------------------------------------------------------

    def plan(self, release: str, folder: Path | None) -> Plan:
        """Work out what makes the configuration in `folder` (None: as it is) and `release` live."""
        plan = Plan()
        aims, live = self.configuration(folder), self.configuration(None)
        for name, content in aims.items():
            if content != live[name]:
                plan.files.append(name)
                plan.reasons.append(f"{self.live_path(name)} changed")
        if (aims["nginx.conf"] is not None) != self.site_link.is_symlink() and "nginx.conf" not in plan.files:
            plan.files.append("nginx.conf")
            plan.reasons.append(f"{self.site_link} {'is missing' if aims['nginx.conf'] else 'is to go'}")
        if self.undo.is_dir():
            plan.reasons.append("an earlier activation was cut short")
        self.plan_action(plan, release, {name: digest(aims[name]) for name in READ_AT_START})
        if self.current_release() != release:
            plan.reasons.append(f"release {self.current_release() or 'none'} becomes {release}")
        if plan.action == "none" and self.enabled_units() != ["enabled", "enabled"]:
            plan.reasons.append("the service was not enabled at boot")
        return plan

    def plan_action(self, plan: Plan, release: str, aims: dict[str, str]) -> None:
        """Choose the gentlest way that brings the service to the plan's aim, and say why."""
        noted = json.loads((self.content(self.started) or b"{}").decode())
        stale = [self.live_path(name) for name in READ_AT_START if noted.get(name) != aims[name]]
        running = self.running_releases()
        if self.unit_state().get("ActiveState") != "active":
            plan.action = "start"
            plan.reasons.append("the service was not running")
        elif "socket" in plan.files:
            plan.action = "restart with its socket"
        elif stale:
            plan.action = "restart"
            changed = [self.live_path(name) for name in plan.files]
            plan.reasons += [f"the service runs with an older {path}" for path in stale if path not in changed]
        elif (self.releases / release).exists() and noted.get("runtime") != self.runtime(release):
            plan.action = "restart"
            plan.reasons.append(f"runtime changes from {noted.get('runtime')} to {self.runtime(release)}")
        elif running is None:
            plan.action = "restart"
            plan.reasons.append(f"uWSGI gives no statistics on {self.stats}")
        elif running != [release]:
            if self.current_release() == release:
                plan.reasons.append(f"workers run {', '.join(running) or 'no release'}")
            # uWSGI inside the release (pyuwsgi) has the old release's module path built into its master.
            plan.action = "restart" if self.settings["uwsgi"] == "pyuwsgi" else self.reload_action(plan)

    def reload_action(self, plan: Plan) -> str:
        """Return how workers are replaced while the configuration stays; the plan gets the reasons."""
        if not self.fifo.is_fifo():
            plan.reasons.append(f"uWSGI takes no commands, {self.fifo} is missing")
            return "restart"
        # A master that has imported the application gives its workers nothing new until it starts over.
        if self.settings.get("fork_mode") == "prefork":
            return "graceful reload"
        # One worker after the other is replaced, so there have to be two.
        return "chain reload" if self.settings["processes"] > 1 else "restart"

    def install_site(self, content: bytes | None) -> None:
        """Put the Nginx site in place if Nginx accepts its whole configuration with it, else take it back."""
        before, enabled = self.content(self.live_path("nginx.conf")), self.site_link.is_symlink()
        self.place("nginx.conf", content)
        tested = run("nginx", "-t")
        # Nginx only warns of two sites with one name, and never sends the second of them a request.
        names = " ".join(re.findall(r"server_name([^;]*);", (content or b"").decode())).split()
        taken = set(names) & set(re.findall(r'conflicting server name "([^"]*)"', tested.stdout))
        if not tested.returncode and not taken:
            return
        self.place("nginx.conf", before)
        if not enabled:
            self.site_link.unlink(missing_ok=True)
        if taken:
            raise Failure(
                REFUSED,
                f"Nginx has another site for {' and '.join(sorted(taken))}, which would take the requests from"
                f" {self.unit} or lose its own:\n{tested.stdout.strip()}\n"
                "Correct uwsgi_sqlalchemy_server_names, or remove the other site.",
            )
        advice = "Correct uwsgi_sqlalchemy_nginx_options, uwsgi_sqlalchemy_listen or uwsgi_sqlalchemy_server_names."
        if run("nginx", "-t", "-q").returncode:
            advice = "It refused it before this change too: repair the file named above."
        raise Failure(
            REFUSED,
            f"Nginx refuses its configuration with the site of {self.unit}, which was put back:\n"
            f"{tested.stdout.strip()}\n{advice}",
        )

    def place(self, name: str, content: bytes | None) -> None:
        """Make a content live, or remove the file where there is none; the Nginx site is enabled by its link."""
        path = self.live_path(name)
        if content is None:
            path.unlink(missing_ok=True)
        elif content != self.content(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content, 0o600 if name == "environment" else 0o644)
        if name == "nginx.conf":
            if content is None:
                self.site_link.unlink(missing_ok=True)
            elif not self.site_link.is_symlink():
                self.site_link.parent.mkdir(parents=True, exist_ok=True)
                self.site_link.symlink_to(path)

    def point_current_to(self, release: str) -> None:
        """Let `current` name a release, atomically; without one, remove it."""
        if not release:
            self.current.unlink(missing_ok=True)
            return
        temporary = self.home / ".current.new"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("releases") / release)
        os.replace(temporary, self.current)

    def keep_undo(self, target: str) -> None:
        """Keep what is live, to put back. What a run that was cut short kept stays: it is the last known good."""
        if not self.undo.is_dir():
            temporary = self.etc / ".undo.new"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700)
            for name, content in self.configuration(None).items():
                if content is not None:
                    write(temporary / name, content, 0o600)
            write(temporary / "release", self.current_release().encode(), 0o600)
            os.replace(temporary, self.undo)
        write(self.undo / "target", target.encode(), 0o600)

    def renew(self, plan: Plan, release: str) -> None:
        """Start, restart or reload the service as planned and wait until it serves `release`; else raise Failure.

        Where a worker does not get ready for requests, a chain reload becomes a restart, and the plan says so.
        """
        since = time.time()
        step("renew", f"renew the workers: {plan.action}")
        if plan.action == "chain reload" and not self.all_accept():
            plan.action = "restart"
            plan.reasons.append("a worker does not get ready for requests, which a chain reload would wait for")
            step("instead", f"restart instead: {plan.reasons[-1]}")
        if plan.action in RELOADS:
            self.reload_workers(RELOADS[plan.action], release, since)
        elif plan.action != "none":
            run("systemctl", "daemon-reload")
            units = f"{self.unit}.socket", f"{self.unit}.service"
            if plan.action == "restart with its socket":
                run("systemctl", "stop", *units)
            run("systemctl", "reset-failed", *units)
            for verb, unit in zip(("start", "restart"), units):
                done = run("systemctl", verb, unit)
                if done.returncode:
                    raise Failure(PUT_BACK, f"{unit} did not start:\n{done.stdout}{self.said(since)}")
        if self.enabled_units() != [
            "enabled",
            "enabled",
        ]:  # that is known at once; to enable has systemd load all units
            run("systemctl", "enable", "-q", f"{self.unit}.socket", f"{self.unit}.service")

    def confirm(self, release: str) -> str:
        """See that every worker serves `release` and that the application is healthy; return how. Raises Failure."""
        since = time.time()
        deadline = time.monotonic() + float(self.settings["health_timeout"])
        self.wait_for_workers(release, deadline, since)
        healthy, seen = self.health(max(1.0, deadline - time.monotonic()))
        if not healthy:
            raise Failure(PUT_BACK, f"{self.unit} is not healthy: {seen}\n{self.said(since)}".strip())
        return seen

    def reload_workers(self, command: bytes, release: str, since: float) -> None:
        """Have the master replace its workers and wait until each of them is new. Raises Failure."""
        try:
            old = [worker.pid for worker in self.workers()]
            self.tell_master(command)
        except (OSError, ValueError) as error:
            raise Failure(PUT_BACK, f"uWSGI does not take commands on {self.fifo}: {error}") from error
        # In a chain each worker in turn finishes its request, imports the application and accepts before the next goes.
        limit = float(self.settings["health_timeout"]) + self.settings["processes"] * float(self.settings["harakiri"])
        # uWSGI takes no second chain while one runs, which may have been at some workers before `release` was current.
        again = command if command == RELOADS["chain reload"] else b""
        self.wait_for_workers(release, time.monotonic() + limit, since, old, again)

    def tell_master(self, command: bytes) -> None:
        """Give uWSGI's master a command. Raises OSError when it does not take any."""
        with open(os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0) as stream:
            stream.write(command)

    def all_accept(self) -> bool:
        """Wait until all workers accept requests, as long as health may take; return whether they do.

        A chain reload passes over one that does not, as it still imports the application, and leaves it with the old
        release; or it waits for it without end (uwsgi_master_check_chain in uWSGI's core/master_checks.c).
        """
        deadline = time.monotonic() + float(self.settings["health_timeout"])
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                if all(worker.accepting for worker in self.workers()):
                    return True
            time.sleep(0.03)
        return False

    def wait_for_workers(
        self, release: str, deadline: float, since: float, old: Sequence[int] = (), again: bytes = b""
    ) -> None:
        """Wait until all workers are new, accept requests and run from `release`. Raises Failure at the deadline.

        Every question wakes uWSGI's master, which otherwise looks after its workers once a second: asked once a second,
        it took twice as long to replace four that import for 1.5 s. While all accept requests and some are old, it gets
        the command `again` once a second.
        """
        main, looked = self.unit_state().get("MainPID"), time.monotonic()
        count, told = int(self.settings["processes"]), 0
        while True:
            seen: list[Worker] = []
            with contextlib.suppress(OSError, ValueError):
                seen = self.workers()
            ready = [w for w in seen if w.accepting and w.release == release and w.pid not in old]
            if len(ready) == count == len(seen):
                return
            if told < len(ready):
                told = len(ready)
                say(f"{told} of {count} workers serve {release}")
            if not seen or time.monotonic() - looked > 1:
                state, looked = self.unit_state(), time.monotonic()
                if state.get("ActiveState") != "active" or state.get("MainPID") != main:
                    raise Failure(PUT_BACK, f"{self.unit}.service went down:\n{self.said(since)}")
                if again and seen and all(worker.accepting for worker in seen):
                    with contextlib.suppress(OSError):  # then it is gone, which is seen next
                        self.tell_master(again)
            if time.monotonic() > deadline:
                raise Failure(PUT_BACK, f"only {len(ready)} of {count} workers serve {release}:\n{self.said(since)}")
            time.sleep(0.03)

    def make_live(self, plan: Plan, release: str, folder: Path | None) -> str:
        """Carry out a plan: files, link, workers. Returns how the application is healthy. Raises Failure."""
        aims = self.configuration(folder)
        step("configure", f"make the configuration live ({', '.join(plan.files) or 'unchanged'})")
        for name in plan.files:
            self.place(name, aims[name])
        self.settings = self.read_settings(self.etc)
        step("switch", f"switch from {self.current_release() or 'no release'} to {release}")
        self.point_current_to(release)
        self.renew(plan, release)
        step("confirm", "see that every worker serves it and that it is healthy")
        seen = self.confirm(release)
        # A run that was cut short may have placed the site already; Nginx has not read it before this point.
        if "nginx.conf" in plan.files or aims["nginx.conf"] != self.content(self.undo / "nginx.conf"):
            run("systemctl", "reload-or-restart", "nginx.service")
        return seen

    def activate(
        self, release: str, *, check: bool = False, retry: bool = False, rollback: bool = False
    ) -> dict[str, Any]:
        """Make a release live with the wanted configuration, or put everything back. Returns the report.

        With `check` nothing is changed and the report says what would be. `retry` takes a release that failed before.
        A `rollback` keeps the configuration as it is and runs neither migration nor hooks. Raises Failure.
        """
        began = time.monotonic()
        action, folder = ("rollback", self.undo_or_live()) if rollback else ("activate", self.wanted)
        previous, plan = self.current_release(), self.plan(release, folder)
        report: dict[str, Any] = {"app": self.name, "release": release, "from": previous, "changed": plan.changed}
        report.update(action=plan.action, reasons=plan.reasons, notes=[])
        if check:
            return report
        if not plan.changed:
            healthy, seen = self.health(float(self.settings["health_timeout"]))
            if not healthy:
                raise Failure(UNHEALTHY, f"nothing changed, but {self.unit} is not healthy: {seen}")
            return {**report, "seconds": 0.0, "health": seen, "workers": self.settings["processes"]}
        more: dict[str, Any] = {"from": previous, "how": plan.action}
        try:
            self.prepare(release, folder, plan, more, retry=retry, rollback=rollback)
            try:
                seen = self.make_live(plan, release, folder)
            finally:
                more["how"] = report["action"] = plan.action  # it may have become a restart
        except (Failure, OSError) as error:
            failure = error if isinstance(error, Failure) else Failure(PUT_BACK, str(error))
            if not self.undo.is_dir():
                self.note(action, release, "refused", **more, note=first_line(failure))
                raise failure from error
            self.put_back(action, release, failure, more)
        step("finish", "note it, and remove what is no longer needed")
        (self.releases / release / "failed.json").unlink(missing_ok=True)
        more["seconds"] = report["seconds"] = round(time.monotonic() - began, 1)
        self.note(action, release, "ok", **more)
        shutil.rmtree(self.undo)
        report["notes"] = self.notes(release) if rollback else []
        self.prune()
        if not rollback and previous != release:
            step("after", "run the command after the activation, if there is one")
            self.run_for(release, "after_activate")
        return {**report, "health": seen, "workers": self.settings["processes"]}

    def prepare(
        self,
        release: str,
        folder: Path | None,
        plan: Plan,
        more: dict[str, Any],
        *,
        retry: bool,
        rollback: bool,
    ) -> None:
        """Do all that can fail while the old release serves on, untouched. `more` gets what the journal should know."""
        if not (retry or rollback):
            self.refuse_failed(release)
        fresh = not self.undo.is_dir()
        other = release != self.current_release() or not fresh
        migrated, known = False, self.schema()
        with contextlib.ExitStack() as waiting, contextlib.ExitStack() as proof:
            load = other or plan.action != "none"
            if migrates := other and not rollback:
                migrate = waiting.enter_context(self.migration(release))
            if load:
                step("prove", f"load release {release} as the service would, where no traffic reaches it")
                proof.enter_context(self.proved(release, folder))
            else:
                self.check_ini(folder, release)
            step("keep", "keep what is live, to put it back if need be")
            self.keep_undo(release)
            try:
                if "nginx.conf" in plan.files:
                    step("site", "test the Nginx site")
                    self.install_site(self.configuration(folder)["nginx.conf"])
                if migrates:
                    step("migrate", "run the migration, if there is one")
                    migrated = bool(self.settings_wanted["migrate_command"])
                    if schema := migrate():
                        more["schema"] = schema
                        migrated = schema != known
                    step("before", "run the command before the activation, if there is one")
                    self.run_for(release, "before_activate")
                if load:
                    step("rehearse", "ask its health path")

                    def again() -> None:
                        proof.close()
                        proof.enter_context(self.proved(release, folder))

                    self.rehearse(release, folder, again if migrated else None)
            except (Failure, OSError):
                if fresh:
                    # Of what is live the site alone has been touched, and Nginx has not read it.
                    self.place("nginx.conf", self.content(self.undo / "nginx.conf"))
                    shutil.rmtree(self.undo)
                raise

    def refuse_failed(self, release: str) -> None:
        """Refuse a release that failed under traffic with this same configuration. Raises Failure with what to do."""
        failed = json.loads((self.content(self.releases / release / "failed.json") or b"{}").decode())
        if failed and failed["configuration"] == self.fingerprint(self.wanted):
            raise Failure(
                REFUSED,
                f"release {release} failed on {failed['when']} and was put back: {failed['message']}\n"
                "It is not activated again unasked. When the cause is gone: uwsgi-sqlalchemy activate"
                f" {self.name} {release} --retry, or run the playbook with -e uwsgi_sqlalchemy_retry=true",
            )

    def fingerprint(self, folder: Path) -> str:
        """Return a short name for a whole configuration."""
        return digest(b"\0".join(digest(content).encode() for content in self.configuration(folder).values()))

    def put_back(self, action: str, release: str, failure: Failure, more: dict[str, Any]) -> NoReturn:
        """Make live what was live before, see that it serves, mark the release, and fail with what happened."""
        step("back", f"it does not serve, put back what was live: {first_line(failure)}")
        if failure.code != REFUSED:  # then it has served, and failed
            mark = {"when": now(), "message": first_line(failure), "configuration": self.fingerprint(self.wanted)}
            write(self.releases / release / "failed.json", json.dumps(mark).encode(), 0o644)
        write(self.undo / "failed", b"", 0o600)
        before = (self.content(self.undo / "release") or b"").decode()
        try:
            outcome = self.restore()
        except Failure as second:
            self.note(action, release, "broken", **more, note=first_line(failure))
            text = f"{failure}\nRelease {before} is back in place but does not serve: {second}"
            raise Failure(BROKEN, text) from failure
        self.note(action, release, "put back", **more, note=first_line(failure))
        raise Failure(PUT_BACK, f"{failure}\n{outcome}") from failure

    def restore(self) -> str:
        """Bring back what `undo` keeps and remove it; return what there is now. Raises Failure if it does not serve."""
        before = (self.content(self.undo / "release") or b"").decode()
        if not before:
            run("systemctl", "disable", "-q", "--now", f"{self.unit}.service", f"{self.unit}.socket")
            for name, content in self.configuration(self.undo).items():
                self.place(name, content)
            self.point_current_to("")
            run("systemctl", "daemon-reload")
            shutil.rmtree(self.undo)
            return "There is no earlier release: the service was stopped."
        self.make_live(self.plan(before, self.undo), before, self.undo)
        shutil.rmtree(self.undo)
        return f"Release {before} and its configuration are back and serve."

    def finish_putting_back(self) -> None:
        """Finish what a run that was cut short while it put things back has begun.

        Where what was live before does not serve either, that must not keep a better release from being activated.
        """
        if not (self.undo / "failed").exists():
            return
        step("heal", "finish putting back what an earlier run began")
        before = (self.content(self.undo / "release") or b"").decode()
        try:
            self.restore()
            self.note("heal", before, "ok", note="finished putting back what an earlier run began")
        except Failure as failure:
            step("heal", f"it does not serve either, so go on: {first_line(failure)}")
            (self.undo / "failed").unlink()

    def undo_or_live(self) -> Path | None:
        """Return the configuration to roll back with: the one before a run that was cut short, else the live one."""
        return self.undo if self.undo.is_dir() else None

    def notes(self, release: str) -> list[str]:
        """Return what a person who rolls back has to know of the database."""
        old, new = self.schema(release), self.schema()
        if old and new and old != new:
            return [
                f"the database stays at schema {new}; release {release} was made for {old}. Nothing migrates it back."
            ]
        return []

    def rollback(self, release: str = "") -> dict[str, Any]:
        """Go back to the previous good release, or to a named one, without building or migrating anything."""
        target = release or self.previous()
        if not target:
            raise Failure(REFUSED, f"{self.unit} has no previous release to roll back to")
        if target == self.current_release() and not self.undo.is_dir():
            raise Failure(REFUSED, f"release {target} is current; name another: uwsgi-sqlalchemy releases {self.name}")
        return self.activate(target, rollback=True)

    def reload(self) -> dict[str, Any]:
        """Renew all workers of the current release, without a restart where that can be done. Raises Failure."""
        began, release = time.monotonic(), self.current_release()
        self.record(release)
        plan = Plan()
        plan.action = "restart" if self.running_releases() is None else self.reload_action(plan)
        self.renew(plan, release)
        report: dict[str, Any] = {"app": self.name, "release": release, "from": release, "changed": True}
        report.update(action=plan.action, notes=[])
        report.update(health=self.confirm(release), workers=self.settings["processes"])
        report["seconds"] = round(time.monotonic() - began, 1)
        self.note("reload", release, "ok", how=plan.action, seconds=report["seconds"])
        return report

    def prune(self) -> list[str]:
        """Remove the oldest releases beyond the number to keep. Returns their ids.

        Never the current one, the one to roll back to, one that a worker runs, or one that an unfinished run needs.
        Without an answer from uWSGI nobody knows what the workers run, and everything stays.
        """
        running = self.running_releases()
        if running is None or self.undo.is_dir():
            return []
        used = {self.current_release(), self.previous(), *running} - {""}
        whole = [path.parent for path in self.releases.glob("*/release.json")]
        newest_first = sorted(whole, key=lambda path: str(self.record(path.name)["built"]), reverse=True)
        spare = [path for path in newest_first if path.name not in used]
        removed = spare[max(0, int(self.settings["keep_releases"]) - len(used)) :]
        for path in removed:
            # The marker first: what a crash leaves of it is no release any more.
            (path / "release.json").unlink()
            shutil.rmtree(path)
        return [path.name for path in removed]

    # --- reports ---------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return how the application is: release and since when, service, workers, health, what to roll back to."""
        workers: list[Worker] = []
        with contextlib.suppress(OSError, ValueError):
            workers = self.workers()
        healthy, seen = self.health(5)
        current = self.current_release()
        changes = ("activate", "rollback", "heal")
        done = [entry for entry in self.entries() if entry["result"] == "ok" and entry["action"] in changes]
        return {
            "app": self.name,
            "release": current,
            "since": done[-1]["when"] if done and done[-1]["release"] == current else "",
            "service": self.unit_state().get("ActiveState", "unknown"),
            "workers": [vars(worker) for worker in workers],
            "processes": self.settings["processes"],
            "healthy": healthy,
            "health": seen,
            "previous": self.previous(),
            "unfinished": self.undo.is_dir(),
        }

    def list_releases(self) -> list[dict[str, Any]]:
        """Return the releases on the host, newest first, and what is to be said of each."""
        current, previous, running = self.current_release(), self.previous(), self.running_releases() or []
        found = []
        for path in self.releases.glob("*/release.json"):
            record = self.record(path.parent.name)
            states = {
                "current": record["release"] == current,
                "previous": record["release"] == previous,
                "running": record["release"] in running,
                "failed": (path.parent / "failed.json").exists(),
            }
            record["state"] = [name for name, holds in states.items() if holds]
            found.append(record)
        return sorted(found, key=lambda record: str(record["built"]), reverse=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the application's lock, or raise Failure naming who does. The kernel frees it when its holder dies."""
        with open(self.locked, "a+", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                stream.seek(0)
                holder = stream.read().strip()
                raise Failure(LOCKED, f"{self.unit} is being changed by {holder}; try again later") from error
            stream.seek(0)
            if left := stream.read().strip():
                step("lock", f"took over the lock that {left} left behind when it died")
            stream.truncate(0)
            stream.write(f"{caller()}, process {os.getpid()}, since {now()}\n")
            stream.flush()
            try:
                yield
            finally:
                stream.truncate(0)


def now() -> str:
    """Return the time as the journal writes it: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def caller() -> str:
    """Return who called, through sudo or directly."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


def first_line(failure: Failure) -> str:
    """Return a failure for the journal: its first line, and the exception or else the next line."""
    first, *rest = [line for line in str(failure).splitlines() if line.strip()]
    raised = [line for line in rest if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return " ".join([first, *(raised[-1:] or rest[:1])])[:400]


def clean(text: str) -> str:
    """Return what uWSGI said from the first traceback or error on, without its greeting and systemd's remarks."""
    remark = re.compile(r"(Start|Stopp)(ing|ed) uwsgi-|Failed to start uwsgi-|uwsgi-\S+: (Main|Failed|Deact|Consumed)")
    every = text.strip().splitlines()
    lines = [line for line in every if not remark.match(line)] or every
    starts = [i for i, line in enumerate(lines) if re.match(r"Traceback|unable to|ImportError|\S*Error\b", line)]
    return "\n".join(lines[starts[0] if starts else -8 :][-40:])


def line(report: dict[str, Any]) -> str:
    """Return a report of something that was made live as one line."""
    if not report["changed"]:
        return (
            f"{report['app']}: release {report['release']} serves already; nothing changed; health {report['health']}"
        )
    origin = f" (from {report['from']})" if report["from"] not in ("", report["release"]) else ""
    return (
        f"{report['app']}: release {report['release']}{origin} by {report['action']} in {report['seconds']} s; "
        f"{report['workers']} workers; health {report['health']}" + "".join(f"; {note}" for note in report["notes"])
    )


def audit_text(findings: list[dict[str, str]]) -> str:
    """Return what an audit found as a person reads it."""
    lines = [
        f"- {one['kind']} ({one['verdict']}): {one['what']}, at {one['where']}. {one['advice']}" for one in findings
    ]
    return "\n".join(lines) or "nothing that a fork would share or lose"


def table(rows: list[list[str]]) -> str:
    """Return rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def show(command: str, result: Any) -> str:
    """Return a result as a person reads it."""
    if command in ("activate", "rollback", "reload"):
        if "health" in result:
            return line(result)
        return f"would {result['action']}: {'; '.join(result['reasons'])}" if result["changed"] else "nothing to do"
    if command == "releases":
        head = ["release", "built", "by", "state", "source"]
        rows = [[r["release"], r["built"][:19], r["by"], " ".join(r["state"]), r["source"][:40]] for r in result]
        return table([head, *rows])
    if command == "journal":
        head = ["when", "who", "action", "release", "result", "how", "note"]
        return table([head, *([str(entry.get(key, "")) for key in head] for entry in result)])
    if command == "audit":
        return audit_text(result)
    return show_status(result) if command == "status" else str(result)


def show_status(status: dict[str, Any]) -> str:
    """Return how an application is, a line for each fact."""
    ready = sum(worker["accepting"] for worker in status["workers"])
    others = {worker["release"] for worker in status["workers"]} - {status["release"]}
    said = f"{ready} of {status['processes']} accept requests" + (f"; some run {', '.join(others)}" if others else "")
    keys = ["app", "release", "since", "service", "health", "previous"]
    rows = {**{key: status[key] for key in keys}, "workers": said}
    if status["unfinished"]:
        rows["unfinished"] = "an activation was cut short; the next one finishes it"
    return table([[key, str(value)] for key, value in rows.items()])


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="uwsgi-sqlalchemy",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("app", metavar="APP", help="name of the application")
        sub.add_argument("--json", action="store_true", help="answer in JSON")
        return sub

    command("status", "say which release serves since when, with which workers, and whether it is healthy")
    command("releases", "list the releases on this host, newest first")
    command("journal", "list who activated what, when, and how it ended")
    command("health", "ask the health path; exit 1 unless it answers 2xx")
    prove = command("prove", "load a release as the service would, without serving; it changes nothing")
    activate = command("activate", "make a release and the wanted configuration live, or put everything back")
    back = command("rollback", "go back to the previous good release, or to a named one")
    audit = command("audit", "say what a fork would share or lose after the import of a release; it changes nothing")
    command("reload", "renew the workers of the current release")
    command("prune", "remove releases beyond the number to keep")
    command("note-start", "called by the unit before it starts")
    audit.add_argument(
        "release", metavar="RELEASE", nargs="?", default="", help="id of a release (default: the current)"
    )
    for sub in (prove, activate):
        sub.add_argument("release", metavar="RELEASE", help="id of a release, as `releases` lists them")
    back.add_argument(
        "release", metavar="RELEASE", nargs="?", default="", help="id of a release (default: the previous)"
    )
    activate.add_argument("--check", action="store_true", help="change nothing, only say what would be done")
    activate.add_argument("--retry", action="store_true", help="take a release that failed before")
    return top


def ask_health(app: App) -> str:
    """Return that an application is healthy, or raise Failure."""
    healthy, seen = app.health(float(app.settings["health_timeout"]))
    if not healthy:
        raise Failure(UNHEALTHY, f"{app.unit} is not healthy: {seen}")
    return f"{app.unit} is healthy: {seen}"


def prove(app: App, release: str) -> str:
    """Return that a release can be loaded with the wanted configuration, or raise Failure."""
    with app.proved(release, app.wanted):
        return f"release {release} of {app.unit} can be loaded"


def activate(app: App, release: str, *, retry: bool) -> dict[str, Any]:
    """Activate a release, after finishing what an earlier run may have left. Raises Failure."""
    app.record(release)
    app.finish_putting_back()
    return app.activate(release, retry=retry)


def rollback(app: App, release: str) -> dict[str, Any]:
    """Roll back, after finishing what an earlier run may have left. Raises Failure."""
    if release:
        app.record(release)
    app.finish_putting_back()
    return app.rollback(release)


def execute(app: App, options: argparse.Namespace) -> Any:
    """Carry out one command and return its result. Raises Failure."""
    asking: dict[str, Callable[[], Any]] = {
        "status": app.status,
        "releases": app.list_releases,
        "journal": app.entries,
        "health": lambda: ask_health(app),
        "note-start": app.note_start,
    }
    changing: dict[str, Callable[[], Any]] = {
        "prove": lambda: prove(app, options.release),
        "audit": lambda: app.audit(options.release),
        "activate": lambda: activate(app, options.release, retry=options.retry),
        "rollback": lambda: rollback(app, options.release),
        "reload": app.reload,
        "prune": lambda: f"removed: {', '.join(app.prune()) or 'nothing'}",
    }
    if options.command in asking:
        return asking[options.command]()
    if options.command == "activate" and options.check:
        return app.activate(options.release, check=True)
    with app.lock():
        return changing[options.command]()


def main(arguments: list[str] | None = None) -> int:
    """Carry out the command line and return the exit code."""
    # argparse does not take an optional RELEASE after an option. No option here has a value: they may all come last.
    given = sorted(sys.argv[1:] if arguments is None else arguments, key=lambda word: word.startswith("--"))
    options = parser().parse_args(given)
    try:
        result = execute(App(options.app), options)
    except Failure as failure:
        if options.json:
            print(json.dumps({"app": options.app, "code": failure.code, "message": str(failure)}))
        else:
            print(f"uwsgi-sqlalchemy: {failure}", file=sys.stderr)
        return failure.code
    if options.json:
        reported = isinstance(result, dict) and "health" in result and "notes" in result
        print(json.dumps({**result, "line": line(result)} if reported else result))
    elif result is not None:
        print(show(options.command, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
