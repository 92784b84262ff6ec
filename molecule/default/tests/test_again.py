"""The playbook run once more, on hosts that are finished: what it reports, what it touches, what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import testinfra
from testkit import hosts, playbook
from testkit.apps import Deployed

INI = "/etc/uwsgi-annex/uwsgi.ini"


@dataclass(frozen=True)
class Seen:
    """What a run of the playbook could have touched on one host."""

    pids: dict[str, set[int]]
    ini: str


def see(url: str) -> Seen:
    host = testinfra.get_host(url, ssh_config=str(hosts.ssh_config()), sudo=True)
    return Seen(
        {name: Deployed(host, name).pids() for name in ("shelf", "annex", "testapp")},
        host.file(INI).content_string,
    )


@dataclass(frozen=True)
class Run:
    """One more run of the playbook on all hosts, and what was there before and after."""

    played: playbook.Played
    before: dict[str, Seen]
    after: dict[str, Seen]


def run_again(*arguments: str, **variables: Any) -> Run:
    before = {url: see(url) for url in hosts.urls()}
    played = playbook.play(*arguments, **variables)
    return Run(played, before, {url: see(url) for url in hosts.urls()})


@pytest.fixture(scope="module")
def check() -> Run:
    return run_again("--check", "--diff")


@pytest.fixture(scope="module")
def check_of_a_change() -> Run:
    return run_again("--check", "--diff", "-vvv", apps=["shelf"], shelf_secret="an0ther-secret")


@pytest.fixture(scope="module")
def change() -> Run:
    return run_again(annex_max_requests=5000)


@pytest.fixture(scope="module")
def misspelt(change: Run) -> Run:
    assert change.played.status == 0
    return run_again(apps=["annex"], annex_max_requests=5000, annex_options=[{"harakirri": 3}])


@pytest.fixture
def url(shelf: Deployed) -> str:
    return f"ssh://{shelf.host.backend.hostname}"


def test_check_reports_nothing_to_change(shelf: Deployed, check: Run) -> None:
    name = shelf.host.backend.hostname
    assert check.played.status == 0, check.played.output[-3000:]
    assert check.played.changed.get(name, []) == []
    assert check.played.counts[name]["changed"] == 0
    assert check.played.counts[name]["ok"] > 30


def test_check_reports_what_would_change(shelf: Deployed, check_of_a_change: Run) -> None:
    name = shelf.host.backend.hostname
    assert check_of_a_change.played.status == 0, check_of_a_change.played.output[-3000:]
    assert check_of_a_change.played.changed[name] == ["uwsgi_sqlalchemy : Write the secrets that are wanted"]
    assert 's3cret-of-shelf"' in shelf.host.file("/etc/uwsgi-shelf/environment").content_string


def test_no_log_or_diff_shows_a_secret(check_of_a_change: Run) -> None:
    assert "Write the secrets that are wanted" in check_of_a_change.played.output
    assert "s3cret-of-shelf" not in check_of_a_change.played.output
    assert "sqlite:////var/lib/uwsgi-shelf" not in check_of_a_change.played.output


def test_changing_one_application_touches_no_worker_of_another(url: str, change: Run) -> None:
    assert change.played.status == 0, change.played.output[-3000:]
    before, after = change.before[url], change.after[url]
    assert (after.pids["shelf"], after.pids["testapp"]) == (before.pids["shelf"], before.pids["testapp"])
    assert after.pids["annex"].isdisjoint(before.pids["annex"])
    assert "max-requests = 10000\n" in before.ini
    assert "max-requests = 5000\n" in after.ini


def test_misspelt_option_is_refused_and_nothing_changes(url: str, misspelt: Run) -> None:
    assert misspelt.played.status != 0
    assert "unknown config directive: harakirri" in misspelt.played.output
    assert "Correct uwsgi_sqlalchemy_uwsgi_options; nothing was changed." in misspelt.played.output
    assert misspelt.after[url] == misspelt.before[url]
