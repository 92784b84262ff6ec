"""The laboratory: an application that preforks without a guard, which no variable of the role can bring about.

The role writes a guarded configuration; `plain` takes the guard out of it on the host, and `guarded` brings it back.
What many requests at once made of either is a `Trial`; the database server and the kernel tell whose its sessions are.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from testinfra.host import Host

from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Client, Report
from testkit.releases import command, program

Result = TypeVar("Result")

GUARD = ("import = uwsgi_sqlalchemy_guard", "py-call-uwsgi-fork-hooks = true")
# Without its health check: what hangs would not be started, and it is to be seen hanging.
WITHOUT_HEALTH = "[Service]\nExecStartPost=\nTimeoutStopSec=5\n"
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
    """Return what a worker that is busy with a request waits in: its native frames, the innermost first."""
    stats = json.loads(json.dumps(app.stats()))
    busy = [worker["pid"] for worker in stats["workers"] if worker["status"] == "busy"]
    if not busy:
        return []
    said = app.host.run("gdb --batch -p %s -ex bt", str(busy[0])).stdout
    frames = [re.sub(r"\s+", " ", line) for line in str(said).splitlines() if re.match(r"#\d+ ", line)]
    return [re.sub(r"0x[0-9a-f]{8,} in |\(.*", "", frame).strip() for frame in frames][:16]
