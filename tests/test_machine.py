"""What is taken from this machine for the test hosts, and what must not reach the repository."""

from __future__ import annotations

import re
import shutil
import tomllib
from configparser import ConfigParser
from pathlib import Path

import hosts
import leaks
import machine
import pytest

PIP = """\
global.extra-index-url='file:///srv/wheels https://extra.example.net/simple'
global.find-links='/srv/wheels'
global.timeout='15'
install.trusted-host='extra.example.net'
list.format='columns'
:env:.index-url='https://mirror.example.net/simple'
:env:.default-timeout='30'
"""
APT = """\
Debian|main|https://mirror.example.net/debian/|bookworm|
Debian|contrib|https://mirror.example.net/debian/|bookworm|
Debian|main|https://mirror.example.net/debian/|bookworm-updates|/usr/share/keyrings/debian-archive-keyring.gpg
Debian|main|https://mirror.example.net/debian-security/|bookworm-security|
. nodistro|main|https://other.example.net/|nodistro|
"""


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer as a machine behind a mirror and a proxy would."""
    answers = {
        "$(SITE)": "https://mirror.example.net\nhttps://other.example.net\n",
        "indextargets": APT,
        "dump": 'Acquire::http::Proxy "http://proxy.example.net:3128";\n',
        "registry": "https://npm.example.net/\n",
        "config": PIP,
        "-c": "https://index.example.net/simple https://files.example.net\n",
    }
    monkeypatch.setattr(machine, "output", lambda *command: next(answers[word] for word in answers if word in command))
    monkeypatch.setattr(shutil, "which", lambda name: name)


@pytest.mark.usefixtures("other_machine")
def test_pip_settings_merge_files_and_environment_and_leave_local_folders_out() -> None:
    assert machine.pip_settings() == {
        "extra-index-url": "https://extra.example.net/simple",
        "index-url": "https://mirror.example.net/simple",
        "timeout": "30",
        "trusted-host": "extra.example.net",
    }


@pytest.mark.usefixtures("other_machine")
def test_pip_and_uv_get_the_same_indexes() -> None:
    settings = machine.pip_settings()
    pip = ConfigParser()
    pip.read_string(machine.pip_conf(settings))
    uv = tomllib.loads(machine.uv_toml(settings))
    assert pip["global"]["index-url"] == "https://mirror.example.net/simple"
    assert uv["index"] == [
        {"url": "https://extra.example.net/simple"},
        {"url": "https://mirror.example.net/simple", "default": True},
    ]
    assert uv["allow-insecure-host"] == ["extra.example.net"]


@pytest.mark.usefixtures("other_machine")
def test_another_suite_comes_from_the_same_mirrors() -> None:
    assert hosts.archive_lines("trixie") == [
        "deb https://mirror.example.net/debian/ trixie main",
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
        "https://mirror.example.net/debian/ trixie-updates main",
        "deb https://mirror.example.net/debian-security/ trixie-security main",
    ]


@pytest.mark.usefixtures("other_machine")
def test_one_switch_keeps_the_machine_out_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = hosts.image_files("bookworm")
    assert b"mirror.example.net" in taken["etc/pip.conf"]
    assert b"proxy.example.net" in taken["etc/apt/apt.conf.d/80machine"]
    monkeypatch.setenv("TEST_HOSTS_MACHINE_SETTINGS", "0")
    left = hosts.image_files("bookworm")
    assert not [path for path, content in left.items() if b"example.net" in content]
    assert not [path for path in left if "ca-certificates" in path]


def test_a_bundle_of_certificates_becomes_one_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n" for body in ("b25l", "dHdv"))
    bundle = tmp_path / "company.pem"
    bundle.write_text(f"# ours\n{one}{two}")
    monkeypatch.setattr(machine, "LOCAL_AUTHORITIES", tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert machine.certificate_authorities({"cert": str(bundle)}) == {
        "company-0.crt": f"# ours\n{one}",
        "company-1.crt": two,
    }
    assert machine.certificate_authorities({"cert": str(machine.SYSTEM_BUNDLE)}) == {}


def test_the_image_is_named_after_all_that_goes_into_it() -> None:
    files, lines = {"etc/pip.conf": b"[global]\n"}, ["deb x trixie main"]
    names = {
        hosts.image_tag(files, lines, "trixie"),
        hosts.image_tag(files, lines, "bookworm"),
        hosts.image_tag(files, [*lines, "deb y trixie main"], "trixie"),
        hosts.image_tag({"etc/pip.conf": b"[global]\ntimeout = 1\n"}, lines, "trixie"),
    }
    assert len(names) == 4
    assert hosts.image_tag(dict(files), list(lines), "trixie") in names


@pytest.fixture(scope="module")
def wanted() -> re.Pattern[str]:
    """Return what the check looks for on this very machine."""
    return leaks.pattern(leaks.registries() | leaks.folders())


def planted(folder: Path, text: str, wanted: re.Pattern[str]) -> list[str]:
    file = folder / "planted.yml"
    file.write_text(f"---\n{text}\n")
    return [mention.removeprefix(f"{folder}/") for mention in leaks.leaks([file], wanted)]


def test_every_registry_of_this_machine_is_found(tmp_path: Path, wanted: re.Pattern[str]) -> None:
    hosts_of_apt = {source.uri.split("/")[2] for source in machine.apt_sources()}
    assert hosts_of_apt
    for registry in hosts_of_apt:
        assert planted(tmp_path, f"mirror: https://{registry}/debian", wanted) == [f"planted.yml:2: {registry}"]


def test_the_path_of_this_checkout_is_found(tmp_path: Path, wanted: re.Pattern[str]) -> None:
    assert planted(tmp_path, f"roles_path: {leaks.ROOT}/roles", wanted)


def test_ordinary_text_is_not_found(tmp_path: Path, wanted: re.Pattern[str]) -> None:
    assert not planted(tmp_path, "url: https://example.org/ # in /srv/uwsgi-shelf, /tmp/x and /root/.ssh", wanted)


@pytest.mark.usefixtures("other_machine")
def test_mirrors_and_proxies_of_another_machine_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:word@door.example.net:3128")
    assert leaks.registries() == {
        "files.example.net",
        "index.example.net",
        "mirror.example.net",
        "npm.example.net",
        "other.example.net",
        "extra.example.net",
        "proxy.example.net",
        "door.example.net",
    }
