"""Run the tests, show their output as it comes, and close with one line that counts all of them.

    testrun.py all              lint, unit, and every scenario under molecule/
    testrun.py lint | unit
    testrun.py scenario NAME

Each linter counts one; so does each Molecule sequence, beside the test cases that ran in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / ".run" / "reports"

# The two that take longest come first, as two run at a time.
LINTERS: dict[str, Sequence[str]] = {
    "ansible-lint": ("ansible-lint",),
    "mypy": ("mypy",),
    "yamllint": ("yamllint", "--strict", "."),
    "ruff check": ("ruff", "check", "--output-format", "concise"),
    "ruff format": ("ruff", "format", "--check"),
    "nothing of this machine": ("python", "tools/leaks.py"),
}


@dataclass(frozen=True)
class Count:
    """How many tests passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        """Return both counts together."""
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        """Return the closing line."""
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def of_status(status: int) -> Count:
    """Return the count of one program that succeeded (0) or failed."""
    return Count(failed=1) if status else Count(passed=1)


def of_reports(folder: Path) -> Count:
    """Return the count of test cases in a folder's JUnit files; one that fails twice (teardown too) is one."""
    count = Count()
    for report in sorted(folder.glob("*.xml")):
        cases: dict[tuple[str | None, str | None], Count] = {}
        # S314: the file is pytest's own, written a moment ago.
        for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314
            kinds = {child.tag for child in case}
            name = (case.get("classname"), case.get("name"))
            if kinds & {"failure", "error"}:
                cases[name] = Count(failed=1)
            else:
                cases.setdefault(name, Count(skipped=1) if "skipped" in kinds else Count(passed=1))
        count = sum(cases.values(), count)
    return count


def of_tests(name: str, status: int, cases: Count) -> Count:
    """Return the count of a run of pytest or Molecule: its test cases, where it succeeded and ran some.

    Both programs can exit 0 without having run a single test (a wrong directory, a misnamed file): that is a failure.
    So is a status that none of the cases accounts for.
    """
    if cases.passed + cases.failed == 0:
        print(f"testrun: {name} ran no test", file=sys.stderr)
        return cases + Count(failed=1)
    if status and not cases.failed:
        print(f"testrun: {name} ended with status {status}, though none of its tests failed", file=sys.stderr)
        return cases + Count(failed=1)
    return cases


def run(command: Sequence[str], output: IO[str] | None = None, **variables: str) -> int:
    """Run a command of this repository's virtual environment in its root, and return its exit status.

    What it prints goes to `output`, if given.
    """
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    # ANSIBLE_HOME: Ansible's and the linters' state belongs to this checkout.
    environment = {**os.environ, "PATH": path, "ANSIBLE_HOME": str(ROOT / ".run" / "ansible"), **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
    ).returncode


def fresh(name: str) -> Path:
    """Return an empty folder for the reports of one run."""
    folder = REPORTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def heard(command: Sequence[str]) -> tuple[int, str]:
    """Run a command and return its exit status and what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        status = run(command, output)
        output.seek(0)
        return status, output.read()


def lint() -> Count:
    """Run every linter, two at a time, also after one that complains; what each prints is shown when it has ended."""
    count = Count()
    with ThreadPoolExecutor(2) as pool:
        running = {pool.submit(heard, command): name for name, command in LINTERS.items()}
        for done in as_completed(running):
            status, printed = done.result()
            print(f"--- {running[done]}\n{printed}", end="", flush=True)
            count += of_status(status)
    return count


def unit() -> Count:
    """Run the fast tests."""
    folder = fresh("unit")
    # Most of them wait for sockets and processes of their own: two at a time take half as long.
    status = run(("pytest", "--numprocesses=2", f"--junit-xml={folder}/report.xml"))
    return of_tests("pytest tests", status, of_reports(folder))


def waits(name: str) -> bool:
    """Return whether a scenario is not part of `make test` yet: its folder has a file UNFINISHED, which says why."""
    return (ROOT / "molecule" / name / "UNFINISHED").exists()


def left_out(name: str) -> Count:
    """Say why a scenario is not run; it counts as skipped."""
    print((ROOT / "molecule" / name / "UNFINISHED").read_text(encoding="utf-8").strip())
    return Count(skipped=1)


def scenario(name: str) -> Count:
    """Run one Molecule scenario whole."""
    folder = fresh(name)
    # Here one sees how far it is; Molecule would keep that to itself. If it fails, Molecule says why.
    run(("python", "tools/hosts.py", "images"))
    status = run(("tools/molecule", "test", "--scenario-name", name, "--no-command-borders"), TEST_REPORTS=str(folder))
    return of_status(status) + of_tests(f"scenario {name}", 0, of_reports(folder))


def scenarios() -> list[str]:
    """Return the names of all scenarios, default first: it shows the plainest failure."""
    names = {path.parent.name for path in ROOT.glob("molecule/*/molecule.yml")}
    return sorted(names, key=lambda name: (name != "default", name))


def everything(steps: dict[str, Callable[[], Count]]) -> int:
    """Run all steps, then print how long each took and the closing line; return the exit status."""
    total = Count()
    lines = []
    for name, step in steps.items():
        print(f"\n=== {name}", flush=True)
        started = time.monotonic()
        count = step()
        total += count
        lines.append(f"{name:<28} {time.monotonic() - started:6.0f} s   {count}")
    print("\n" + "\n".join(lines) + f"\n{total}", flush=True)
    return 1 if total.failed or not total.passed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("all", "lint", "unit"):
        commands.add_parser(command)
    commands.add_parser("scenario").add_argument("name", choices=scenarios())
    chosen = parser.parse_args(arguments)
    steps: dict[str, Callable[[], Count]] = {}
    if chosen.command in ("all", "lint"):
        steps["lint"] = lint
    if chosen.command in ("all", "unit"):
        steps["unit"] = unit
    if chosen.command == "all":
        steps |= {f"scenario {name}": partial(left_out if waits(name) else scenario, name) for name in scenarios()}
    if chosen.command == "scenario":
        steps[f"scenario {chosen.name}"] = partial(scenario, chosen.name)
    return everything(steps)


if __name__ == "__main__":
    sys.exit(main())
