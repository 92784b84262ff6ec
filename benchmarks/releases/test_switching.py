"""How long activation and rollback take, and how long a request waits meanwhile, on an otherwise idle machine.

`make bench` runs it on the hosts of the scenario `releases`, one application after the other, and writes what it
measured to benchmarks/releases.json. Nothing here is asserted under a clock: a busy machine must not fail a test.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import testinfra
from testkit import hosts
from testkit.apps import Deployed
from testkit.releases import PROGRAM, Ran, command, look, versions
from testkit.story import Play, Seen, Story

testinfra_hosts = hosts.urls()[:1]

RESULTS = hosts.ROOT / "benchmarks" / "releases.json"
ROUNDS = 2
GOOD = {"v1", "v2", "v3", "v4"}  # variants that differ in nothing but their version
# What every worker does by itself: start the interpreter and import the application.
IMPORT = (
    "cd /srv/uwsgi-%s/current/app && set -a && . /etc/uwsgi-%s/environment &&"
    " runuser -u uwsgi-%s -- ../venv/bin/python -c 'import wsgi'"
)


@dataclass
class Round:
    """One activation or rollback; times are in seconds."""

    host: str
    app: str
    action: str
    took: float
    longest: float
    imports: float


def seconds_of_an_import(app: Deployed) -> float:
    """Return how long an import of the application takes, the median of some."""
    taken = []
    for _ in range(ROUNDS):
        ran = command(app, IMPORT.replace("%s", app.name))
        assert ran.code == 0, ran.errors
        taken.append(ran.seconds)
    return statistics.median(taken)


def good(seen: Seen) -> bool:
    """Whether a step did what it should and every answer was right."""
    return seen.ran.code == 0 and seen.traffic.ok


def switch(app: Deployed, action: str, release: str) -> Ran:
    return command(app, "%s %s %s %s --json", PROGRAM, action, app.name, release)


def other_release(app: Deployed) -> str:
    """Return the id of a good release that is not the current one."""
    current, found = look(app).current, versions(app)
    return next(found[name] for name in GOOD if name in found and found[name] != current)


def measured(app: Deployed, other: str) -> list[Round]:
    """Roll an application back and forth between two releases under traffic that leaves it room."""
    here, one = look(app).current, seconds_of_an_import(app)
    with Story([app], connections=16, think=1.0) as story:
        for number in range(ROUNDS):
            for action, target in (("activate", other), ("rollback", here)):
                story.step(f"{action} {number}", partial(switch, action=action, release=target), after=2)
    bad = [f"{seen.step}: {seen.ran.said} {seen.traffic.summary()}" for seen in story.steps if not good(seen)]
    assert bad == []
    return [
        Round(
            *Story.key(app),
            seen.step.partition(" ")[0],
            float(seen.ran.answer["seconds"]),
            seen.traffic.longest_ms / 1000,
            len(seen.after.workers) * one,
        )
        for seen in story.steps
    ]


@pytest.fixture(scope="module")
def rounds() -> list[Round]:
    applications = [
        Deployed(testinfra.get_host(f"ssh://{name}", ssh_config=str(hosts.ssh_config()), sudo=True), app)
        for name in hosts.names()
        for app in ("single", "double")
    ]
    if any(len(GOOD & versions(app).keys()) < 2 for app in applications):
        assert Play(variant="v2")(applications[0]).code == 0
    return [found for app in applications for found in measured(app, other_release(app))]


def row(rounds: list[Round], host: str, app: str, action: str) -> dict[str, Any]:
    mine = [found for found in rounds if (found.host, found.app, found.action) == (host, app, action)]
    return {
        "host": host,
        "app": app,
        "action": action,
        "rounds": len(mine),
        "seconds": [round(found.took, 1) for found in mine],
        "imports": round(mine[0].imports, 1),
        "beyond_imports": round(statistics.median(found.took - found.imports for found in mine), 1),
        "longest_ms": [round(found.longest * 1000) for found in mine],
    }


def test_record(rounds: list[Round]) -> None:
    kinds = list(dict.fromkeys((found.host, found.app, found.action) for found in rounds))
    rows = [row(rounds, *kind) for kind in kinds]
    record = {"date": time.strftime("%Y-%m-%d"), "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    for found in rows:
        print(found)
    assert len(rows) == 8
