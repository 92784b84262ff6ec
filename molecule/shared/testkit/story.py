"""Do one thing after the other to deployed applications under traffic, and record what the traffic saw.

    with Story(applications) as story:
        story.step("deploy v2", lambda app: program(app, "activate", app.name, "1f3a…"))
        story.step("restart", lambda app: command(app, "systemctl restart %s", app.unit))
    assert story.seen("restart", host, app).traffic.ok

A step is done to every application at once and is over when the last of them is done; then the next one begins. What
the traffic of an application saw is counted from the beginning of a step to the beginning of the next one.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Report, Traffic
from testkit.playbook import Played, play
from testkit.releases import Ran, State, look

Result = TypeVar("Result")
SETTLE = 0.4  # seconds


class Play:
    """An action that runs the scenario's playbook, once for all hosts and applications, with variables of its own."""

    def __init__(self, **variables: Any) -> None:
        self.variables = variables
        self.lock = threading.Lock()
        self.played: Played | None = None

    def __call__(self, app: Deployed) -> Ran:
        """Wait for the run that the first caller begins; its output is what it did on the application's host."""
        began = time.monotonic()
        with self.lock:
            played = self.played = self.played or play(**self.variables)
        counts = played.counts.get(str(app.host.backend.hostname), {})
        said = ", ".join(f"{key}={counts[key]}" for key in ("ok", "changed", "failed") if key in counts)
        return Ran(played.status, said, "", time.monotonic() - began)


@dataclass
class Seen:
    """One step of one application."""

    step: str
    host: str
    app: str
    began: float  # seconds from the beginning of the story
    ran: Ran
    before: State
    after: State
    traffic: Report = field(init=False)  # there when the story is over

    @property
    def right_again(self) -> float:
        """Return the seconds from the beginning of the step until the application served rightly again.

        That is after its last bad request, and when the first of the processes that the step brought about answered.
        """
        ends = [(record, record.start + record.duration - self.began) for record in self.traffic.records]
        new = self.after.workers.keys() - self.before.workers.keys()
        first = min((end for record, end in ends if record.kind == "right" and record.pid in new), default=0.0)
        return max([first, *(end for record, end in ends if record.kind != "right")])

    @property
    def noted(self) -> bool:
        """Whether the step added to the journal."""
        return self.after.entries > self.before.entries

    def to_dict(self) -> dict[str, Any]:
        """Return the step as it is recorded."""
        traffic = self.traffic
        bad = {kind: number for kind, number in traffic.counts.items() if kind not in {"right", "wrong"} and number}
        return {
            "step": self.step,
            "host": self.host,
            "app": self.app,
            "requests": traffic.sent,
            "failed": sum(bad.values()),
            "wrong": traffic.counts["wrong"],
            "longest_ms": round(traffic.longest_ms, 1),
            "p99_ms": round(traffic.p99_ms, 1),
            "right_again_s": round(self.right_again, 2),
            "first_bad": traffic.first_bad.text if traffic.first_bad else "",
            "mixed_pids": sorted(traffic.mixed_pids),
            "releases": traffic.releases,
            "seconds": round(self.ran.seconds, 2),
            "code": self.ran.code,
            "said": self.ran.said,
            "journal": self.after.journal if self.noted else {},
            "current": self.after.current,
            "workers": sorted(self.after.workers.values()),
            "same_workers": self.after.workers == self.before.workers,
        }


class Story:
    """Steps done to applications under traffic; `connections` of it each, through the hosts' Nginx, by server name.

    `think` is the seconds that a connection waits between an answer and its next request, `path` what it asks for.
    """

    def __init__(
        self,
        applications: Sequence[Deployed],
        *,
        connections: int = 16,
        think: float = 0.4,
        path: str = "/echo/{value}",
        limit: float = 1800.0,
    ) -> None:
        self.applications = applications
        self.steps: list[Seen] = []
        self.traffic = {
            self.key(app): Traffic(
                f"http://{hosts.address(app.host.backend.hostname)}",
                connections=connections,
                think=think,
                timeout=30,
                limit=limit,
                path=path,
                host_header=f"{app.name}.test",
            )
            for app in applications
        }

    @staticmethod
    def key(app: Deployed) -> tuple[str, str]:
        """Return the names of an application's host and of itself."""
        return str(app.host.backend.hostname), app.name

    def __enter__(self) -> Self:
        for traffic in self.traffic.values():
            traffic.start()
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        for traffic in self.traffic.values():
            traffic.stop()
        reports = {key: traffic.report() for key, traffic in self.traffic.items()}
        for seen in self.steps:
            seen.traffic = reports[seen.host, seen.app].phase(seen.step)

    def everywhere(self, action: Callable[[Deployed], Result]) -> list[Result]:
        """Do something for all applications at once and return the results in their order; raises what it raises."""
        with ThreadPoolExecutor(len(self.applications)) as pool:
            return list(pool.map(action, self.applications))

    def step(
        self,
        name: str,
        action: Callable[[Deployed], Ran],
        *,
        to: Sequence[Deployed] = (),
        after: float = 0.5,
        one_by_one: bool = False,
    ) -> list[Seen]:
        """Do a step to all applications, or to some, and wait for `after` seconds of traffic under what it brought.

        `one_by_one` keeps them from taking each other's processor time where a moment is measured. Raises ValueError
        for a name that was used already.
        """
        if any(seen.step == name for seen in self.steps):
            raise ValueError(f"there was a step {name!r} already")

        def one(app: Deployed) -> Seen:
            before = look(app)
            traffic = self.traffic[self.key(app)]
            began = traffic.mark(name)
            # What was sent before belongs to the step before, and is to be answered before this one can harm it.
            time.sleep(SETTLE)
            ran = action(app)
            return Seen(name, *self.key(app), began, ran, before, look(app))

        began = time.monotonic()
        chosen = to or self.applications
        with ThreadPoolExecutor(1 if one_by_one else len(chosen)) as pool:
            done = list(pool.map(one, chosen))
        time.sleep(after)
        self.steps += done
        codes = " ".join(str(seen.ran.code) for seen in done)
        print(f"{began - self.began:6.1f} s  {name}: {codes} in {time.monotonic() - began:.1f} s", file=sys.stderr)
        return done

    def seen(self, step: str, host: str, app: str) -> Seen:
        """Return what a step was for one application; raises KeyError if there was none of that name."""
        for seen in self.steps:
            if (seen.step, seen.host, seen.app) == (step, host, app):
                return seen
        raise KeyError(
            f"no step {step!r} of {app} on {host}; there were: {', '.join(seen.step for seen in self.steps)}"
        )

    def save(self, path: Path, **more: Any) -> None:
        """Write all steps to a JSON file, with what else is to be known of them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        connections = max(traffic.connections for traffic in self.traffic.values())
        record = {**more, "connections": connections, "steps": [seen.to_dict() for seen in self.steps]}
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
