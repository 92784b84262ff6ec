"""The database is restarted, paused, and its connections killed: the application is right again without a restart."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import product

import pytest
from testinfra.host import Host
from testkit import hosts
from testkit.client import Report, Traffic
from testkit.lab import Laboratory, ask, everywhere

testinfra_hosts = hosts.urls("web")

RETURN = 5.0  # seconds after the database's return
MODES = ("lazy", "prefork")
DRIVERS = {"postgresql+psycopg": "postgresql@17-main", "mysql+pymysql": "mariadb"}
EVENTS = ("restarted", "paused", "connections killed")

KILL = {
    "postgresql+psycopg": 'runuser -u postgres -- psql -c "select pg_terminate_backend(pid) from pg_stat_activity'
    " where datname = 'lab' and client_port is not null\"",
    "mysql+pymysql": "mariadb -N -e \"select concat('kill ', id, ';') from information_schema.processlist"
    " where user = 'lab'\" | mariadb --force",
}


@dataclass
class Away:
    """What the traffic saw of one event, and the workers before and after it."""

    report: Report
    back: float  # seconds from the beginning of the run until the database was there again
    same_workers: bool


def happen(database: Host, driver: str, event: str) -> None:
    """Do it to the database, and return when it is there again."""
    unit = DRIVERS[driver]
    if event == "restarted":
        database.check_output("systemctl restart %s", unit)
    elif event == "paused":
        database.check_output(f"systemctl kill --signal=STOP {unit}; sleep 4; systemctl kill --signal=CONT {unit}")
    else:
        database.run(KILL[driver])


def watched(laboratory: Laboratory, driver: str, event: str) -> dict[str, Away]:
    """Let an event happen under traffic to both hosts, and return what became of each."""
    before = everywhere(laboratory.apps, lambda app: app.pids())
    names = [str(app.host.backend.hostname) for app in laboratory.apps]
    traffic = [Traffic(f"http://{hosts.address(name)}", connections=8, think=0.02, timeout=15) for name in names]
    for one in traffic:
        one.start()
    time.sleep(2)
    for one in traffic:
        one.mark("away")
    happen(laboratory.database, driver, event)
    back = [one.mark("back") for one in traffic]
    time.sleep(RETURN + 4)
    for one in traffic:
        one.stop()
    after = everywhere(laboratory.apps, lambda app: app.pids())
    return {
        name: Away(one.report(), moment, then == now)
        for name, one, moment, then, now in zip(names, traffic, back, before, after, strict=True)
    }


@pytest.fixture(scope="module")
def away(laboratory: Laboratory) -> dict[tuple[str, str, str], dict[str, Away]]:
    found = {}
    for driver, mode in product(DRIVERS, MODES):
        laboratory.deploy(mode=mode, driver=driver)
        for event in EVENTS:
            found[driver, mode, event] = watched(laboratory, driver, event)
    return found


@pytest.fixture(scope="module")
def idle(laboratory: Laboratory) -> dict[tuple[str, str], Report]:
    """What requests get after the pooled connections were killed while nobody used them, with pool_pre_ping and not."""
    found = {}
    for pre_ping in ("yes", "no"):
        laboratory.deploy(mode="lazy", settings={"PRE_PING": pre_ping})
        everywhere(laboratory.apps, lambda app: ask(app, 100, 8))
        happen(laboratory.database, "postgresql+psycopg", "connections killed")
        for app, report in zip(laboratory.apps, everywhere(laboratory.apps, lambda app: ask(app, 100, 8)), strict=True):
            found[pre_ping, str(app.host.backend.hostname)] = report
    return found


def after(away: Away, seconds: float) -> list[str]:
    """Return what was wrong with the requests that were sent later than that after the database's return."""
    late = [record for record in away.report.records if record.start >= away.back + seconds]
    assert len(late) > 20
    return [f"{record.kind}: {record.text}" for record in late if record.kind != "right"]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_it_is_right_again_without_a_restart(
    driver: str, mode: str, event: str, away: dict[tuple[str, str, str], dict[str, Away]], host: Host
) -> None:
    it = away[driver, mode, event][str(host.backend.hostname)]
    assert after(it, RETURN) == []
    assert it.report.counts["wrong"] == 0
    assert it.same_workers


def test_without_pool_pre_ping_dead_connections_are_handed_out(idle: dict[tuple[str, str], Report], host: Host) -> None:
    name = str(host.backend.hostname)
    assert idle["yes", name].ok, idle["yes", name].summary()
    assert idle["no", name].counts["error"] >= 1, idle["no", name].summary()
