"""Plain preforking fails within 200 requests; lazy workers and guarded preforking answer 10,000 of 10,000 rightly.

Half of the 10,000 go to each host, over 64 connections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host
from testkit import hosts
from testkit.lab import SAFE, Laboratory, Trial

testinfra_hosts = hosts.urls("web")

# The engine as most applications have it: pool_pre_ping would hide some of the damage.
BARE = {"settings": {"PRE_PING": "no"}}
FEWER = {"count": 1500, "connections": 64}
CASES: dict[str, dict[str, Any]] = {
    "psycopg over TLS": {"driver": "postgresql+psycopg", "url_query": "?sslmode=require", **BARE},
    "psycopg2": {"driver": "postgresql+psycopg2", **BARE},
    "PyMySQL": {"driver": "mysql+pymysql", **BARE},
    "psycopg, asyncio": {"driver": "postgresql+psycopg_async", **BARE},
    # Nothing tells these that a reply is somebody else's: no encryption, and one statement for each request. By itself
    # libpq encrypts where the server can, as MariaDB's drivers do, and records in the wrong hands are noticed.
    "psycopg2 without TLS": {
        "driver": "postgresql+psycopg2",
        "url_query": "?sslmode=disable",
        "settings": {"PRE_PING": "no", "AUTOCOMMIT": "yes"},
        "safe": FEWER,
    },
    "psycopg, 4 threads, recycled": {
        "driver": "postgresql+psycopg",
        "threads": 4,
        "max_requests": 200,
        **BARE,
        "safe": FEWER,
        # By default uWSGI lets a worker live for a minute, whatever max-requests says.
        "options": [{"min-worker-lifetime": 1}],
    },
}
SAFE_MODES = ("prefork", "lazy")


@pytest.fixture
def tried(laboratory: Laboratory, host: Host) -> Callable[[str, str], Trial]:
    """Return what gives a case's trial in a mode on this host, made when it is first asked for."""

    def tried(case: str, mode: str) -> Trial:
        key = (case, mode, str(host.backend.hostname))
        if key not in laboratory.trials:
            laboratory.try_all(case, **CASES[case])
        return laboratory.trials[key]

    return tried


@pytest.mark.parametrize("case", CASES)
def test_plain_preforking_fails(case: str, tried: Callable[[str, str], Trial]) -> None:
    report = tried(case, "plain").report
    assert report.bad, report.summary()


@pytest.mark.parametrize("mode", SAFE_MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_right(case: str, mode: str, tried: Callable[[str, str], Trial]) -> None:
    report = tried(case, mode).report
    assert report.ok, report.summary()
    assert report.counts["right"] == CASES[case].get("safe", SAFE)["count"]
    assert len(report.pids) >= 4
    assert report.shared_sessions == set()


@pytest.mark.parametrize("mode", SAFE_MODES)
@pytest.mark.parametrize("case", [case for case in CASES if "recycled" not in case])
def test_each_session_belongs_to_the_one_worker_that_answers_from_it(
    case: str, mode: str, tried: Callable[[str, str], Trial]
) -> None:
    """As the database server and the kernel see it."""
    trial = tried(case, mode)
    asked_from = {session: pid for pid, sessions in trial.report.sessions.items() for session in sessions}
    assert len(trial.owners) >= 4
    assert trial.owners == {session: {pid} for session, pid in asked_from.items()}
    assert trial.master not in set().union(*trial.owners.values())


def test_with_plain_preforking_one_socket_is_in_all_hands(tried: Callable[[str, str], Trial]) -> None:
    assert tried("psycopg2", "plain").shared >= 5, "the master and four workers"


def test_without_tls_answers_are_wrong(tried: Callable[[str, str], Trial]) -> None:
    report = tried("psycopg2 without TLS", "plain").report
    assert report.counts["wrong"], report.summary()


def test_workers_were_recycled(tried: Callable[[str, str], Trial]) -> None:
    for mode in SAFE_MODES:
        assert tried("psycopg, 4 threads, recycled", mode).recycled >= 4
