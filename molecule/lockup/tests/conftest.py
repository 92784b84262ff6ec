"""Trials of the application with each driver in each mode, made once and recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import testinfra
from testinfra.host import Host
from testkit import hosts
from testkit.apps import Deployed
from testkit.lab import Laboratory


def connect(name: str) -> Host:
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(hosts.ssh_config()), sudo=True)


@pytest.fixture(scope="session")
def laboratory() -> Iterator[Laboratory]:
    found = Laboratory([Deployed(connect(name), "lab") for name in hosts.names("web")], connect("database"))
    try:
        yield found
    finally:
        found.record()
