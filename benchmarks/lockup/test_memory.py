"""What preforking saves: memory and throughput of both modes, by workers and by the size of the application.

`make bench-lockup` runs it on the hosts of the scenario `lockup`, on one of them, and writes what it measured to
benchmarks/lockup.json. Nothing here is asserted under a clock: a busy machine must not fail a test.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from typing import Any

import testinfra
from testkit import hosts
from testkit.apps import Deployed
from testkit.client import Client
from testkit.playbook import play

testinfra_hosts = hosts.urls("web")[1:2]

RESULTS = hosts.ROOT / "benchmarks" / "lockup.json"
WORKERS = (2, 4, 8)
SIZES = (0, 50, 200)  # MB beyond SQLAlchemy and the driver
MODES = ("lazy", "prefork")
WARM, COUNT, ROUNDS = 400, 3000, 10

PSS = """
import glob, re, sys
total = 0
for path in glob.glob("/proc/[0-9]*/cgroup"):
    try:
        if "/" + sys.argv[1] + ".service" in open(path).read():
            total += int(re.search(r"^Pss:\\s+(\\d+)", open(path[:-6] + "smaps_rollup").read(), re.M)[1])
    except (OSError, TypeError):
        pass
print(total)
"""


def deploy(host: str, **variables: Any) -> None:
    """Play the role for one host."""
    variables = {"entry": "deploy", **variables}
    played = play(limit=host, settings={"PRE_PING": "no", "BALLAST_MB": str(variables.pop("size"))}, **variables)
    assert played.status == 0, played.output[-3000:]


def load(host: str, count: int, site: str | None = None) -> float:
    """Have so many requests answered, all rightly, and return how many there were per second."""
    report = asyncio.run(Client(f"http://{hosts.address(host)}", connections=16, host_header=site).run(count))
    assert report.ok, report.summary()
    return report.rate


def measured(app: Deployed, name: str, mode: str, workers: int, size: int) -> dict[str, Any]:
    """Return the memory of all processes of the service, in MiB, after some requests."""
    deploy(name, mode=mode, processes=workers, size=size)
    load(name, WARM)
    pss = int(app.host.check_output("python3 -c %s %s", PSS, app.unit)) / 1024
    return {"mode": mode, "workers": workers, "size": size, "pss": round(pss, 1)}


def test_record() -> None:
    name = re.sub("^ssh://", "", testinfra_hosts[0])
    app = Deployed(testinfra.get_host(testinfra_hosts[0], ssh_config=str(hosts.ssh_config()), sudo=True), "lab")
    rows = [measured(app, name, mode, workers, size) for size in SIZES for workers in WORKERS for mode in MODES]
    # Side by side: both are up, and take turns, so that what else the machine does meets both.
    for mode in MODES:
        deploy(name, entry="main", app=mode, names=[f"{mode}.test"], mode=mode, processes=8, size=50)
        load(name, WARM, f"{mode}.test")
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(ROUNDS):
        for mode, found in rates.items():
            found.append(round(load(name, COUNT, f"{mode}.test"), 1))
    pss = {row["mode"]: row["pss"] for row in rows if (row["workers"], row["size"]) == (8, 50)}
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "host": app.host.check_output("{ . /etc/os-release; echo $PRETTY_NAME; uwsgi --version; }").splitlines(),
        "memory": rows,
        "rates": rates,
        "memory_ratio": round(pss["prefork"] / pss["lazy"], 3),
        "throughput_ratio": round(statistics.median(rates["prefork"]) / statistics.median(rates["lazy"]), 3),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
