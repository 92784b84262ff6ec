"""The same application with python-oracledb thin and thick and with cx_Oracle, on a protocol double of a database."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Client, Report
from testkit.lab import stack
from testkit.oracle import DRIVERS

testinfra_hosts = hosts.urls("web")
Database = Callable[[str], str]
LISTENERS = "seerdb@tcp seerdb@tcps"

# The engine as in 2013, without pool_pre_ping, which would hide some of the damage; made by hand on the host.
INI = "/etc/uwsgi-lab/uwsgi.ini"
KEEP = f"cp --preserve {INI} {INI}.kept"
BARE = f"{{ cat {INI}.kept; echo 'env = PRE_PING=no'; }} > {INI}"
BACK = f"mv {INI}.kept {INI}"
# What most people run: the master imports the application, connects, and forks its workers.
PREFORK = f"sed -i '/^lazy-apps = /d; s/^hook-post-fork = chdir/hook-pre-app = chdir/' {INI}"
# Workers that hang would hold a stop up.
START_OVER = "systemctl kill --signal=KILL uwsgi-lab.service; systemctl restart uwsgi-lab.service"
SOON = 10  # the request by which a service that shares a connection has gone wrong


def ask(url: str, path: str) -> tuple[int, dict[str, Any], float]:
    """Return a page's status, its JSON and the seconds that it took."""
    began = time.monotonic()
    try:
        with urllib.request.urlopen(f"{url}/{path}", timeout=30) as answer:  # noqa: S310 (the test host)
            return answer.status, json.load(answer), time.monotonic() - began
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), time.monotonic() - began


def traffic(url: str, count: int, connections: int, timeout: float) -> Report:
    return asyncio.run(Client(url, connections=connections, timeout=timeout, limit=240).run(count))


def test_the_service_works_with_this_driver(app: Deployed, driver: str, url: str) -> None:
    status, answer, _ = ask(url, "driver/x")
    assert (status, answer["driver"]) == (200, DRIVERS[driver]["driver"].removeprefix("oracle+"))
    mapped = app.host.run("grep -h /libclntsh.so /proc/%s/maps", str(min(app.pids()))).stdout
    if DRIVERS[driver]["client"]:
        major, minor, *_ = answer["client"].split(".")
        assert f"/opt/oracle/instantclient_{major}_{minor}-" in mapped
    else:
        assert answer["client"] == mapped == ""


def test_a_row_is_inserted_with_a_key_of_the_databases(app: Deployed, driver: str, url: str) -> None:
    first, second = ask(url, "insert/one"), ask(url, "insert/two")
    assert [(status, answer["value"]) for status, answer, _ in (first, second)] == [(200, "one"), (200, "two")]
    assert second[1]["id"] > first[1]["id"] > 0


def test_a_transaction_is_rolled_back(app: Deployed, driver: str, url: str) -> None:
    status, answer, _ = ask(url, f"rolled-back/{time.time_ns()}")
    assert (status, answer["within"], answer["after"]) == (200, 1, 0)


def test_errors_of_the_database_are_answered_at_once_and_logged(app: Deployed, driver: str, url: str) -> None:
    for what, code in {"missing": "ORA-00942", "wrong-password": "ORA-01017"}.items():
        status, answer, seconds = ask(url, f"{what}/x")
        assert (status, answer["error"].partition(":")[0]) == (500, code)
        assert seconds < 10
        assert f"{what}: {code}" in app.host.check_output("journalctl --unit uwsgi-lab --lines 20 --output cat")
    assert ask(url, "echo/x")[0] == 200


def test_without_a_listener_requests_fail_at_once_and_with_it_again_they_do_not(
    app: Deployed, driver: str, url: str, database: Database
) -> None:
    before = app.pids()
    database(f"systemctl stop {LISTENERS}")
    try:
        status, answer, seconds = ask(url, "echo/x")
    finally:
        database(f"systemctl start {LISTENERS}")
    assert status == 500 and seconds < 20
    print(driver, answer["error"])
    assert any(code in answer["error"] for code in ("DPY-6005", "ORA-12541", "DPY-4011", "ORA-03113", "ORA-03114"))
    database("sh -c 'until ss -ltn | grep -q :1521 && ss -ltn | grep -q :2484; do sleep 0.2; done'")
    assert [ask(url, f"echo/{number}")[0] for number in range(12)] == [200] * 12
    assert app.pids() == before, "nobody had to be restarted"


def test_every_request_gets_its_own_answer(app: Deployed, driver: str, url: str) -> None:
    """5,000 requests over both hosts."""
    report = traffic(url, 2500, connections=32, timeout=30)
    print(driver, report.summary())
    assert report.counts == {"right": 2500, "wrong": 0, "error": 0, "hung": 0, "cut": 0}, report.summary()
    assert set(report.pids) == app.pids() and len(report.pids) == 4
    assert report.shared_sessions == set() and all(report.sessions.values())


def test_preforking_breaks_within_ten_requests(app: Deployed, driver: str, url: str) -> None:
    """Where the master has connected, its workers share that; and the same traffic notices."""
    app.host.check_output(KEEP)
    try:
        app.host.check_output(f"{BARE} && {PREFORK}")
        app.host.run(START_OVER)
        report = traffic(url, 100, connections=16, timeout=5)
        hung = report.counts["hung"]
        waits = stack(app) if hung else []
        app.host.check_output(BARE)
        app.host.run(START_OVER)
        again = traffic(url, 100, connections=16, timeout=30)
    finally:
        app.host.check_output(BACK)
        app.host.run(START_OVER)
    bad = report.first_bad
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "host": app.host.backend.hostname,
        "driver": driver,
        "first_bad": bad and bad.ordinal + 1,
        "first_bad_text": bad.text if bad else "",
        "plain": report.counts,
        "lazy": again.counts,
        "stack": waits,
    }
    folder = hosts.ROOT / ".run" / "reports" / "oracle"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"lockup-{found['host']}-{driver}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    assert bad is not None and bad.ordinal < SOON, report.summary()
    assert waits or not hung, "a worker that hangs shows where"
    assert again.ok, again.summary()
