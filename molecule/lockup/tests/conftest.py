"""Trials of the application with each driver in each mode, made once and recorded."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.host import Host
from testkit import hosts
from testkit.apps import Deployed
from testkit.lab import Trial, ask, everywhere, guarded, held_sockets, plain, server_sessions, stack
from testkit.playbook import play

SAFE = {"count": 10_000, "connections": 64}
PLAIN = {"count": 200, "connections": 16, "timeout": 5}


def connect(name: str) -> Host:
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(hosts.ssh_config()), sudo=True)


@dataclass
class Laboratory:
    """The application on both hosts, the database, and the trials made so far."""

    apps: list[Deployed]
    database: Host
    trials: dict[tuple[str, str, str], Trial] = field(default_factory=dict)  # by case, mode and host

    def deploy(self, **variables: Any) -> str:
        """Play the role with these variables and return what it said; raises AssertionError when it fails."""
        played = play(limit="web", **variables)
        assert played.status == 0, played.output[-4000:]
        return played.output

    def refused(self, **variables: Any) -> str:
        """Play the role and return what it said when it failed; raises AssertionError when it did not."""
        played = play(limit="web", **variables)
        assert played.status != 0
        return played.output

    def trial(self, case: str, mode: str, *, mysql: bool = False, **load: Any) -> None:
        """Have many requests answered on both hosts, and look at the sessions that answered."""

        def one(app: Deployed) -> Trial:
            report = ask(app, **load)
            trial = Trial(str(app.host.backend.hostname), mode, report)
            if mode == "plain":
                trial.stack = stack(app) if report.counts["hung"] else []
                trial.shared = max(map(len, held_sockets(app).values()), default=0)
                return trial
            trial.master = int(app.show("service", "MainPID"))
            known, sockets = server_sessions(self.database, mysql), held_sockets(app)
            answered = set().union(*report.sessions.values())
            trial.owners = {session: sockets.get(known.get(session, 0), set()) for session in answered}
            trial.recycled = len(report.pids) - len(app.pids())
            return trial

        for trial in everywhere(self.apps, one):
            self.trials[case, mode, trial.host] = trial

    def try_all(self, case: str, *, safe: dict[str, Any] = SAFE, **variables: Any) -> None:
        """Try a case in all three modes."""
        mysql = str(variables.get("driver", "")).startswith("mysql")
        self.deploy(mode="prefork", **variables)
        everywhere(self.apps, plain)
        self.trial(case, "plain", **PLAIN)
        everywhere(self.apps, guarded)
        self.trial(case, "prefork", mysql=mysql, **safe)
        self.deploy(mode="lazy", **variables)
        self.trial(case, "lazy", mysql=mysql, **safe)

    def record(self) -> None:
        """Write the trials to where the test reports go."""
        folder = Path(os.environ.get("TEST_REPORTS") or hosts.ROOT / ".run" / "reports" / "lockup")
        platforms = {
            str(app.host.backend.hostname): app.host.check_output(
                "{ . /etc/os-release; echo $PRETTY_NAME; uwsgi --version; python3 --version; }"
            ).splitlines()
            for app in self.apps
        }
        trials = [{"case": case, **trial.to_dict()} for (case, _, _), trial in self.trials.items()]
        record = {"date": time.strftime("%Y-%m-%d"), "platforms": platforms, "trials": trials}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lockup.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@pytest.fixture(scope="session")
def laboratory() -> Iterator[Laboratory]:
    found = Laboratory([Deployed(connect(name), "lab") for name in hosts.names("web")], connect("database"))
    try:
        yield found
    finally:
        found.record()
