from __future__ import annotations

import asyncio

from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Client, Traffic


def test_2000_concurrent_requests_get_their_own_answers_from_every_worker(shelf: Deployed) -> None:
    url = f"http://{hosts.address(shelf.host.backend.hostname)}"
    report = asyncio.run(Client(url, connections=64, timeout=10, limit=120).run(2000))
    print(report.summary())
    assert report.counts == {"right": 2000, "wrong": 0, "error": 0, "hung": 0, "cut": 0}, report.summary()
    assert set(report.pids) == shelf.pids()
    assert sorted(report.workers) == [1, 2, 3, 4]
    assert report.shared_sessions == set()
    assert set(report.releases) == {shelf.release()}


def test_restart_under_traffic_loses_no_request(shelf: Deployed) -> None:
    before = shelf.pids()
    with Traffic(
        f"http://{hosts.address(shelf.host.backend.hostname)}", connections=16, timeout=30, limit=120
    ) as traffic:
        shelf.host.check_output("sleep 1; systemctl restart uwsgi-shelf.service; sleep 1")
    report = traffic.report()
    print(report.summary())
    assert report.ok, report.summary()
    assert before.isdisjoint(shelf.pids())
    assert set(report.pids) & before
    assert set(report.pids) & shelf.pids()


def test_without_its_socket_unit_a_restart_would_lose_requests(annex: Deployed) -> None:
    """The same traffic notices a service that is away: the proof above can fail."""
    url = f"http://{hosts.address(annex.host.backend.hostname)}"
    with Traffic(url, connections=16, timeout=30, limit=120, host_header="annex.test") as traffic:
        annex.host.check_output("sleep 1; systemctl stop uwsgi-annex.socket uwsgi-annex.service; sleep 1")
        annex.host.check_output("systemctl start uwsgi-annex.socket uwsgi-annex.service")
    report = traffic.report()
    assert report.counts["error"] > 0
    assert report.first_bad is not None
    assert "502" in report.first_bad.text
