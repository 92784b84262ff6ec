"""A request is not lost with the worker that is killed while it has it, unless it must not be repeated."""

from __future__ import annotations

from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Report, Traffic
from testkit.releases import command, look

KILLED = 3


def workers_killed(app: Deployed, method: str = "GET") -> Report:
    """Kill workers one after the other while all of them are busy, and return what the traffic saw."""
    url = f"http://{hosts.address(str(app.host.backend.hostname))}"
    with Traffic(url, connections=16, host_header=f"{app.name}.test", method=method, timeout=30) as traffic:
        for _ in range(KILLED):
            done = command(app, "sleep 1; kill -KILL %s; sleep 2", str(min(look(app).workers)))
            assert done.code == 0, done.errors
    return traffic.report()


def edit(app: Deployed, how: str) -> None:
    """Change the live site behind the program's back, and have Nginx read it."""
    done = command(app, f"cd /etc/nginx/sites-available && site={app.unit}.conf && {how} && systemctl reload nginx")
    assert done.code == 0, done.errors


def test_no_request_is_lost(one: Deployed) -> None:
    report = workers_killed(one)
    assert report.ok, report.summary()
    assert len(report.pids) >= 4 + KILLED - 1, "those that were killed have answered, and others in their place"


def assert_lost(report: Report) -> None:
    """Fail unless requests were lost with their workers."""
    assert report.counts["error"] >= 1, report.summary()
    assert report.first_bad is not None
    assert "502" in report.first_bad.text


def test_a_post_is_not_tried_again(one: Deployed) -> None:
    assert_lost(workers_killed(one, "POST"))


def test_with_the_socket_named_once_requests_are_lost(one: Deployed) -> None:
    edit(one, "sed -i.kept '0,/server unix/{/server unix/d}' $site")
    try:
        report = workers_killed(one)
    finally:
        edit(one, "mv $site.kept $site")
    assert_lost(report)
