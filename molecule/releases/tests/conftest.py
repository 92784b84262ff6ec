"""The applications of the scenario, each with all variants of its releases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import testinfra
from testinfra.host import Host
from testkit import hosts
from testkit.apps import Deployed

APPS = ("single", "double")
# Where one application of a host will do.
ONE = {"debian12": "double", "debian13": "single"}
BUILT_BY_THE_ROLE = {"v1", "v2"}

# The role builds v1 and v2. Every other variant differs from v1 by a few lines, so its release is a copy of the one
# that serves with its own source in it, instead of minutes of building the same virtual environment again.
COPY = """
import compileall, json, os, shutil, sys
from datetime import datetime, timezone
home, built = sys.argv[1], sys.argv[2:]
os.chdir(home + "/releases")
base = os.path.basename(os.readlink("../current"))
for name in sorted(set(os.listdir("/opt/variants")) - set(built)):
    if not os.path.exists(name + "/release.json"):
        shutil.rmtree(name, ignore_errors=True)
        shutil.copytree(base, name, symlinks=True)
        shutil.rmtree(name + "/app")
        shutil.copytree("/opt/variants/" + name, name + "/app")
        compileall.compile_dir(name + "/app", quiet=2)
        record = json.load(open(base + "/release.json"))
        record.update(release=name, built=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
        os.remove(name + "/release.json")
        json.dump(record, open(name + "/release.json", "w"))
"""


def connect(name: str) -> Host:
    """Return a connection of its own to a host: each thread needs one."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(hosts.ssh_config()), sudo=True)


@pytest.fixture(scope="session")
def applications() -> list[Deployed]:
    every = [Deployed(connect(name), app) for name in hosts.names() for app in APPS]
    copy = "python3 -c %s /srv/%s " + " ".join(sorted(BUILT_BY_THE_ROLE))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda app: app.host.check_output(copy, COPY, app.unit), every))
    return every


@pytest.fixture(params=APPS)
def app(request: pytest.FixtureRequest, host: Host, applications: list[Deployed]) -> Deployed:
    name = host.backend.hostname
    return next(app for app in applications if (app.host.backend.hostname, app.name) == (name, request.param))


@pytest.fixture
def one(host: Host, ones: list[Deployed]) -> Deployed:
    return next(app for app in ones if app.host.backend.hostname == host.backend.hostname)


@pytest.fixture(scope="session")
def ones(applications: list[Deployed]) -> list[Deployed]:
    return [app for app in applications if ONE[str(app.host.backend.hostname)] == app.name]
