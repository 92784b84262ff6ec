"""The laboratory: an application that preforks without a guard, which no variable of the role can bring about.

The role writes a guarded configuration; `plain` takes the guard out of it on the host, and `guarded` brings it back.
What many requests at once made of either is a `Trial`; the database server and the kernel tell whose its sessions are.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from testinfra.host import Host

from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Client, Report
from testkit.playbook import play
from testkit.releases import command, program

Result = TypeVar("Result")


class Load(TypedDict, total=False):
    """How many requests, over how many connections, and seconds after which one of them hangs."""

    count: int
    connections: int
    timeout: float


GUARD = ("import = uwsgi_sqlalchemy_guard", "py-call-uwsgi-fork-hooks = true")
# Without its health check: what hangs would not be started, and it is to be seen hanging.
WITHOUT_HEALTH = "[Service]\nExecStartPost=\nTimeoutStopSec=5\n"
SAFE: Load = {"count": 5000, "connections": 64}  # on each of the two hosts
PLAIN: Load = {"count": 200, "connections": 16, "timeout": 5}
SLICE = 0.25  # seconds of a timeline's step


def everywhere(apps: Sequence[Deployed], action: Callable[[Deployed], Result]) -> list[Result]:
    """Do something for all applications at once and return the results in their order; raises what it raises."""
    with ThreadPoolExecutor(len(apps)) as pool:
        return list(pool.map(action, apps))


def plain(app: Deployed) -> None:
    """Start the wanted configuration of an application without its guard."""
    patterns = " ".join(f"-e '{line}'" for line in GUARD)
    done = command(
        app,
        f"cd /etc/{app.unit} && mkdir -p /run/systemd/system/{app.unit}.service.d"
        f" && printf %s > /run/systemd/system/{app.unit}.service.d/laboratory.conf && systemctl daemon-reload"
        f" && grep -vxF {patterns} wanted/uwsgi.ini > uwsgi.ini && cat wanted/environment > environment"
        f" && systemctl restart {app.unit}.service && sleep 4",
        WITHOUT_HEALTH,
    )
    if done.code:
        raise RuntimeError(f"the laboratory did not start: {done.output}{done.errors}")


def guarded(app: Deployed) -> None:
    """Leave the laboratory: make live what the role wants."""
    folder = f"/run/systemd/system/{app.unit}.service.d"
    command(app, f"rm -rf {folder} && systemctl daemon-reload && systemctl kill --signal=KILL {app.unit}.service")
    done = program(app, "activate", app.release())
    if done.code:
        raise RuntimeError(done.said)


@dataclass
class Trial:
    """What many requests at once made of an application."""

    host: str
    mode: str
    report: Report = field(repr=False)
    # By session that answered: the processes that hold its socket; nobody, when the server knows no such session.
    owners: dict[str, set[int]] = field(default_factory=dict)
    master: int = 0
    stack: list[str] = field(default_factory=list)  # of a worker that hung
    shared: int = 0  # how many processes hold the most widely held socket to the database
    recycled: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as it is recorded."""
        report = self.report
        first = report.first_bad
        right = [record.start + record.duration for record in report.records if record.kind == "right"]
        steps = int(max(right, default=0) / SLICE) + 1
        timeline = [0] * steps
        for moment in right:
            timeline[int(moment / SLICE)] += 1
        return {
            "host": self.host,
            "mode": self.mode,
            "requests": report.sent,
            "counts": report.counts,
            "rate": round(report.rate, 1),
            "first_bad": first.ordinal + 1 if first else None,
            "first_bad_kind": first.kind if first else "",
            "first_bad_text": first.text if first else "",
            "slice": SLICE,
            "timeline": timeline,
            "sessions": len(self.owners),
            "shared": self.shared,
            "stack": self.stack,
        }


def ask(app: Deployed, count: int, connections: int, timeout: float = 30) -> Report:
    """Send requests through an application's Nginx and return what came of them."""
    url = f"http://{hosts.address(str(app.host.backend.hostname))}"
    client = Client(url, connections=connections, timeout=timeout, limit=240)
    return asyncio.run(client.run(count))


def held_sockets(app: Deployed) -> dict[int, set[int]]:
    """Return the processes that hold each connection to the database server, by the connection's local port."""
    said = app.host.check_output("ss -Htnp dst %s", hosts.address("database"))
    found = {}
    for line in said.splitlines():
        local = line.split()[3]
        found[int(local.rpartition(":")[2])] = {int(pid) for pid in re.findall(r"pid=(\d+)", line)}
    return found


def server_sessions(database: Host, mysql: bool) -> dict[str, int]:
    """Return the sessions of the application that the server knows, and the port that each came from."""
    if mysql:
        said = database.check_output(
            "mariadb -N -e %s", "select id, host from information_schema.processlist where user = 'lab'"
        )
    else:
        said = database.check_output(
            "runuser -u postgres -- psql -At -F ' ' -c %s",
            "select pid, client_port from pg_stat_activity where datname = 'lab' and client_port is not null",
        )
    return {line.split()[0]: int(line.split()[1].rpartition(":")[2]) for line in said.splitlines()}


def stack(app: Deployed) -> list[str]:
    """Return what a worker that is busy with a request waits in: its native frames with names, the innermost first."""
    stats = json.loads(json.dumps(app.stats()))
    busy = [worker["pid"] for worker in stats["workers"] if worker["status"] == "busy"]
    if not busy:
        return []
    said = app.host.run("gdb --batch -p %s -ex bt", str(busy[0])).stdout
    frames = [re.sub(r"\s+", " ", line) for line in str(said).splitlines() if re.match(r"#\d+ ", line)]
    named = [re.sub(r"^#\d+ |0x[0-9a-f]{8,} in |\(.*", "", frame).strip() for frame in frames]
    return [frame for frame in named if frame != "??"][:16]


@dataclass
class Laboratory:
    """The application on both hosts, the database, and the trials made so far."""

    apps: list[Deployed]
    database: Host
    trials: dict[tuple[str, str, str], Trial] = field(default_factory=dict)  # by case, mode and host

    def deploy(self, **variables: Any) -> str:
        """Play the role with these variables and return what it said; raises AssertionError when it fails."""
        played = play(limit="web", entry="deploy", **variables)
        if played.status:
            raise AssertionError(played.output[-4000:])
        return played.output

    def refused(self, **variables: Any) -> str:
        """Play the role and return what it said when it failed; raises AssertionError when it did not."""
        played = play(limit="web", entry="deploy", **variables)
        if not played.status:
            raise AssertionError("it was not refused")
        return played.output

    def trial(self, case: str, mode: str, load: Load, *, mysql: bool = False) -> None:
        """Have many requests answered on both hosts, and look at the sessions that answered."""

        def one(app: Deployed) -> Trial:
            # Before anybody has spoken on it and the server has closed it.
            shared = max(map(len, held_sockets(app).values()), default=0)
            report = ask(app, **load)
            trial = Trial(str(app.host.backend.hostname), mode, report, shared=shared)
            if mode == "plain":
                trial.stack = stack(app) if report.counts["hung"] else []
                return trial
            trial.master = int(app.show("service", "MainPID"))
            known, sockets = server_sessions(self.database, mysql), held_sockets(app)
            answered = set().union(*report.sessions.values())
            trial.owners = {session: sockets.get(known.get(session, 0), set()) for session in answered}
            trial.recycled = len(report.pids) - len(app.pids())
            return trial

        for trial in everywhere(self.apps, one):
            self.trials[case, mode, trial.host] = trial

    def try_all(self, case: str, *, safe: Load = SAFE, **variables: Any) -> None:
        """Try a case in all three modes."""
        mysql = str(variables.get("driver", "")).startswith("mysql")
        self.deploy(mode="prefork", **variables)
        everywhere(self.apps, plain)
        self.trial(case, "plain", PLAIN)
        everywhere(self.apps, guarded)
        self.trial(case, "prefork", safe, mysql=mysql)
        self.deploy(mode="lazy", **variables)
        self.trial(case, "lazy", safe, mysql=mysql)

    def record(self) -> None:
        """Write the trials to where the test reports go."""
        folder = Path(os.environ.get("TEST_REPORTS") or hosts.ROOT / ".run" / "reports" / "lockup")
        platforms = {
            str(app.host.backend.hostname): app.host.check_output(
                "{ . /etc/os-release; echo $PRETTY_NAME; uwsgi --version; python3 --version; }"
            ).splitlines()
            for app in self.apps
        }
        trials = [{"case": case, **trial.to_dict()} for (case, _, _), trial in self.trials.items()]
        record = {"date": time.strftime("%Y-%m-%d"), "platforms": platforms, "trials": trials}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lockup.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
