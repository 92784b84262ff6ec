"""A service that is stopped while its workers still import the application stops at once, and kills nobody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testkit.apps import Deployed
from testkit.releases import command

HOOK = "hook-post-fork = unix_signal:1 _exit"


@pytest.fixture
def idle(applications: list[Deployed]) -> Iterator[Deployed]:
    """The application with one thread on Debian 13."""
    app = next(app for app in applications if (app.host.backend.hostname, app.name) == ("debian13", "single"))
    yield app
    app.host.check_output("systemctl start %s.service", app.unit)


def killed(app: Deployed) -> int:
    """Start the service, stop it while its workers import the application, and return how many had to be killed."""
    began = app.host.check_output("date +%s")
    done = command(
        app,
        "systemctl stop %s && systemctl start --no-block %s"
        " && until [ $(pgrep --count --full '^%s uWSGI worker') = 4 ]; do sleep 0.05; done"
        " && sleep 0.2 && systemctl stop %s",
        *[app.unit] * 4,
    )
    assert done.code == 0, done.errors
    journal: str = app.host.check_output("journalctl -u %s.service --since=@%s", app.unit, began)
    return journal.count("NO MERCY")


def test_nobody_has_to_be_killed(idle: Deployed) -> None:
    assert killed(idle) == 0


def test_uwsgi_by_itself_would_kill_its_workers_when_the_mercy_is_over(idle: Deployed) -> None:
    ini = f"/etc/{idle.unit}/uwsgi.ini"
    idle.host.check_output("sed -i.kept %s %s", f"/^{HOOK}/d", ini)
    try:
        assert killed(idle) == 4
    finally:
        idle.host.check_output("mv %s.kept %s", ini, ini)
