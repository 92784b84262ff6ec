"""Both hosts deploy at the same time, with one database between them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from testkit import hosts
from testkit.apps import Deployed
from testkit.releases import Ran, command

testinfra_hosts = hosts.urls()[:1]

ROWS = (
    "select host, extract(epoch from began), extract(epoch from ended) from migrations"
    " where version = 'slow-migration' order by began"
)
# As the program runs it, without the program's lock.
WITHOUT_THE_LOCK = (
    "set -a; . /etc/uwsgi-single/environment;"
    " cd /srv/uwsgi-single/releases/slow-migration/app && ../venv/bin/python migrate.py"
)
# prove, keep, migrate, and killed before the step after it.
MIGRATION_ALONE = "python3 /opt/cut.py 4 activate single slow-migration"


class Migration(NamedTuple):
    """When the migration ran on a host; seconds of the database's clock."""

    host: str
    began: float
    ended: float


def migrations(database: Deployed) -> list[Migration]:
    said = database.host.check_output("runuser -u postgres -- psql -At -F ' ' single -c %s", ROWS)
    return [
        Migration(host, float(began), float(ended))
        for host, began, ended in (line.split() for line in said.splitlines())
    ]


@pytest.fixture(scope="module")
def singles(applications: list[Deployed]) -> dict[str, Deployed]:
    return {str(app.host.backend.hostname): app for app in applications if app.name == "single"}


def on_both(singles: dict[str, Deployed], text: str) -> tuple[list[Ran], list[Migration]]:
    """Run a command on both hosts at once and return what it did, and the migrations that came with it."""
    before = migrations(singles["debian13"])
    with ThreadPoolExecutor() as pool:
        ran = list(pool.map(lambda app: command(app, text), singles.values()))
    return ran, migrations(singles["debian13"])[len(before) :]


def test_migrations_of_two_hosts_never_overlap(singles: dict[str, Deployed]) -> None:
    ran, (first, second) = on_both(singles, MIGRATION_ALONE)
    assert all("cut: before" in one.errors for one in ran), ran
    assert {first.host, second.host} == {"debian12", "debian13"}
    assert first.ended - first.began >= 2
    assert second.began >= first.ended


def test_without_the_lock_they_would_overlap(singles: dict[str, Deployed]) -> None:
    ran, (first, second) = on_both(singles, WITHOUT_THE_LOCK)
    assert [one.code for one in ran] == [0, 0], ran
    assert second.began < first.ended
