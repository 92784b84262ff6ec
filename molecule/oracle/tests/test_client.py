"""Clients come, lie side by side, are switched, and go. These are stubs that know their version and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from testinfra.host import Host
from testkit import hosts
from testkit.apps import Deployed
from testkit.oracle import clients, deploy
from testkit.playbook import Played, play

testinfra_hosts = hosts.urls("web")
Database = Callable[[str], str]


def folder(version: str) -> str:
    return f"instantclient_{version.replace('.', '_')}-{clients()[version]['sha256'][:12]}"


def fetched(database: Database, host: str) -> int:
    """Return how often a host has fetched an archive of a client."""
    return database("journalctl --unit clients --output cat").count(f"{hosts.address(host)} - - ")


@dataclass
class Switched:
    """What each play did, and how often each host had fetched an archive after it."""

    plays: dict[str, Played] = field(default_factory=dict)
    fetched: dict[tuple[str, str], int] = field(default_factory=dict)


@pytest.fixture(scope="session")
def switched(database: Database) -> Switched:
    found = Switched()

    def note(name: str) -> None:
        for host in hosts.names("web"):
            found.fetched[name, host] = fetched(database, host)

    note("first")
    for name, version in {"other": "21.2", "back": "21.1", "again": "21.1"}.items():
        found.plays[name] = play(limit="web", client=version)
        note(name)
    return found


def test_the_service_finds_the_active_client_by_ldconfig_alone(app: Deployed) -> None:
    host, active = app.host, f"/opt/oracle/{folder('21.1')}"
    assert host.check_output("readlink -f /opt/oracle/instantclient") == active
    assert "/opt/oracle/instantclient/libclntsh.so" in host.check_output("ldconfig -p | grep libclntsh.so")
    assert host.check_output("find /opt/oracle ! -user root -o ! -type l -perm /022") == ""
    proof = host.run("uwsgi-sqlalchemy prove lab %s", app.release())
    assert proof.rc == 0 and "the service can load Oracle's client 21.1.0.0.0" in proof.stderr
    ini = host.check_output("cat /etc/uwsgi-lab/uwsgi.ini /etc/uwsgi-lab/environment")
    assert "ORACLE_HOME" not in ini and "\nenv = " not in ini


def test_without_the_client_the_proof_fails(app: Deployed) -> None:
    app.host.check_output("mv /opt/oracle/instantclient /opt/oracle/away && ldconfig")
    try:
        proof = app.host.run("uwsgi-sqlalchemy prove lab %s", app.release())
    finally:
        app.host.check_output("mv /opt/oracle/away /opt/oracle/instantclient && ldconfig")
    assert proof.rc == 3 and "Oracle's client cannot be loaded as the service would load it" in proof.stderr
    assert "libclntsh.so" in proof.stderr


def test_cx_oracle_is_built(app: Deployed) -> None:
    said = app.host.check_output(
        "/srv/uwsgi-lab/current/venv/bin/python -c 'import cx_Oracle; print(cx_Oracle.version)'"
    )
    assert said == "8.3.0"


def test_names_and_wallet_are_the_applications_alone(app: Deployed) -> None:
    there = app.host.check_output("find /etc/uwsgi-lab/oracle -type f -printf '%f %m %u %g\\n'").splitlines()
    assert sorted(there) == [f"{name} 640 root uwsgi-lab" for name in ("ewallet.pem", "sqlnet.ora", "tnsnames.ora")]
    assert app.as_account("cat /etc/uwsgi-lab/oracle/*/tnsnames.ora").rc == 0
    assert app.as_account("cat /etc/uwsgi-lab/oracle/*/tnsnames.ora", "www-data").rc != 0


def test_the_migration_has_run(app: Deployed, database: Database) -> None:
    said = database("runuser -u postgres -- psql -At lab -c 'select version_num from lab.alembic_version'")
    assert said.strip() == "0001"


def test_another_client_is_fetched_and_made_the_active_one(host: Host, switched: Switched) -> None:
    name, other = host.backend.hostname, switched.plays["other"]
    assert other.status == 0, other.output
    assert switched.fetched["other", name] == switched.fetched["first", name] + 1
    assert "Make it live" in " ".join(other.changed[name]), "the service keeps what it has loaded until it is restarted"
    assert {folder("21.1"), folder("21.2")} <= set(host.check_output("ls /opt/oracle").split())


def test_one_that_is_there_is_not_fetched_again(host: Host, switched: Switched) -> None:
    name, back = host.backend.hostname, switched.plays["back"]
    assert back.status == 0, back.output
    assert switched.fetched["back", name] == switched.fetched["other", name]
    assert host.check_output("readlink /opt/oracle/instantclient") == folder("21.1")


def test_a_second_run_changes_nothing(host: Host, switched: Switched) -> None:
    name, again = host.backend.hostname, switched.plays["again"]
    assert again.status == 0 and again.counts[name]["changed"] == 0, again.output
    assert switched.fetched["again", name] == switched.fetched["back", name]


def test_the_clients_go_when_nobody_needs_them(app: Deployed, switched: Switched) -> None:
    deploy("thin")
    assert not app.host.file("/opt/oracle").exists
    assert app.host.run("ldconfig -p | grep libclntsh").rc == 1
    assert app.host.check_output("ls /etc/ld.so.conf.d").count("oracle") == 0


def test_no_secret_is_in_what_was_printed(host: Host, switched: Switched) -> None:
    secret = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "password").read_text().strip()
    assert len(secret) >= 20
    assert [name for name, played in switched.plays.items() if secret in played.output] == []
