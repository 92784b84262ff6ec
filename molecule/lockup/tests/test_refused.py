"""What the guard cannot make safe is refused for preforking, serves with lazy workers, and hangs without either."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from testinfra.host import Host
from testkit import hosts
from testkit.lab import Laboratory, Load, Trial, everywhere, plain
from testkit.releases import State, look, program

testinfra_hosts = hosts.urls("web")

HANGS: Load = {"count": 40, "connections": 16, "timeout": 4}
RIGHT: Load = {"count": 500, "connections": 16}


@dataclass
class Refused:
    """What became of one such application."""

    said: str
    before: dict[str, State]
    after: dict[str, State]
    trials: dict[tuple[str, str], Trial] = field(default_factory=dict)


# What the import does, and what the refusal has to name: kind, thing, and the line's own text.
REFUSALS = {
    "thread": ("thread (refused): the thread jobs", 'name="jobs"'),
    "lock": ("thread (refused): the thread holder", 'name="holder"'),
    "checked-out": ("connection checked out (refused)", "kept = database.engine.connect()"),
}


@pytest.fixture(scope="module")
def refused(laboratory: Laboratory) -> dict[str, Refused]:
    found = {}
    laboratory.deploy(mode="lazy", at_import="nothing")
    for at_import in REFUSALS:
        before = {str(app.host.backend.hostname): look(app) for app in laboratory.apps}
        said = laboratory.refused(mode="prefork", at_import=at_import)
        after = {str(app.host.backend.hostname): look(app) for app in laboratory.apps}
        found[at_import] = Refused(said, before, after)
        if at_import != "checked-out":
            everywhere(laboratory.apps, plain)
            laboratory.trial(f"{at_import} at import", "plain", HANGS)
        laboratory.deploy(mode="lazy", at_import=at_import)
        laboratory.trial(f"{at_import} at import", "lazy", RIGHT)
    return found


def line_of(text: str) -> int:
    """Return the number of the application's line that has this text."""
    source = (hosts.ROOT / "molecule" / "lockup" / "app" / "wsgi.py").read_text().splitlines()
    return next(number for number, line in enumerate(source, 1) if text in line)


@pytest.mark.parametrize("at_import", REFUSALS)
def test_it_is_refused_with_its_line_and_nothing_changes(
    at_import: str, refused: dict[str, Refused], host: Host
) -> None:
    thing, text = REFUSALS[at_import]
    it = refused[at_import]
    said = " ".join(it.said.split())
    assert "is not fit for uwsgi_sqlalchemy_fork_mode prefork; it was not activated" in said
    assert thing in said
    assert f"wsgi.py:{line_of(text)} (wsgi)" in said
    name = str(host.backend.hostname)
    assert it.after[name].workers == it.before[name].workers


@pytest.mark.parametrize("at_import", ["thread", "lock"])
def test_without_the_refusal_requests_hang(
    at_import: str, refused: dict[str, Refused], laboratory: Laboratory, host: Host
) -> None:
    trial = laboratory.trials[f"{at_import} at import", "plain", str(host.backend.hostname)]
    assert trial.report.counts["hung"] > 0, trial.report.summary()
    assert trial.stack


@pytest.mark.parametrize("at_import", REFUSALS)
def test_lazy_workers_serve_it(at_import: str, refused: dict[str, Refused], laboratory: Laboratory, host: Host) -> None:
    trial = laboratory.trials[f"{at_import} at import", "lazy", str(host.backend.hostname)]
    assert trial.report.ok, trial.report.summary()


def test_the_audit_tells_a_lazy_application_too(refused: dict[str, Refused], laboratory: Laboratory) -> None:
    for app in laboratory.apps:
        findings = program(app, "audit")
        assert findings.code == 0, findings.said
        assert "connection checked out" in findings.output
