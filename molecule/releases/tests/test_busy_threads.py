"""Workers whose threads compute all the time are replaced without losing a request.

In uWSGI before 2.0.25 that needs uwsgi_sqlalchemy_threads.py.
"""

from __future__ import annotations

import pytest
from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Report, Traffic
from testkit.releases import command, program

OLD = "debian12"


@pytest.fixture
def busy(applications: list[Deployed]) -> Deployed:
    return next(app for app in applications if (app.host.backend.hostname, app.name) == (OLD, "double"))


def reloaded(app: Deployed, times: int) -> Report:
    """Reload under such traffic and return what it saw."""
    url = f"http://{hosts.address(OLD)}"
    with Traffic(url, connections=16, path="/busy/{value}", host_header=f"{app.name}.test", timeout=40) as traffic:
        for _ in range(times):
            done = program(app, "reload")
            assert done.code == 0, done.said
    return traffic.report()


def edit(app: Deployed, expression: str) -> None:
    """Change the live configuration behind the program's back, and start with it."""
    done = command(app, f"sed -i '{expression}' /etc/{app.unit}/uwsgi.ini && systemctl restart {app.unit}.service")
    assert done.code == 0, done.errors


def test_no_request_of_a_busy_thread_is_lost(busy: Deployed) -> None:
    began = busy.host.check_output("date +%s")
    report = reloaded(busy, 2)
    assert report.ok, report.summary()
    assert len(report.pids) >= 8
    # Nobody had to be killed.
    assert "NO MERCY" not in busy.host.check_output("journalctl -u %s.service --since=@%s", busy.unit, began)


def test_without_it_requests_would_hang_until_their_worker_is_killed(busy: Deployed) -> None:
    edit(busy, "s/^import = uwsgi_sqlalchemy_threads/#&/")
    try:
        # Whether a worker's main thread computes when the signal comes is chance, for each of four workers.
        reports = (reloaded(busy, 1) for _ in range(6))
        report = next((report for report in reports if report.bad), None)
    finally:
        edit(busy, "s/^#import = uwsgi_sqlalchemy_threads/import = uwsgi_sqlalchemy_threads/")
    assert report is not None, "six times nobody hung"
    assert report.longest_ms > 10_000, report.summary()


testinfra_hosts = hosts.urls()[:1]
