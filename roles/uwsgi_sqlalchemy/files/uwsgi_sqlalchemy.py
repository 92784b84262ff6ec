#!/usr/bin/python3 -I
"""Switch the releases of applications that uWSGI serves on this host, and say how they are.

Everything of an application APP is called uwsgi-APP. Its releases lie in /srv/uwsgi-APP/releases, and the link
/srv/uwsgi-APP/current names the one that serves. What its configuration should be lies in /etc/uwsgi-APP/wanted;
`activate` makes that and a release live as one transaction: configuration checked, link switched, workers renewed,
health asked. When the application does not serve afterwards, everything is put back as it was.

exit codes: 0 done; 1 the health path does not answer; 2 wrong usage; 3 refused, nothing was changed;
            4 another run holds the lock; 5 it did not serve, the state before is back;
            6 it did not serve, nor does the state before
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

UNHEALTHY, REFUSED, LOCKED, PUT_BACK, BROKEN = 1, 3, 4, 5, 6

PATIENCE = 5.0  # seconds for which a wrong answer of the health path may still become a right one

# The files of an application's configuration: their name in /etc/uwsgi-APP/wanted, and the place where they are live.
CONFIGURATION = {
    "uwsgi.ini": "etc/uwsgi-{app}/uwsgi.ini",
    "environment": "etc/uwsgi-{app}/environment",
    "service": "etc/systemd/system/uwsgi-{app}.service",
    "socket": "etc/systemd/system/uwsgi-{app}.socket",
    "nginx.conf": "etc/nginx/sites-available/uwsgi-{app}.conf",
}


class Failure(Exception):
    """Something a person has to know: the message says what and what to do, the code becomes the exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return its result, whatever its exit code; its output is text."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


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
                raise TimeoutError("timed out")
            connection.settimeout(remaining)
            part = connection.recv(65536)
            if not part:
                break
            answer += part
    head, _, content = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/\d\.\d (\d{3})", head)
    if not status:
        raise ConnectionError("the connection was closed without an answer")
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
        self.socket = root / "run" / f"{self.unit}.socket"
        self.started = root / "run" / f"{self.unit}.started"
        self.stats = root / "run" / self.unit / "stats.sock"
        self.fifo = root / "run" / self.unit / "master.fifo"
        self.site_link = root / "etc/nginx/sites-enabled" / f"{self.unit}.conf"
        if not (self.wanted / "settings.json").is_file():
            known = sorted(path.parent.parent.name[6:] for path in root.glob("etc/uwsgi-*/wanted/settings.json"))
            raise Failure(REFUSED, f"no application '{name}' on this host; there are: {', '.join(known) or 'none'}")
        self.settings: dict[str, Any] = json.loads((self.wanted / "settings.json").read_text(encoding="utf-8"))

    # --- what is there ---------------------------------------------------------------------------------------------

    def live_path(self, name: str) -> Path:
        """Return the place where a file of the configuration is live."""
        return self.root / CONFIGURATION[name].format(app=self.name)

    @staticmethod
    def content(path: Path) -> bytes | None:
        """Return a file's content, or None where there is none."""
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

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
            known = sorted(path.parent.name for path in self.releases.glob("*/release.json"))
            raise Failure(REFUSED, f"{self.unit} has no release '{release}'; there are: {', '.join(known) or 'none'}")
        found: dict[str, Any] = json.loads(content.decode())
        return found

    def unit_state(self) -> dict[str, str]:
        """Return systemd's view of the service: ActiveState and MainPID."""
        shown = run("systemctl", "show", "-p", "ActiveState,MainPID", f"{self.unit}.service")
        return dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)

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

    def health(self, timeout: float) -> tuple[bool, str]:
        """Ask the health path until it answers 2xx; return whether it did and what was last seen.

        It has `timeout` seconds for an answer. One that is not 2xx is asked again for PATIENCE seconds: by then a
        database that was just starting is there, and a release that is broken should not serve for longer.
        """
        path = str(self.settings["health_path"])
        deadline = time.monotonic() + timeout
        seen = f"no answer within {timeout:g} s"
        answered = False
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False, f"{path}: {seen}"
            try:
                status, body = ask_uwsgi(self.socket, path, str(self.settings["health_host"]), remaining)
                if 200 <= status < 300:
                    return True, f"{path}: {status}"
                seen = f"it answers {status}, not 2xx ({' '.join(body.split())[:200]})"
                if not answered:
                    answered, deadline = True, min(deadline, time.monotonic() + PATIENCE)
            except TimeoutError:
                continue
            except OSError as error:
                seen = f"no answer ({error})"
            time.sleep(max(0.0, min(0.5, deadline - time.monotonic())))

    # --- called by the unit ----------------------------------------------------------------------------------------

    def note_start(self) -> None:
        """Note which configuration the service is being started with, so that a later run knows what is stale."""
        noted = {name: digest(self.content(self.live_path(name))) for name in ("uwsgi.ini", "environment", "service")}
        noted["runtime"] = self.runtime(self.current_release())
        write(self.started, json.dumps(noted).encode(), 0o600)

    def runtime(self, release: str) -> str:
        """Return what a running master cannot exchange: the interpreter, and uWSGI where it is part of the release."""
        record = json.loads((self.content(self.releases / release / "release.json") or b"{}").decode())
        return f"Python {record.get('python', '?')}, uWSGI {record.get('uwsgi', '?')}"

    # --- activating ------------------------------------------------------------------------------------------------

    def plan(self, release: str) -> Plan:
        """Work out what has to be done so that the wanted configuration and `release` are live."""
        plan = Plan()
        for name in CONFIGURATION:
            if self.content(self.wanted / name) != self.content(self.live_path(name)):
                plan.files.append(name)
                plan.reasons.append(f"{self.live_path(name)} changed")
        wants_site = (self.wanted / "nginx.conf").exists()
        if wants_site != self.site_link.is_symlink() and "nginx.conf" not in plan.files:
            plan.files.append("nginx.conf")
            plan.reasons.append(f"{self.site_link} {'is missing' if wants_site else 'is to go'}")
        if self.undo.is_dir():
            plan.reasons.append("an earlier activation was interrupted")
        noted = json.loads((self.content(self.started) or b"{}").decode())
        wanted = {name: digest(self.content(self.wanted / name)) for name in ("uwsgi.ini", "environment", "service")}
        if self.unit_state().get("ActiveState") != "active":
            plan.action = "start"
            plan.reasons.append("the service was not running")
        elif "socket" in plan.files:
            plan.action = "restart with its socket"
        elif any(noted.get(name) != wanted[name] for name in wanted):
            plan.action = "restart"
            stale = [str(self.live_path(name)) for name in wanted if noted.get(name) != wanted[name]]
            plan.reasons += [f"running with an older {path}" for path in stale if f"{path} changed" not in plan.reasons]
        elif noted.get("runtime") != self.runtime(release):
            plan.action = "restart"
            plan.reasons.append(f"runtime changed to {self.runtime(release)}")
        running = self.running_releases()
        if plan.action == "none" and running != [release]:
            # Chain reload replaces one worker after the other, so it needs two; uWSGI inside the release (pyuwsgi) has
            # the old release's module path built into its master.
            one_by_one = self.settings["processes"] > 1 and self.settings["uwsgi"] == "debian"
            plan.action = "chain reload" if one_by_one else "restart"
        if self.current_release() != release:
            plan.reasons.append(f"release {self.current_release() or 'none'} becomes {release}")
        elif plan.action == "chain reload":
            plan.reasons.append(f"workers run {', '.join(running) or 'no known release'}")
        if plan.action == "none" and self.enabled_units() != ["enabled", "enabled"]:
            plan.reasons.append("the service was not enabled at boot")
        return plan

    def running_releases(self) -> list[str]:
        """Return the releases that the workers run from, each once; none when uWSGI does not tell."""
        try:
            return sorted({worker.release for worker in self.workers()})
        except (OSError, ValueError):
            return []

    def enabled_units(self) -> list[str]:
        """Return whether the service and the socket start at boot, in systemd's words."""
        return run("systemctl", "is-enabled", f"{self.unit}.service", f"{self.unit}.socket").stdout.split()

    def check_configuration(self) -> None:
        """Have uWSGI read the wanted ini; strict mode refuses an option that it does not know."""
        binary = "/usr/bin/uwsgi"
        if self.settings["uwsgi"] == "pyuwsgi":
            binary = str(self.releases / self.settings["release"] / "venv/bin/uwsgi")
        checked = run(binary, "--ini", str(self.wanted / "uwsgi.ini"), "--version")
        if checked.returncode:
            raise Failure(
                REFUSED,
                f"uWSGI refuses its configuration {self.wanted / 'uwsgi.ini'}: {checked.stdout.strip()}\n"
                "Correct uwsgi_sqlalchemy_uwsgi_options; nothing was changed.",
            )

    def install_site(self) -> None:
        """Put the wanted Nginx site in place if Nginx accepts its whole configuration with it, else take it back."""
        before = self.content(self.live_path("nginx.conf")), self.site_link.is_symlink()
        self.place("nginx.conf", self.content(self.wanted / "nginx.conf"))
        tested = run("nginx", "-t", "-q")
        if not tested.returncode:
            return
        self.place("nginx.conf", before[0])
        if not before[1]:
            self.site_link.unlink()
        already = run("nginx", "-t", "-q").returncode != 0
        raise Failure(
            REFUSED,
            f"Nginx refuses its configuration with the site of {self.unit}, now put back.\n{tested.stdout.strip()}\n"
            + ("It refused it before this change too: repair the file named above." if already else
               "Correct uwsgi_sqlalchemy_nginx_options, uwsgi_sqlalchemy_listen or uwsgi_sqlalchemy_server_names."),
        )  # fmt: skip

    def place(self, name: str, content: bytes | None) -> None:
        """Make a content live, or remove the file where there is none; the Nginx site is enabled by its link."""
        path = self.live_path(name)
        if content is None:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        elif content != self.content(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content, 0o600 if name == "environment" else 0o644)
        if name == "nginx.conf":
            if content is None:
                with contextlib.suppress(FileNotFoundError):
                    self.site_link.unlink()
            elif not self.site_link.is_symlink():
                self.site_link.parent.mkdir(parents=True, exist_ok=True)
                self.site_link.symlink_to(path)

    def point_current_to(self, release: str) -> None:
        """Let `current` name a release, atomically; without one, remove it."""
        if not release:
            with contextlib.suppress(FileNotFoundError):
                self.current.unlink()
            return
        temporary = self.home / ".current.new"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(Path("releases") / release)
        os.replace(temporary, self.current)

    def save_undo(self) -> None:
        """Keep what is live, to put back. What an interrupted run kept stays: it is the last known good."""
        if self.undo.is_dir():
            return
        temporary = self.etc / ".undo.new"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        for name in CONFIGURATION:
            content = self.content(self.live_path(name))
            if content is not None:
                write(temporary / name, content, 0o600)
        (temporary / "release").write_text(self.current_release(), encoding="utf-8")
        os.replace(temporary, self.undo)

    def renew(self, action: str, release: str) -> None:
        """Start, restart or chain-reload the service and wait until it serves `release`; else raise Failure."""
        since = time.time()
        if action == "chain reload":
            self.chain_reload(release)
        elif action != "none":
            run("systemctl", "daemon-reload")
            if action == "restart with its socket":
                run("systemctl", "stop", f"{self.unit}.socket", f"{self.unit}.service")
            run("systemctl", "reset-failed", f"{self.unit}.socket", f"{self.unit}.service")
            for verb, unit in (("start", f"{self.unit}.socket"), ("restart", f"{self.unit}.service")):
                done = run("systemctl", verb, unit)
                if done.returncode:
                    raise Failure(PUT_BACK, f"{unit} did not start:\n{done.stdout}{self.journal(since)}")
        run("systemctl", "enable", "-q", f"{self.unit}.socket", f"{self.unit}.service")
        deadline = time.monotonic() + float(self.settings["health_timeout"])
        self.wait_for_workers(release, deadline, [], since)
        healthy, seen = self.health(max(1.0, deadline - time.monotonic()))
        if not healthy:
            raise Failure(PUT_BACK, f"{self.unit} is not healthy: {seen}\n{self.journal(since)}")

    def chain_reload(self, release: str) -> None:
        """Have the master replace its workers one after the other and wait until each of them is new."""
        since = time.time()
        old = [worker.pid for worker in self.workers()]
        try:
            fifo = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise Failure(PUT_BACK, f"uWSGI does not take commands on {self.fifo}: {error.strerror}") from error
        with os.fdopen(fifo, "wb", buffering=0) as stream:
            stream.write(b"c")
        # Each worker in turn finishes its request, imports the application and accepts before the next one goes.
        limit = float(self.settings["health_timeout"]) + self.settings["processes"] * float(self.settings["harakiri"])
        self.wait_for_workers(release, time.monotonic() + limit, old, since)

    def wait_for_workers(self, release: str, deadline: float, old: list[int], since: float) -> None:
        """Wait until all workers are new, accept requests and run from `release`. Raises Failure at the deadline."""
        main = self.unit_state().get("MainPID")
        while True:
            seen: list[Worker] = []
            with contextlib.suppress(OSError, ValueError):
                seen = self.workers()
            ready = [w for w in seen if w.accepting and w.release == release and w.pid not in old]
            if len(ready) == self.settings["processes"] and len(seen) == len(ready):
                return
            state = self.unit_state()
            if state.get("ActiveState") != "active" or state.get("MainPID") != main:
                raise Failure(PUT_BACK, f"{self.unit}.service went down:\n{self.journal(since)}")
            if time.monotonic() > deadline:
                raise Failure(
                    PUT_BACK,
                    f"only {len(ready)} of {self.settings['processes']} workers serve release {release}:\n"
                    f"{self.journal(since)}",
                )
            time.sleep(0.1)

    def journal(self, since: float) -> str:
        """Return what the service's journal says since a moment (seconds of the epoch), at most 40 lines of it."""
        said = run(
            "journalctl", "-u", f"{self.unit}.service", f"--since=@{int(since)}", "-o", "cat", "--no-pager", "-n", "40"
        )
        return said.stdout.strip()

    def activate(self, release: str, check: bool) -> dict[str, Any]:
        """Make the wanted configuration and a release live, or put everything back. Returns the report.

        With `check` nothing is changed and the report says what would be. Raises Failure.
        """
        began = time.monotonic()
        if not check:
            self.record(release)
        plan = self.plan(release)
        previous = self.current_release()
        report = {
            "app": self.name,
            "release": release,
            "from": previous,
            "changed": plan.changed,
            "action": plan.action,
            "reasons": plan.reasons,
        }
        if check:
            return report
        if not plan.changed:
            healthy, seen = self.health(float(self.settings["health_timeout"]))
            if not healthy:
                raise Failure(UNHEALTHY, f"nothing changed, but {self.unit} is not healthy: {seen}")
            return report
        self.check_configuration()
        self.save_undo()
        try:
            if previous != release:
                self.migrate(release)
            if "nginx.conf" in plan.files:
                self.install_site()
        except Failure:
            shutil.rmtree(self.undo)
            raise
        try:
            for name in plan.files:
                if name != "nginx.conf":
                    self.place(name, self.content(self.wanted / name))
            self.point_current_to(release)
            self.renew(plan.action, release)
        except Failure as failure:
            self.put_back(failure)
        if "nginx.conf" in plan.files:
            run("systemctl", "reload-or-restart", "nginx.service")
        shutil.rmtree(self.undo)
        self.prune()
        report["seconds"] = round(time.monotonic() - began, 1)
        return report

    def sandboxed(self, release: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a release's source folder just as the service runs: account, environment and sandbox.

        What the wanted unit says of them is handed to a transient unit; what belongs to serving is left out.
        """
        serving = re.compile(r"Exec|Type=|Notify|Restart|Timeout|Kill|RuntimeDirectory|EnvironmentFile=")
        unit = (
            (self.wanted / "service").read_text(encoding="utf-8").partition("[Service]")[2].partition("\n[Install]")[0]
        )
        lines = [
            line for line in unit.splitlines() if "=" in line and not line.startswith("#") and not serving.match(line)
        ]
        folder = self.releases / release
        return run(
            *("systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={self.unit}-{os.getpid()}"),
            *(f"--property={line}" for line in lines),
            f"--property=EnvironmentFile={self.wanted / 'environment'}",
            f"--property=WorkingDirectory={folder / 'app'}",
            f"--setenv=PATH={folder / 'venv/bin'}:/usr/local/bin:/usr/bin:/bin",
            *command,
        )

    def migrate(self, release: str) -> None:
        """Run the release's migration command, if there is one. Raises Failure with what it said when it fails."""
        command = str(self.settings["migrate_command"])
        if not command:
            return
        done = self.sandboxed(release, "/usr/bin/env", *shlex.split(command))
        if done.returncode:
            raise Failure(
                REFUSED,
                f"the migration of release {release} failed ({command}); the old release stays:\n{done.stdout.strip()}",
            )

    def put_back(self, failure: Failure) -> NoReturn:
        """Make live what was live before, see that it serves, and fail with what happened."""
        release = (self.undo / "release").read_text(encoding="utf-8")
        for name in CONFIGURATION:
            self.place(name, self.content(self.undo / name))
        self.point_current_to(release)
        if not release:
            run("systemctl", "disable", "-q", "--now", f"{self.unit}.service", f"{self.unit}.socket")
            shutil.rmtree(self.undo)
            raise Failure(PUT_BACK, f"{failure}\nThere is no earlier release: the service was stopped.")
        try:
            self.renew("restart", release)
        except Failure as second:
            raise Failure(
                BROKEN, f"{failure}\nRelease {release} is back in place but does not serve: {second}"
            ) from failure
        shutil.rmtree(self.undo)
        raise Failure(PUT_BACK, f"{failure}\nRelease {release} and its configuration are back and serve.")

    def prune(self) -> list[str]:
        """Remove the oldest releases beyond the number to keep, never one that a worker runs. Returns their ids."""
        used = {self.current_release(), *self.running_releases()}
        finished = [
            (json.loads(path.read_bytes().decode())["built"], path.parent)
            for path in self.releases.glob("*/release.json")
        ]
        newest_first = [path for _, path in sorted(finished, reverse=True)]
        removed = []
        for path in newest_first[max(2, int(self.settings["keep_releases"])) :]:
            if path.name not in used:
                (path / "release.json").unlink()
                shutil.rmtree(path)
                removed.append(path.name)
        return removed

    def status(self) -> dict[str, Any]:
        """Return how the application is: release, service, workers and health."""
        workers: list[Worker] = []
        with contextlib.suppress(OSError, ValueError):
            workers = self.workers()
        healthy, seen = self.health(5)
        return {
            "app": self.name,
            "release": self.current_release(),
            "service": self.unit_state().get("ActiveState", "unknown"),
            "workers": [vars(worker) for worker in workers],
            "healthy": healthy,
            "health": seen,
        }

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the application's lock, or raise Failure naming who does. The kernel frees it when its holder dies."""
        path = self.root / "run" / f"{self.unit}.lock"
        with open(path, "a+", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                stream.seek(0)
                raise Failure(
                    LOCKED, f"{self.unit} is being changed by {stream.read().strip()}: wait for it"
                ) from error
            stream.truncate(0)
            stream.write(f"{caller()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n")
            stream.flush()
            yield


def caller() -> str:
    """Return who called, through sudo or directly."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    top = argparse.ArgumentParser(
        prog="uwsgi-sqlalchemy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("app", metavar="APP", help="name of the application")
        sub.add_argument("--json", action="store_true", help="answer in JSON")
        return sub

    command("status", "say which release serves, with which workers, and whether it is healthy")
    command("health", "ask the health path once more, as the unit does after a start; exit 1 unless it answers 2xx")
    activate = command("activate", "make a release and the wanted configuration live, or put everything back")
    activate.add_argument("release", metavar="RELEASE", help="id of the release, a folder of /srv/uwsgi-APP/releases")
    activate.add_argument("--check", action="store_true", help="change nothing, only say what would be done")
    command("note-start", "called by the unit before it starts")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Carry out the command line and return the exit code."""
    options = parser().parse_args(arguments)
    result: dict[str, Any] = {}
    try:
        app = App(options.app)
        if options.command == "note-start":
            app.note_start()
            return 0
        if options.command == "health":
            healthy, seen = app.health(float(app.settings["health_timeout"]))
            if not healthy:
                raise Failure(UNHEALTHY, seen)
            result = {"app": app.name, "healthy": True, "health": seen}
        elif options.command == "status":
            result = app.status()
        else:
            with app.lock():
                result = app.activate(options.release, options.check)
    except Failure as failure:
        if options.json:
            print(json.dumps({"app": options.app, "failed": True, "code": failure.code, "message": str(failure)}))
        print(f"uwsgi-sqlalchemy: {failure}", file=sys.stderr)
        return failure.code
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
