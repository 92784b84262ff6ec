"""Write the tables and figures of docs/lockup.md from what was recorded.

`make scenario-lockup` leaves its trials in .run/reports/lockup/lockup.json, `make scenario-oracle` those with Oracle's
drivers in .run/reports/oracle; the newest are kept in benchmarks/lockup-trials.json and lockup-oracle.json.
`make bench-lockup` leaves benchmarks/lockup.json. What stands in docs/lockup.md between a pair of markers is replaced;
everything else there is written by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
FRESH = ROOT / ".run" / "reports" / "lockup" / "lockup.json"
TRIALS = ROOT / "benchmarks" / "lockup-trials.json"
FRESH_ORACLE = ROOT / ".run" / "reports" / "oracle"
ORACLE = ROOT / "benchmarks" / "lockup-oracle.json"
MEMORY = ROOT / "benchmarks" / "lockup.json"
DOCS = ROOT / "docs"
NAMES = {"plain": "plain preforking", "prefork": "guarded preforking", "lazy": "lazy workers"}
ORACLE_DRIVERS = {
    "cx_oracle": "cx_Oracle 8.3.0, Instant Client 19.3",
    "thick": "python-oracledb thick, Instant Client 19.3",
    "thin": "python-oracledb thin",
}
COLOURS = {"plain": "#c0392b", "prefork": "#2471a3", "lazy": "#1e8449"}
DRAWN = "psycopg2 without TLS"  # the case of the figure of requests
SECONDS = 4  # of the figure of requests
WIDEST = 90  # characters of an error in a table


def shortened(text: str) -> str:
    """Return the beginning of a text, fit for a cell of a table."""
    said = re.sub(r'.*"error": "', "", text)  # an application's answer in JSON
    line = " ".join(re.sub(r"<[^>]*>", " ", said).split()).replace("|", "\\|").rstrip('"}\\')
    return line if len(line) <= WIDEST else line[:WIDEST].rsplit(" ", 1)[0] + " …"


def outcome(counts: dict[str, int]) -> str:
    """Return how the requests of a trial ended."""
    if counts["right"] == sum(counts.values()):
        return f"{counts['right']} of {counts['right']} right"
    return ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)


def first_bad(trial: dict[str, Any]) -> str:
    """Return the number of the first request that went wrong, with what it said."""
    return f"; request {trial['first_bad']} first: {shortened(trial['first_bad_text'])}" if trial["first_bad"] else ""


def trials_table(record: dict[str, Any]) -> str:
    """Return the table of all trials: a line for each case and mode, a column for each host."""
    hosts = list(record["platforms"])
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for trial in record["trials"]:
        rows.setdefault((trial["case"], trial["mode"]), {})[trial["host"]] = outcome(trial["counts"]) + first_bad(trial)
    lines = [f"| case | mode | {' | '.join(hosts)} |", "| --- | --- |" + " --- |" * len(hosts)]
    for (case, mode), said in rows.items():
        lines.append(f"| {case} | {NAMES[mode]} | {' | '.join(said.get(host, '') for host in hosts)} |")
    facts = "; ".join(f"{host}: {', '.join(facts)}" for host, facts in record["platforms"].items())
    return "\n".join([f"Recorded on {record['date']}. {facts}.", "", *lines])


def stacks(record: dict[str, Any]) -> str:
    """Return the stack of a hung worker for each case that has one."""
    found: dict[str, dict[str, Any]] = {}
    for trial in record["trials"]:
        if trial["stack"]:
            found.setdefault(trial["case"], trial)
    parts = [
        f"{case}, on {trial['host']}:\n\n```\n" + "\n".join(trial["stack"]) + "\n```" for case, trial in found.items()
    ]
    return "\n\n".join(parts) or "No worker hung in this run."


def oracle_table(trials: list[dict[str, Any]]) -> str:
    """Return the table of the trials with Oracle's drivers, and the stack of a worker that hung with each of them."""
    lines = ["| driver | host | plain preforking | lazy workers |", "| --- | --- | --- | --- |"]
    found: dict[str, str] = {}
    for trial in trials:
        plain = outcome(trial["plain"]) + first_bad(trial)
        lines.append(f"| {ORACLE_DRIVERS[trial['driver']]} | {trial['host']} | {plain} | {outcome(trial['lazy'])} |")
        if trial["stack"]:
            said = f"What a worker that hangs waits for with {ORACLE_DRIVERS[trial['driver']]}, on {trial['host']}:"
            found.setdefault(trial["driver"], "\n".join(["", said, "", "```", *trial["stack"], "```"]))
    dates = sorted({trial["date"] for trial in trials})
    return "\n".join([f"Recorded on {' and '.join(dates)}.", "", *lines, *found.values()])


def memory_table(record: dict[str, Any]) -> str:
    """Return the table of memory and the two ratios."""
    rows = {(row["size"], row["workers"], row["mode"]): row["pss"] for row in record["memory"]}
    lines = [
        "| application | workers | lazy, MiB | guarded preforking, MiB | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for size, workers in sorted({(size, workers) for size, workers, _ in rows}):
        lazy, prefork = rows[size, workers, "lazy"], rows[size, workers, "prefork"]
        kind = f"SQLAlchemy + psycopg + {size} MB" if size else "SQLAlchemy + psycopg"
        lines.append(f"| {kind} | {workers} | {lazy:.0f} | {prefork:.0f} | {prefork / lazy:.2f} |")
    head = f"Recorded on {record['date']} on {', '.join(record['host'])}: the sum of PSS of all processes."
    lazy, prefork = (record["rates"][mode] for mode in ("lazy", "prefork"))
    foot = (
        f"With 8 workers and 50 MB guarded preforking takes {record['memory_ratio']:.0%} of the memory of lazy workers."
        f" Side by side, in {len(lazy)} turns each, it serves {record['throughput_ratio']:.2f} of their requests per"
        f" second: lazy {statistics.median(lazy):.0f} ({min(lazy):.0f} to {max(lazy):.0f}), guarded"
        f" {statistics.median(prefork):.0f} ({min(prefork):.0f} to {max(prefork):.0f})."
    )
    return "\n".join([head, "", *lines, "", foot])


def draw_requests(record: dict[str, Any], path: Path) -> None:
    """Draw right answers against time, in the three modes."""
    last = list(record["platforms"])[-1]
    chosen = [trial for trial in record["trials"] if (trial["case"], trial["host"]) == (DRAWN, last)]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for trial in chosen:
        sums = list(accumulate(trial["timeline"]))
        times = [(number + 1) * trial["slice"] for number in range(len(sums))]
        if times[-1] < SECONDS:  # all of its requests had been sent
            axes.plot(times[-1], sums[-1], "x", color=COLOURS[trial["mode"]])
        label = f"{NAMES[trial['mode']]}: {outcome(trial['counts'])}"
        axes.step([0, *times], [0, *sums], where="post", color=COLOURS[trial["mode"]], label=label)
    axes.set(xlim=(0, SECONDS), yscale="symlog", ylim=(0, 5000), xlabel="seconds", ylabel="right answers so far")
    axes.set_title(f"4 workers, {DRAWN}, one query at import ({last})", fontsize="medium", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def draw_memory(record: dict[str, Any], path: Path) -> None:
    """Draw memory against workers, for both modes and each size of the application."""
    sizes = sorted({row["size"] for row in record["memory"]})
    figure, panels = plt.subplots(1, len(sizes), figsize=(9, 3.2), layout="constrained")
    for size, axes in zip(sizes, panels, strict=True):
        for mode in ("lazy", "prefork"):
            rows = [row for row in record["memory"] if (row["size"], row["mode"]) == (size, mode)]
            x, y = [row["workers"] for row in rows], [row["pss"] for row in rows]
            axes.plot(x, y, marker="o", color=COLOURS[mode], label=NAMES[mode])
        axes.set(xlabel="workers", ylim=(0, None), xticks=sorted({row["workers"] for row in record["memory"]}))
        axes.set_title(f"application + {size} MB", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("PSS of all processes, MiB")
    panels[0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def replaced(text: str, name: str, content: str) -> str:
    """Return a page with what stands between a pair of markers replaced; raises SystemExit if they are not there."""
    begin, end = f"<!-- {name}: generated by `make lockup-report` -->", f"<!-- end of {name} -->"
    head, first, rest = text.partition(begin)
    _, second, tail = rest.partition(end)
    if not (first and second):
        raise SystemExit(f"docs/lockup.md has lost its markers: {begin} … {end}")
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


def main(_arguments: Sequence[str]) -> int:
    """Write tables and figures and return the exit status."""
    if FRESH.exists():
        shutil.copyfile(FRESH, TRIALS)
    if fresh := sorted(FRESH_ORACLE.glob("lockup-*.json")):
        told = sorted((json.loads(path.read_text(encoding="utf-8")) for path in fresh), key=lambda one: one["driver"])
        ORACLE.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    commands = {TRIALS: "scenario-lockup", ORACLE: "scenario-oracle", MEMORY: "bench-lockup"}
    missing = {path: command for path, command in commands.items() if not path.exists()}
    for path, command in missing.items():
        print(f"lockup-report: there is no {path.relative_to(ROOT)}: run `make {command}` first", file=sys.stderr)
    if missing:
        return 1
    mpl.rcParams["svg.hashsalt"] = "lockup"  # the same record draws the same file
    trials, oracle, memory = (json.loads(path.read_text(encoding="utf-8")) for path in commands)
    draw_requests(trials, DOCS / "lockup-requests.svg")
    draw_memory(memory, DOCS / "lockup-memory.svg")
    page = DOCS / "lockup.md"
    text = page.read_text(encoding="utf-8")
    text = replaced(text, "the trials", trials_table(trials))
    text = replaced(text, "the stacks", stacks(trials))
    text = replaced(text, "the trials with Oracle", oracle_table(oracle))
    page.write_text(replaced(text, "the memory", memory_table(memory)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
