"""Run a scenario's playbook once more from within its tests, and read what it did."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testkit import hosts


@dataclass
class Played:
    """What a run of ansible-playbook did, read from its output as a person would read it."""

    status: int
    output: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # by host: the recap's ok, changed, failed, …
    changed: dict[str, list[str]] = field(
        default_factory=dict
    )  # by host: the names of the tasks that changed something

    def __post_init__(self) -> None:
        task = ""
        for line in self.output.splitlines():
            if heading := re.match(r"TASK \[(.*)\] \*", line):
                task = heading[1]
            elif (result := re.match(r"changed: \[([^] ]+)", line)) and task not in self.changed.get(result[1], []):
                self.changed.setdefault(result[1], []).append(task)
            elif recap := re.match(r"(\S+) +: (ok=.*)", line):
                self.counts[recap[1]] = {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", recap[2])}


def play(*arguments: str, limit: str = "all", **variables: Any) -> Played:
    """Run the scenario's converge.yml with the given extra variables and ansible-playbook arguments.

    `limit` names the hosts, as ansible-playbook's --limit does. Returns also a failed run: look at `status`.
    """
    playbook = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]) / "converge.yml"
    command = [
        *("ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], f"--limit={limit}"),
        *("-e", json.dumps(variables), *arguments, str(playbook)),
    ]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_FORCE_COLOR": "0"}
    done = subprocess.run(
        command, cwd=hosts.ROOT, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    return Played(done.returncode, done.stdout + done.stderr)
