"""Workers that still import their application when the service is stopped end at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testkit.apps import Deployed
from testkit.releases import command

HOOK = "hook-post-fork = unix_signal:1 _exit"
SOON = 5  # seconds, of the 15 after which uWSGI would kill, and the 45 after which systemd does


@pytest.fixture
def idle(applications: list[Deployed]) -> Iterator[Deployed]:
    """The application with one thread on Debian 13."""
    app = next(app for app in applications if (app.host.backend.hostname, app.name) == ("debian13", "single"))
    yield app
    app.host.run("systemctl kill --signal=KILL %s.service", app.unit)
    app.host.check_output("systemctl start %s.service", app.unit)


def left(app: Deployed) -> int:
    """Start the service, stop it while its workers import the application, and return how many live on soon after.

    The socket may have started others by then: who asks for the health of a starting service waits in it.
    """
    workers = f"pgrep --full '^{app.unit} uWSGI worker'"
    done = command(
        app,
        f"systemctl stop {app.unit} && systemctl start --no-block {app.unit}"
        f" && until [ $({workers} | wc --lines) = 4 ]; do sleep 0.05; done; importing=$({workers})"
        f" && sleep 0.2 && systemctl stop --no-block {app.unit} && sleep {SOON}"
        " && for pid in $importing; do [ ! -e /proc/$pid ] || echo $pid; done",
    )
    assert done.code == 0, done.errors
    return len(done.output.split())


def test_they_end_at_once(idle: Deployed) -> None:
    assert left(idle) == 0


def test_by_themselves_they_would_go_on(idle: Deployed) -> None:
    ini = f"/etc/{idle.unit}/uwsgi.ini"
    idle.host.check_output("sed -i.kept %s %s", f"/^{HOOK}/d", ini)
    try:
        assert left(idle) == 4
    finally:
        idle.host.check_output("mv %s.kept %s", ini, ini)
