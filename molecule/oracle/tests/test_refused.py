"""What cannot serve does not replace what does. Comes last: the service works with the driver that was played last."""

from __future__ import annotations

import pytest
from testinfra.host import Host
from testkit import hosts
from testkit.apps import Deployed
from testkit.oracle import DRIVERS, clients, deploy
from testkit.playbook import Played, play

testinfra_hosts = hosts.urls("web")


@pytest.fixture(scope="session")
def with_a_wrong_password() -> Played:
    return play(limit="web", at_import="query", password="wrong", **DRIVERS["thin"])


@pytest.fixture(scope="session")
def with_a_client_that_it_cannot_use() -> Played:
    deploy("cx_oracle")
    return play(limit="web", at_import="query", **{**DRIVERS["cx_oracle"], "client": "21.2"})


def test_a_wrong_password_is_refused_with_the_databases_own_words(app: Deployed, with_a_wrong_password: Played) -> None:
    said = with_a_wrong_password.output
    assert with_a_wrong_password.status != 0
    assert "ORA-01017" in said and "was not activated" in said
    assert app.host.run("uwsgi-sqlalchemy health lab").rc == 0


def test_a_client_that_the_application_cannot_use_is_replaced_by_the_one_before(
    host: Host, app: Deployed, with_a_client_that_it_cannot_use: Played
) -> None:
    assert with_a_client_that_it_cannot_use.status != 0
    assert "was not activated" in with_a_client_that_it_cannot_use.output
    assert host.check_output("readlink /opt/oracle/instantclient").endswith(clients()["oracle"]["sha256"][:12])
    assert "/opt/oracle/instantclient_19_3-" in host.check_output(
        "grep -h /libclntsh.so /proc/%s/maps", str(min(app.pids()))
    )
