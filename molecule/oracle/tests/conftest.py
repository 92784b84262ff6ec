"""The application with one driver after the other."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from testinfra.host import Host
from testkit import hosts
from testkit.apps import Deployed
from testkit.oracle import DRIVERS, deploy


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by driver, then as they are written, then by host: each state of the hosts is played but once."""

    def place(item: pytest.Item) -> tuple[str, int, int]:
        chosen = item.callspec.params.get("driver") if isinstance(item, pytest.Function) else None
        return item.path.name, [None, *DRIVERS].index(str(chosen) if chosen else None), item.reportinfo()[1] or 0

    items.sort(key=place)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    deploy(name)
    return name


@pytest.fixture
def app(host: Host) -> Deployed:
    return Deployed(host, "lab")


@pytest.fixture
def url(host: Host) -> str:
    return f"http://{hosts.address(host.backend.hostname)}"


@pytest.fixture(scope="session")
def database() -> Callable[[str], str]:
    """Return a function that runs a command on the database host as root."""

    def run(command: str) -> str:
        ssh = ("ssh", "-F", str(hosts.ssh_config()), "database", f"sudo {command}")
        return subprocess.run(ssh, check=True, capture_output=True, text=True).stdout

    return run
