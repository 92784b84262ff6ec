"""Oracle's client on a host (files/oracle_client.py), and what the role makes of its Oracle variables.

The zips are made as Oracle makes its own: one folder named by the version, the library and links, a stray META-INF.
Only what the loader does is played by the test; molecule/oracle has the real one.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import stat
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy
import uwsgi_sqlalchemy_migrate
from sqlalchemy import Engine, create_engine, make_url
from templating import ROLE, evaluate, render, variables

X86_64, AARCH64 = 62, 183


@pytest.fixture(scope="session")
def program() -> ModuleType:
    """The program, as a module."""
    spec = importlib.util.spec_from_file_location("oracle_client", ROLE / "files" / "oracle_client.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle_client"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(tmp_path: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Debian 12 host without a client: libaio has its usual name."""
    root = tmp_path / "host"
    (root / "etc/ld.so.conf.d").mkdir(parents=True)
    made = program.Host(root)
    made.cache = "1 libs found\n\tlibaio.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libaio.so.1\n"
    made.calls = []
    monkeypatch.setattr(made, "ldconfig", lambda *options: made.calls.append(options) or made.cache)
    monkeypatch.setattr(program.platform, "machine", lambda: "x86_64")
    mask = os.umask(0o022)
    yield made
    os.umask(mask)


def zipped(
    path: Path,
    version: str = "19_3",
    *,
    machine: int = X86_64,
    links: dict[str, str] | None = None,
    extra: dict[str, bytes] | None = None,
    without: str = "",
) -> str:
    """Write a zip as Oracle ships its client and return its checksum."""
    top, major = f"instantclient_{version}", version.partition("_")[0]
    elf = b"\x7fELF".ljust(18, b"\0") + struct.pack("<H", machine) + version.encode()
    files: dict[str, bytes] = {
        f"{top}/libclntsh.so.{major}.1": elf,
        f"{top}/BASIC_README": b"Basic",
        f"{top}/network/admin/README": b"here",
        "META-INF/MANIFEST.MF": b"signed",
        **(extra or {}),
    }
    files.pop(without, None)
    if links is None:
        links = {"libclntsh.so": f"libclntsh.so.{major}.1", "libclntsh.so.18.1": f"libclntsh.so.{major}.1"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            # As a careless umask would have packed it.
            info.external_attr = (stat.S_IFREG | (0o777 if ".so." in name else 0o666)) << 16
            archive.writestr(info, content)
        for name, target in links.items():
            info = zipfile.ZipInfo(f"{top}/{name}")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(host: Any) -> dict[str, str]:
    """Return every file and link under the host's root with its content or target."""
    return {
        str(path.relative_to(host.root)): os.readlink(path) if path.is_symlink() else path.read_text(errors="replace")
        for path in sorted(host.root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_a_client_is_installed_whole_and_made_the_active_one(host: Any, tmp_path: Path) -> None:
    sha256 = zipped(tmp_path / "client.zip")
    name = f"instantclient_19_3-{sha256[:12]}"
    answer = host.install(sha256, tmp_path / "client.zip", 19)
    assert answer == {"changed": True, "previous": "", "name": name}
    folder = host.top / name
    assert os.readlink(host.link) == name
    assert os.readlink(folder / "libclntsh.so") == os.readlink(folder / "libclntsh.so.18.1") == "libclntsh.so.19.1"
    assert str(host.link) in host.conf.read_text().splitlines()
    assert host.calls[-1] == ()
    assert sorted(path.name for path in host.top.iterdir()) == ["instantclient", name]
    assert not (folder / "META-INF").exists()


def test_nothing_of_it_may_be_written_by_others(host: Any, tmp_path: Path) -> None:
    sha256 = zipped(tmp_path / "client.zip")
    host.install(sha256, tmp_path / "client.zip", 0)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in host.top.rglob("*") if not path.is_symlink()}
    assert set(modes.values()) <= {0o755, 0o644}
    assert modes["libclntsh.so.19.1"] == 0o755 and modes["BASIC_README"] == 0o644


def test_the_second_time_nothing_is_fetched_or_changed(host: Any, tmp_path: Path) -> None:
    sha256 = zipped(tmp_path / "client.zip")
    assert host.install(sha256, None, 0)["missing"]
    host.install(sha256, tmp_path / "client.zip", 0)
    before = state(host)
    again = host.install(sha256, None, 0)
    assert again["changed"] is False and "missing" not in again
    assert state(host) == before


def test_versions_stay_side_by_side_and_going_back_needs_no_archive(host: Any, tmp_path: Path) -> None:
    old, new = zipped(tmp_path / "old.zip", "19_3"), zipped(tmp_path / "new.zip", "23_26")
    host.install(old, tmp_path / "old.zip", 0)
    answer = host.install(new, tmp_path / "new.zip", 0)
    assert answer["previous"] == f"instantclient_19_3-{old[:12]}"
    assert os.readlink(host.link) == f"instantclient_23_26-{new[:12]}"
    assert host.install(old, None, 0)["changed"]
    assert os.readlink(host.link) == f"instantclient_19_3-{old[:12]}"
    assert len(host.installed()) == 2
    host.activate(f"instantclient_23_26-{new[:12]}")
    assert os.readlink(host.link) == f"instantclient_23_26-{new[:12]}"


def test_a_reissued_file_of_the_same_version_is_another_client(host: Any, tmp_path: Path) -> None:
    first, second = zipped(tmp_path / "1.zip"), zipped(tmp_path / "2.zip", extra={"instantclient_19_3/fix": b""})
    host.install(first, tmp_path / "1.zip", 0)
    host.install(second, tmp_path / "2.zip", 0)
    assert [path.name[-12:] for path in host.installed()] == sorted([first[:12], second[:12]])


def test_where_libaio_has_another_name_the_client_gets_a_link(host: Any, tmp_path: Path) -> None:
    sha256 = zipped(tmp_path / "client.zip")
    renamed = "/lib/x86_64-linux-gnu/libaio.so.1t64"
    host.cache = f"\tlibaio.so.1t64 (libc6,x86-64) => {renamed}\n"
    host.install(sha256, tmp_path / "client.zip", 0)
    assert os.readlink(host.link / "libaio/libaio.so.1") == renamed
    assert host.install(sha256, None, 0)["changed"] is False
    (host.link / "libaio/libaio.so.1").unlink()
    assert host.install(sha256, None, 0)["changed"] is True


def test_where_libaio_has_its_usual_name_no_link_is_made(host: Any, tmp_path: Path) -> None:
    host.install(zipped(tmp_path / "client.zip"), tmp_path / "client.zip", 0)
    assert not (host.link / "libaio").exists()


def test_the_name_that_version_12_lacks_is_added(host: Any, tmp_path: Path) -> None:
    sha256 = zipped(tmp_path / "client.zip", "12_2", links={})
    host.install(sha256, tmp_path / "client.zip", 0)
    assert os.readlink(host.link / "libclntsh.so") == "libclntsh.so.12.1"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another machine": (
        {"machine": AARCH64},
        "archive is made for aarch64, but this host is x86_64. Oracle's packages for x86_64 have x64 in their names",
    ),
    "an unknown machine": ({"machine": 22}, "archive is made for machine 22, but"),
    "a client too old for the driver": (
        {"version": "12_2"},
        "archive is Instant Client 12.2, but python-oracledb's thick mode needs 19 or newer.",
    ),
    "another zip": (
        {"without": "instantclient_19_3/libclntsh.so.19.1", "links": {}},
        "archive is not Oracle's Instant Client: it has no instantclient_VERSION/libclntsh.so.* but META-INF, "
        "instantclient_19_3. Take the package Basic or Basic Light.",
    ),
    "two clients in one": ({"extra": {"instantclient_21_1/libclntsh.so.21.1": b""}}, "is not Oracle's Instant Client"),
    "a link out of the folder": ({"links": {"libclntsh.so": "/etc/passwd"}}, "is not Oracle's: "),
    "a link to the parent": ({"links": {"up": ".."}}, "is not Oracle's: "),
    "a name out of the folder": ({"extra": {"instantclient_19_3/../../x": b""}}, "is not Oracle's: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_archive_is_refused_and_the_active_client_stays(name: str, host: Any, tmp_path: Path) -> None:
    given, message = REFUSED[name]
    good = zipped(tmp_path / "good.zip", "21_1")
    host.install(good, tmp_path / "good.zip", 19)
    before = state(host)
    bad = zipped(tmp_path / "bad.zip", **given)
    with pytest.raises(sys.modules["oracle_client"].Failure) as failure:
        host.install(bad, tmp_path / "bad.zip", 19)
    assert message in str(failure.value) and "uwsgi_sqlalchemy_oracle_client.archive" in str(failure.value)
    assert state(host) == before


def test_an_old_client_that_is_there_is_refused_for_the_thick_mode(host: Any, tmp_path: Path) -> None:
    old = zipped(tmp_path / "old.zip", "12_2")
    host.install(old, tmp_path / "old.zip", 0)
    with pytest.raises(sys.modules["oracle_client"].Failure, match=r"Instant Client 12\.2, but"):
        host.install(old, None, 19)


def test_no_zip_at_all_and_another_checksum_are_told_apart(host: Any, tmp_path: Path, program: ModuleType) -> None:
    (tmp_path / "page.zip").write_bytes(b"<html>please log in</html>")
    digest = hashlib.sha256((tmp_path / "page.zip").read_bytes()).hexdigest()
    with pytest.raises(program.Failure, match="archive is no zip file"):
        host.install(digest, tmp_path / "page.zip", 0)
    with pytest.raises(program.Failure) as failure:
        host.install("0" * 64, tmp_path / "page.zip", 0)
    said = str(failure.value)
    assert digest in said and "0" * 64 in said and "uwsgi_sqlalchemy_oracle_client.sha256" in said and "Oracle" in said
    assert state(host) == {}


def test_a_full_disk_leaves_the_old_client_active_and_nothing_behind(
    host: Any, tmp_path: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = zipped(tmp_path / "old.zip", "19_3"), zipped(tmp_path / "new.zip", "21_1")
    host.install(old, tmp_path / "old.zip", 0)
    before = state(host)

    def full(source: Any, copy: Any) -> None:
        copy.write(source.read(5))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(program.shutil, "copyfileobj", full)
    with pytest.raises(program.Failure, match=r"No space left on device\. It needs \d+ MiB there\."):
        host.install(new, tmp_path / "new.zip", 0)
    assert state(host) == before
    monkeypatch.undo()


def test_what_a_killed_run_left_behind_goes(host: Any, tmp_path: Path) -> None:
    torso = host.top / ".new-abc" / "instantclient_19_3"
    torso.mkdir(parents=True)
    host.install(zipped(tmp_path / "client.zip"), tmp_path / "client.zip", 0)
    assert not torso.parent.exists()


def test_a_check_changes_nothing_and_says_what_would_change(host: Any, tmp_path: Path) -> None:
    old, new = zipped(tmp_path / "old.zip", "19_3"), zipped(tmp_path / "new.zip", "21_1")
    for name, sha256 in {"old": old, "new": new}.items():
        host.install(sha256, tmp_path / f"{name}.zip", 0)
    before = state(host)
    host.check = True
    assert host.install(new, None, 0)["changed"] is False
    assert host.install(old, None, 0)["changed"] is True
    assert host.install("f" * 64, None, 0) == {"changed": True, "missing": True}
    assert host.remove() == {"changed": True}
    assert state(host) == before


def process(host: Any, library: str) -> None:
    """Let a process of the service be there that has a library in its memory."""
    (host.root / "proc/17").mkdir(parents=True)
    (host.root / "proc/17/maps").write_text(f"7f00-7f01 r-xp 00000000 fe:00 42                 {library}\n")
    (host.root / "proc/17/cgroup").write_text("0::/system.slice/uwsgi-shop.service\n")


def test_removal_takes_everything_the_role_made_and_nothing_else(host: Any, tmp_path: Path) -> None:
    foreign = host.top / "instantclient_18_5" / "libclntsh.so"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("another's")
    for version in ("19_3", "21_1"):
        host.install(zipped(tmp_path / "client.zip", version), tmp_path / "client.zip", 0)
    process(host, "/usr/lib/libc.so.6")
    assert host.remove() == {"changed": True}
    assert [name for name in state(host) if not name.startswith("proc")] == [str(foreign.relative_to(host.root))]
    assert host.calls[-1] == ()
    assert host.remove() == {"changed": False}


def test_a_client_in_use_is_not_removed(host: Any, tmp_path: Path, program: ModuleType) -> None:
    sha256 = zipped(tmp_path / "client.zip")
    name = host.install(sha256, tmp_path / "client.zip", 0)["name"]
    process(host, f"{host.top}/{name}/libclntsh.so.19.1")
    before = state(host)
    with pytest.raises(program.Failure, match=r"but uwsgi-shop\.service still use"):
        host.remove()
    assert state(host) == before


def test_what_the_role_did_not_make_is_not_overwritten(host: Any, tmp_path: Path, program: ModuleType) -> None:
    host.link.mkdir(parents=True)
    with pytest.raises(program.Failure, match="is not the role's link"):
        host.install(zipped(tmp_path / "client.zip"), tmp_path / "client.zip", 0)
    assert host.installed() == []


def test_the_command_line_answers_in_json_and_refuses_in_words(
    host: Any, tmp_path: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "Host", lambda **_: host)
    sha256 = zipped(tmp_path / "client.zip")
    assert program.main(["install", sha256, "--archive", str(tmp_path / "client.zip"), "--least", "19"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] is True
    assert program.main(["install", sha256, "--least", "20"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("uwsgi_sqlalchemy_oracle_client.archive is Instant Client 19.3")
    assert program.main(["remove"]) == 0
    assert json.loads(capsys.readouterr().out) == {"changed": True}


# --- what the role makes of its variables ----------------------------------------------------------------------------

CLIENT = {"archive": "https://example.org/basic.zip", "sha256": "1" * 64}
THIN = {"database_url": "oracle+oracledb://u:p@db:1521/?service_name=x"}
THICK = {**THIN, "oracle_client": CLIENT}
CX_ORACLE = {"database_url": "oracle+cx_oracle://u:p@db:1521/?service_name=x", "oracle_client": CLIENT}


def environment(**given: Any) -> list[str]:
    """Return the lines of the environment file besides the URL's."""
    return [line for line in render("uwsgi-APP/environment", **given).splitlines() if "DATABASE_URL" not in line]


def test_the_application_is_told_how_its_driver_is_to_work() -> None:
    client = "# Oracle client " + "1" * 64
    assert environment(**THIN) == ['ORA_PYTHON_DRIVER_TYPE="thin"']
    assert environment(**THICK) == [client, 'ORA_PYTHON_DRIVER_TYPE="thick"']
    assert environment(**CX_ORACLE) == [client]
    assert environment(database_url="postgresql+psycopg://u:p@db/x", oracle_client=CLIENT) == []
    assert environment(**{**THICK, "database_url": "oracle+oracledb_async://u:p@db:1521/x"}) == [
        'ORA_PYTHON_DRIVER_TYPE="thin"'
    ]
    assert environment(**THICK, environment={"ORA_PYTHON_DRIVER_TYPE": "thin"}) == ['ORA_PYTHON_DRIVER_TYPE="thin"']
    assert environment(environment={"DATABASE_URL": THIN["database_url"]}) == ['ORA_PYTHON_DRIVER_TYPE="thin"']


def test_where_libaio_has_another_name_the_service_is_told_of_the_link() -> None:
    told = 'LD_LIBRARY_PATH="/opt/oracle/instantclient/libaio"'
    assert told in environment(debian=13, **CX_ORACLE)
    assert told not in environment(debian=12, **CX_ORACLE) + environment(debian=13, **THIN)


def test_another_client_is_another_environment_so_that_the_service_is_restarted() -> None:
    assert environment(**THICK) != environment(**{**THICK, "oracle_client": {**CLIENT, "sha256": "2" * 64}})


@pytest.mark.parametrize(("given", "proved"), [(THIN, False), (THICK, True), (CX_ORACLE, True), ({}, False)])
def test_the_client_is_proved_where_the_driver_needs_it(given: dict[str, Any], proved: bool) -> None:
    assert json.loads(render("uwsgi-APP/settings.json", **given))["oracle_client"] is proved


def test_only_cx_oracle_is_built_with_an_older_setuptools() -> None:
    def install(given: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = evaluate("{{ __uwsgi_sqlalchemy_install_environment }}", variables(**given))
        return found

    constraint = {f"{name}_CONSTRAINT" for name in ("PIP", "PIP_BUILD", "UV_BUILD")}
    assert install(CX_ORACLE).keys() - install(THICK).keys() == constraint
    assert len({install(CX_ORACLE)[name] for name in constraint}) == 1


def tns(**net: Any) -> tuple[str, dict[str, str]]:
    """Return the folder that the application is told, and what is written there, as the tasks do it."""
    given = {**THIN, "oracle_net": net, "__uwsgi_sqlalchemy_wallet_stat": {"results": wallet(*net.get("wallet", []))}}
    values = variables(**given)
    folder = evaluate("{{ __uwsgi_sqlalchemy_environment.TNS_ADMIN }}", values)
    return folder, evaluate("{{ __uwsgi_sqlalchemy_tns_files }}", values)


def wallet(*paths: str, content: str = "0") -> list[dict[str, Any]]:
    """Return what was registered of a wallet's files."""
    return [{"item": path, "stat": {"checksum": content * 64}} for path in paths]


def test_names_lie_in_a_folder_of_the_application_named_by_their_content() -> None:
    folder, files = tns(tnsnames="A = (B)")
    assert folder.startswith("/etc/uwsgi-shop/oracle/") and len(folder) == len("/etc/uwsgi-shop/oracle/") + 12
    assert files == {"tnsnames.ora": "A = (B)", "sqlnet.ora": ""}
    others = [tns(tnsnames="A = (C)")[0], tns(tnsnames="A = (B)", sqlnet="X=1")[0], tns(wallet=["a/cwallet.sso"])[0]]
    assert len({folder, *others}) == 4
    assert tns(tnsnames="A = (B)")[0] == folder


def test_another_wallet_of_the_same_name_is_another_folder() -> None:
    net = {"wallet": ["cwallet.sso"]}
    folders = {
        evaluate(
            "{{ __uwsgi_sqlalchemy_tns_admin }}",
            variables(oracle_net=net, __uwsgi_sqlalchemy_wallet_stat={"results": wallet("cwallet.sso", content=digit)}),
        )
        for digit in "01"
    }
    assert len(folders) == 2


def test_a_wallet_without_sqlnet_is_named_by_the_roles_own() -> None:
    assert "DIRECTORY = ?/network/admin" in tns(wallet=["cwallet.sso"])[1]["sqlnet.ora"]
    assert tns(wallet=["cwallet.sso"], sqlnet="X = 1")[1]["sqlnet.ora"] == "X = 1"


def test_without_names_there_is_no_folder() -> None:
    assert not any("TNS_ADMIN" in line for line in environment(**THIN))


PASSWORD = "p@ss/w%rd \"double\" 'single' :?#+&= ünï\\"


def test_any_password_reaches_the_driver_through_the_filter_urlencode() -> None:
    built = evaluate(
        "oracle+oracledb://{{ user | urlencode }}:{{ password | urlencode }}@db:1521/?service_name=x",
        {"user": "u@ser", "password": PASSWORD},
    )
    url = make_url(built)
    assert (url.username, url.password, url.host) == ("u@ser", PASSWORD, "db")
    # Without the filter it does not: the test sees the difference.
    assert make_url(built.replace("p%40ss", "p@ss")).password != PASSWORD


@pytest.mark.parametrize("mode", ["thin", "thick"])
def test_a_migration_reaches_oracle_as_the_application_does(
    mode: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def create(url: str, **options: Any) -> Engine:
        given.append(options.pop("thick_mode", False))
        return create_engine(url, **options)

    monkeypatch.setattr(sqlalchemy, "create_engine", create)
    monkeypatch.setenv("DATABASE_URL", "oracle+oracledb://u:p@127.0.0.1:1/?service_name=nobody-is-there")
    monkeypatch.setenv("ORA_PYTHON_DRIVER_TYPE", mode)
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    assert uwsgi_sqlalchemy_migrate.main(["shop", "sh", "-c", "echo migrated; exit 3"]) == 3
    said = capfd.readouterr().out
    assert "oracle has no lock for this" in said and "migrated" in said, "no connection is made for a lock"
    assert given == [mode == "thick"]
