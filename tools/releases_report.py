"""Turn what the scenario `releases` recorded into a page of the documentation: releases_report.py [RECORD [PAGE]].

RECORD is the releases.json that a run of the scenario leaves (.run/reports/releases/), PAGE is docs/releases.md. What
`make bench-releases` measured follows below it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / ".run" / "reports" / "releases" / "releases.json"
PAGE = ROOT / "docs" / "releases.md"
BENCH = ROOT / "benchmarks" / "releases.json"
NOTE = 110  # characters of what the program said

HEAD = """\
# What deployments, faults and rollbacks did to the traffic

`make releases-report` wrote this page from a run of `make scenario-releases` on {date}. From the first step to the
last, {connections} connections to each of {sites} applications on {hosts} hosts asked one thing after the other,
through Nginx: {requests} requests, every answer checked for its value and for the release that gave it. Each
application has four workers with one thread (`single`) or two (`double`), and takes a second to import.

{platforms}

Failed and wrong are summed over the applications. The longest request, in milliseconds, is given for each of them:
{columns}.
"""


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetitions, in their order."""
    return list(dict.fromkeys(values))


def named(text: str, names: dict[str, str]) -> str:
    """Return a text with the ids of releases replaced by their variants, the same for every application."""
    for release, variant in names.items():
        text = text.replace(release, variant)
    return re.sub(r"\buwsgi-(single|double)\b", "uwsgi-APP", re.sub(r"\b20\d\d-[\d-]+T[\d:]+Z", "(when)", text))


def shortened(text: str) -> str:
    """Return the first words of a text, fit for a cell of a table."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= NOTE else line[:NOTE].rsplit(" ", 1)[0] + " …"


def program(seen: dict[str, Any]) -> str:
    """Return what the program did and said: how it ended, and why."""
    code, journal = seen["code"], seen["journal"]
    if not journal:
        return "" if code == 0 else f"exit {code}" if code in range(1, 8) else "killed"
    how = journal.get("how", "")
    ended = journal["result"] + (f", {how}" if how and journal["result"] != "refused" else "")
    return ". ".join(filter(None, (f"exit {code}: {ended}" if code in range(8) else ended, journal.get("note", ""))))


def state(seen: dict[str, Any]) -> str:
    """Return what serves afterwards."""
    running = distinct(seen["workers"])
    others = "" if running == [seen["current"]] else f", workers run {', '.join(running) or 'nothing'}"
    return f"{seen['current']}{others}" + (", same workers" if seen["same_workers"] else "")


def row(step: str, group: Sequence[dict[str, Any]], names: dict[str, str], columns: Sequence[tuple[str, str]]) -> str:
    """Return the table's row of one step: the sums of its applications, and what was said of them."""
    total = {key: sum(seen[key] for seen in group) for key in ("requests", "failed", "wrong")}
    times = {(seen["host"], seen["app"]): f"{seen['longest_ms']:.0f}" for seen in group}
    longest = " / ".join(times.get(column, "-") for column in columns)
    said = "; ".join(distinct(shortened(named(program(seen), names)) for seen in group))
    after = "; ".join(distinct(named(state(seen), names) for seen in group))
    return f"| {step} | {total['requests']} | {total['failed']} | {total['wrong']} | {longest} | {said} | {after} |"


def page(record: dict[str, Any]) -> str:
    """Return the page for a recorded story."""
    steps = record["steps"]
    names = {release: variant for found in record["names"] for variant, release in found["releases"].items()}
    columns = distinct((seen["host"], seen["app"]) for seen in steps)
    groups = [(step, [seen for seen in steps if seen["step"] == step]) for step in distinct(s["step"] for s in steps)]
    head = HEAD.format(
        date=record["date"],
        connections=record["connections"],
        sites=len(columns),
        hosts=len(record["platforms"]),
        requests=sum(seen["requests"] for seen in steps),
        platforms="\n".join(f"- {host}: {', '.join(facts)}" for host, facts in record["platforms"].items()),
        columns=", ".join(f"{host} `{app}`" for host, app in columns),
    )
    table = [
        "| what was done | requests | failed | wrong | longest, ms | the program | afterwards |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
        *(row(step, group, names, columns) for step, group in groups),
    ]
    return head + "\n" + "\n".join(table) + "\n"


BENCH_HEAD = """\

## How long it takes

`make bench-releases` measured this on {date}, one application after the other on an otherwise idle machine, under
traffic that keeps one worker of four busy. "Imports" is what four workers need one after the other to import the
application. Times are in seconds, a figure for each round; the longest request is in milliseconds.

| host | application | what was done | imports | took | beyond the imports | longest request, ms |
| --- | --- | --- | ---: | --- | ---: | --- |
"""


def bench(record: dict[str, Any]) -> str:
    """Return the section for what the benchmark recorded."""
    lines = [
        f"| {row['host']} | `{row['app']}` | {row['action']} | {row['imports']} | {joined(row['seconds'])} |"
        f" {row['beyond_imports']} | {joined(row['longest_ms'])} |"
        for row in record["rows"]
    ]
    return BENCH_HEAD.format(date=record["date"]) + "\n".join(lines) + "\n"


def joined(values: Iterable[Any]) -> str:
    """Return the values of several rounds for one cell."""
    return " / ".join(map(str, values))


def main(arguments: Sequence[str]) -> int:
    """Write the page and return the exit status."""
    source, target = (*map(Path, arguments), *(RECORD, PAGE)[len(arguments) :])
    if not source.exists():
        print(f"releases-report: there is no {source}: run `make scenario-releases` first", file=sys.stderr)
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    text = page(json.loads(source.read_text(encoding="utf-8")))
    if BENCH.exists():
        text += bench(json.loads(BENCH.read_text(encoding="utf-8")))
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
