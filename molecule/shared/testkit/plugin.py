"""pytest plugin for the scenarios (molecule/shared/base.yml loads it).

Every test with testinfra's `host` runs once per host of the scenario, as root, over one ssh connection that is kept.
A failed test shows what its host's units said. Where TEST_REPORTS names a folder, each run leaves a JUnit file there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from testkit import hosts

JOURNAL = (
    "systemctl --failed --no-legend --plain; "
    "journalctl --boot --no-pager --lines 80 --unit 'uwsgi-*' --unit nginx.service; "
    "tail --lines 20 /var/log/nginx/error.log"
)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Point testinfra at ssh, and give the report a name of its own: a scenario may verify more than once."""
    # Molecule passes its own choice, testinfra's ansible connection: a process of Ansible's for every command.
    config.option.connection = "ssh"
    config.option.ansible_inventory = None
    config.option.ssh_config = str(hosts.ssh_config())
    config.option.sudo = True
    if folder := os.environ.get("TEST_REPORTS"):
        config.option.xmlpath = str(Path(folder) / f"{time.time_ns()}.xml")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a module's tests on every host of the scenario, unless the module names its own."""
    if not hasattr(metafunc.module, "testinfra_hosts"):
        metafunc.module.testinfra_hosts = hosts.urls()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the units' journal to a failed test's report."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and host is not None:
        said = host.run(JOURNAL)
        report.sections.append((f"journal of {host.backend.hostname}", said.stdout + said.stderr))
    return report
