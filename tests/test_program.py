"""What the on-host program promises: never a half deploy, and the truth about what it did."""

from __future__ import annotations

import ast
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fakehost
import pytest
import uwsgi_sqlalchemy as program
from fakehost import FakeHost, Listener
from templating import ROLE

FILES = ("settings.json", "uwsgi.ini", "environment", "service", "socket", "nginx.conf")
# Exit codes, as the program's help lists them.
DONE, UNHEALTHY, USAGE, REFUSED, LOCKED, PUT_BACK, BROKEN, AFTER = range(8)
PARSER = program.parser()  # made once, not for each of a thousand calls


@pytest.fixture
def root() -> Iterator[Path]:
    # The path of a unix socket has room for 107 bytes, which the folders of tmp_path can exceed.
    with tempfile.TemporaryDirectory(prefix="host-") as folder:
        yield Path(folder).resolve()


@pytest.fixture
def bare(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    """A host with a wanted configuration and a finished release, r1, on which nothing runs yet."""
    host = FakeHost(root, program)
    monkeypatch.setattr(program, "run", host.run)
    monkeypatch.setattr(program, "start", host.start)
    monkeypatch.setattr(program, "App", functools.partial(program.App, root=root))
    monkeypatch.setattr(program, "parser", lambda: PARSER)
    monkeypatch.setattr(program, "PATIENCE", 0.1)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nobody cuts the power here, and it takes most of the time
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    host.build("r1")
    host.want()
    yield host
    host.close()


@pytest.fixture
def host(bare: FakeHost) -> FakeHost:
    """A host that serves r1, with a second release, r2, beside it."""
    assert activate(bare, "r1").code == DONE
    bare.build("r2")
    bare.commands.clear()
    bare.requests.clear()
    return bare


def activate(host: FakeHost, release: str, *arguments: str) -> fakehost.Result:
    return host.call("activate", "shop", release, "--json", *arguments)


def serves(host: FakeHost, release: str, workers: int = 2) -> bool:
    """Whether the service runs this release and nothing else, from the wanted or an earlier configuration."""
    link = os.readlink(host.current) if host.current.is_symlink() else ""
    return (host.state, link, host.running()) == ("active", f"releases/{release}", [release] * workers)


def whole(host: FakeHost) -> bool:
    """Whether nothing of an unfinished activation is left."""
    return not (host.etc / "undo").exists() and not list(host.root.rglob(".*.new"))


# --- the plan --------------------------------------------------------------------------------------------------------

Step = Callable[[FakeHost], object]


def steps(*each: Step) -> Step:
    return lambda host: [step(host) for step in each]


def edit(name: str) -> Step:
    """Change a file that is wanted, without a change of what it means."""
    return lambda host: (host.wanted / name).write_text((host.wanted / name).read_text() + "# edited\n")


def edit_settings(host: FakeHost) -> None:
    (host.wanted / "settings.json").write_text((host.wanted / "settings.json").read_text() + "\n")


def copy_by_hand(name: str) -> Step:
    return lambda host: host.live(name).write_text((host.wanted / name).read_text())


def flip_by_hand(host: FakeHost) -> None:
    host.current.unlink()
    host.current.symlink_to("releases/r2")


def forget_environment(host: FakeHost) -> None:
    path = host.root / "run/uwsgi-shop.started"
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": "0123456789abcdef"}))


def lose_fifo(host: FakeHost) -> None:
    fifo = host.root / "run/uwsgi-shop/master.fifo"
    fifo.write_bytes(b"q")
    fifo.unlink()
    host.fifo = None


def keep_undo(host: FakeHost) -> None:
    program.App("shop").keep_undo("r1")


with_one_worker = steps(lambda host: host.want(processes=1), lambda host: activate(host, "r1"))
with_pyuwsgi = steps(
    lambda host: host.want(uwsgi="pyuwsgi"),
    lambda host: host.build("r1", uwsgi="pyuwsgi 2.0.30"),
    lambda host: host.build("r2", uwsgi="pyuwsgi 2.0.30"),
    lambda host: activate(host, "r1"),
)

# What is different; the release that is activated; how; and why. Braces name a place of the configuration.
PLANS: dict[str, tuple[Step, str, str, list[str]]] = {
    "nothing": (lambda _: None, "r1", "none", []),
    "a release": (lambda _: None, "r2", "chain reload", ["release r1 becomes r2"]),
    "a release, with one worker": (with_one_worker, "r2", "restart", ["release r1 becomes r2"]),
    "a release, with its own uWSGI": (with_pyuwsgi, "r2", "restart", ["release r1 becomes r2"]),
    "another interpreter": (
        lambda host: host.build("r2", python="cpython-313 /usr/bin/python3"),
        *("r2", "restart"),
        [
            "runtime changes from Python cpython-311 /usr/bin/python3, uWSGI debian"
            " to Python cpython-313 /usr/bin/python3, uWSGI debian",
            "release r1 becomes r2",
        ],
    ),
    "settings that only the program reads": (edit_settings, "r1", "none", ["{settings.json} changed"]),
    "uwsgi.ini": (edit("uwsgi.ini"), "r1", "restart", ["{uwsgi.ini} changed"]),
    "a secret": (edit("environment"), "r1", "restart", ["{environment} changed"]),
    "the unit": (edit("service"), "r1", "restart", ["{service} changed"]),
    "the socket": (edit("socket"), "r1", "restart with its socket", ["{socket} changed"]),
    "the site": (edit("nginx.conf"), "r1", "none", ["{nginx.conf} changed"]),
    "a release and the socket": (
        edit("socket"),
        *("r2", "restart with its socket", ["{socket} changed", "release r1 becomes r2"]),
    ),
    "no site any more": (lambda host: (host.wanted / "nginx.conf").unlink(), "r1", "none", ["{nginx.conf} changed"]),
    "a file edited on the host": (
        lambda host: host.live("uwsgi.ini").write_text("[uwsgi]\n"),
        *("r1", "none", ["{uwsgi.ini} changed"]),
    ),
    "a site that was disabled": (lambda host: host.site.unlink(), "r1", "none", ["{site} is missing"]),
    "a site that should be disabled": (
        steps(lambda host: (host.wanted / "nginx.conf").unlink(), lambda host: host.live("nginx.conf").unlink()),
        *("r1", "none", ["{site} is to go"]),
    ),
    "a service that does not run": (lambda host: host.stop_service(), "r1", "start", ["the service was not running"]),
    "a service that is not enabled": (
        lambda host: host.enabled.clear(),
        *("r1", "none", ["the service was not enabled at boot"]),
    ),
    "a service started with an older secret": (
        forget_environment,
        *("r1", "restart", ["the service runs with an older {environment}"]),
    ),
    "a configuration made live by hand": (
        steps(edit("uwsgi.ini"), copy_by_hand("uwsgi.ini")),
        *("r1", "restart", ["the service runs with an older {uwsgi.ini}"]),
    ),
    "a link switched by hand": (flip_by_hand, "r2", "chain reload", ["workers run r1"]),
    "a master that takes no commands": (
        lose_fifo,
        "r2",
        "restart",
        ["uWSGI takes no commands, {run}/master.fifo is missing", "release r1 becomes r2"],
    ),
    "a master without statistics": (
        lambda host: host.listeners.pop("stats").close(),
        "r1",
        "restart",
        ["uWSGI gives no statistics on {run}/stats.sock"],
    ),
    "an activation that was cut short": (keep_undo, "r1", "none", ["an earlier activation was cut short"]),
}


def named(host: FakeHost, reason: str) -> str:
    """Put the places for their names in braces."""
    places = {name: host.live(name) for name in FILES} | {"site": host.site, "run": host.root / "run/uwsgi-shop"}
    for name, place in places.items():
        reason = reason.replace(f"{{{name}}}", str(place))
    return reason


@pytest.mark.parametrize("name", PLANS)
def test_a_check_says_what_is_done_and_why_and_then_it_is_done_once(host: FakeHost, name: str) -> None:
    prepare, release, action, reasons = PLANS[name]
    prepare(host)
    host.commands.clear()
    before, pids, state = host.files(), host.pids(), host.state
    check = activate(host, release, "--check")
    assert check.code == DONE
    assert (check.json["action"], check.json["reasons"]) == (action, [named(host, reason) for reason in reasons])
    assert check.json["changed"] is bool(reasons)
    assert (host.files(), host.pids(), host.state, host.acted()) == (before, pids, state, []), "the check did something"

    done = activate(host, release)
    assert done.code == DONE, done.message
    assert {key: done.json[key] for key in check.json} == check.json
    assert serves(host, release, json.loads((host.wanted / "settings.json").read_text())["processes"]) and whole(host)
    assert (host.pids() == pids) == (action == "none")

    pids = host.pids()
    again = activate(host, release)
    assert (again.code, again.json["changed"], again.json["reasons"], host.pids()) == (DONE, False, [], pids)


def test_a_check_of_a_release_that_is_not_built_yet_says_what_would_be_done(host: FakeHost) -> None:
    told = activate(host, "r9", "--check").json
    assert (told["changed"], told["action"], told["reasons"]) == (True, "chain reload", ["release r1 becomes r9"])


# --- activation that succeeds ----------------------------------------------------------------------------------------


def test_the_first_activation_brings_everything_up(bare: FakeHost) -> None:
    done = activate(bare, "r1")
    assert done.code == DONE, done.message
    assert {key: done.json[key] for key in ("app", "release", "from", "changed", "action")} == {
        "app": "shop",
        "release": "r1",
        "from": "",
        "changed": True,
        "action": "start",
    }
    assert serves(bare, "r1") and whole(bare)
    assert {name: bare.live(name).read_text() for name in FILES} == {
        name: (bare.wanted / name).read_text() for name in FILES
    }
    assert {name: bare.live(name).stat().st_mode & 0o777 for name in FILES} == {
        **dict.fromkeys(FILES, 0o644),
        "environment": 0o600,
    }
    assert bare.enabled == {"uwsgi-shop.service", "uwsgi-shop.socket"}
    assert bare.nginx == (bare.wanted / "nginx.conf").read_text()
    assert os.readlink(bare.site) == str(bare.live("nginx.conf"))


def test_health_is_asked_as_nginx_would_ask(host: FakeHost) -> None:
    host.want(server_names=["shop.example"], health_path="/healthz?deep=1")
    copy_by_hand("settings.json")(host)
    assert host.call("health", "shop").code == DONE
    (request,) = host.requests
    assert (
        request.items()
        >= {
            "REQUEST_METHOD": "GET",
            "REQUEST_URI": "/healthz?deep=1",
            "PATH_INFO": "/healthz",
            "QUERY_STRING": "deep=1",
            "HTTP_HOST": "shop.example",
            "SERVER_NAME": "shop.example",
        }.items()
    )


def test_a_second_release_replaces_the_workers_and_leaves_the_master(host: FakeHost) -> None:
    master, pids = host.main_pid, host.pids()
    done = activate(host, "r2")
    assert (done.code, done.json["from"], done.json["action"]) == (DONE, "r1", "chain reload")
    assert serves(host, "r2") and whole(host)
    assert host.main_pid == master and not set(pids) & set(host.pids())
    assert not [command for command in host.acted() if "restart" in command or "stop" in command]


def test_an_unchanged_activation_touches_nothing(host: FakeHost) -> None:
    before, pids = host.files(), host.pids()
    done = activate(host, "r1")
    assert (done.code, done.json["changed"], done.json["action"]) == (DONE, False, "none")
    assert (host.files(), host.pids(), host.acted()) == (before, pids, [])
    assert len(host.requests) == 1, "the health path was not asked"


def test_a_changed_socket_is_opened_anew_before_the_service_starts(host: FakeHost) -> None:
    edit("socket")(host)
    assert activate(host, "r1").code == DONE
    order = [command for command in host.acted() if "socket" in command or "restart" in command or "reload" in command]
    assert order.index("systemctl daemon-reload") < order.index("systemctl stop uwsgi-shop.socket uwsgi-shop.service")
    assert order.index("systemctl stop uwsgi-shop.socket uwsgi-shop.service") < order.index(
        "systemctl start uwsgi-shop.socket"
    )
    assert order.index("systemctl start uwsgi-shop.socket") < order.index("systemctl restart uwsgi-shop.service")


def test_a_site_that_is_no_longer_wanted_is_gone_from_nginx(host: FakeHost) -> None:
    pids = host.pids()
    (host.wanted / "nginx.conf").unlink()
    assert activate(host, "r1").code == DONE
    assert not host.site.is_symlink() and not host.live("nginx.conf").exists()
    assert host.nginx is None and host.pids() == pids


def test_a_changed_site_reloads_nginx_and_no_worker(host: FakeHost) -> None:
    pids = host.pids()
    edit("nginx.conf")(host)
    assert activate(host, "r1").code == DONE
    assert host.nginx == (host.wanted / "nginx.conf").read_text()
    assert host.pids() == pids and host.acted() == ["systemctl reload-or-restart nginx.service"]


def sandboxed(host: FakeHost) -> list[str]:
    """Return the commands that ran in the service's sandbox."""
    return [command for command in host.commands if command.startswith("systemd-run")]


def test_proof_migration_and_hooks_run_once_per_release_in_the_services_sandbox(host: FakeHost) -> None:
    host.want(
        migrate_command="alembic upgrade head",
        before_activate="bin/warm 'a b'",
        after_activate="bin/tell",
        service_options=["MemoryMax=2G"],
    )
    assert activate(host, "r2").code == DONE
    proof, migration, before, after = sandboxed(host)
    for command in (proof, migration, before, after):
        for part in (
            "--property=User=uwsgi-shop",
            "--property=ProtectSystem=strict",
            "--property=SystemCallFilter=~@privileged @resources",
            "--property=StateDirectory=uwsgi-shop",
            "--property=MemoryMax=2G",
            f"--property=EnvironmentFile={host.wanted / 'environment'}",
            f"--property=WorkingDirectory={host.releases / 'r2' / 'app'}",
            f"--setenv=PATH={host.releases / 'r2' / 'venv/bin'}:/usr/local/bin:/usr/bin:/bin",
        ):
            assert part in command
        for part in ("ExecStart", "Restart=", "RuntimeDirectory=uwsgi-shop ", "EnvironmentFile=/etc"):
            assert part not in command
    assert "--need-app" in proof and "--property=Type=notify" in proof
    assert (
        migration.endswith(" alembic upgrade head") and before.endswith("bin/warm a b") and after.endswith("bin/tell")
    )
    switch = next(index for index, command in enumerate(host.commands) if "restart uwsgi-shop" in command)
    assert host.commands.index(before) < switch < host.commands.index(after)
    assert activate(host, "r2").code == DONE
    assert len(sandboxed(host)) == 4


def test_the_proof_loads_the_release_itself_and_not_in_a_lazy_worker(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        if "--need-app" in command:
            loaded.append(Path(command[command.index("--ini") + 1]).read_text())
        return host.run(*command)

    monkeypatch.setattr(program, "run", run)
    host.want(module="shop.web:app", pythonpath="src")
    ini = host.wanted / "uwsgi.ini"
    ini.write_text(ini.read_text().replace(" /srv/", f" {host.root}/srv/"))
    assert host.call("prove", "shop", "r2").code == DONE
    (text,) = loaded
    found = {(key, value) for key, _, value in (line.partition(" = ") for line in text.splitlines())}
    assert found >= {
        ("strict", "true"),
        ("need-app", "true"),
        ("module", "shop.web:app"),
        ("pythonpath", f"{host.releases}/r2/app/src"),
        ("virtualenv", f"{host.releases}/r2/venv"),
    }
    assert not {"lazy-apps", "master", "socket", "processes", "stats"} & {key for key, _ in found}
    assert serves(host, "r1") and host.acted("systemd-run") == [] and not list(host.root.glob("run/*.ini"))


def want_oracle(host: FakeHost, loaded: str) -> None:
    """Want a service that uses Oracle's client 19.3, where the loader finds the one that is `loaded`."""
    link = host.root / "opt/oracle/instantclient"
    link.parent.mkdir(parents=True)
    link.symlink_to("instantclient_19_3-0123456789ab")
    host.migrated = f"{loaded}\n"  # what any command in the sandbox says
    host.want(settings={"oracle_client": True})


def test_oracles_client_is_loaded_as_the_service_before_anything_is_live(host: FakeHost) -> None:
    want_oracle(host, "19.3.0.0.0")
    result = host.call("activate", "shop", "r2")
    assert result.code == DONE and serves(host, "r2")
    assert "the service can load Oracle's client 19.3.0.0.0" in result.err
    (asked,) = [command for command in host.commands if "OCIClientVersion" in command]
    assert "--property=User=uwsgi-shop" in asked and f"EnvironmentFile={host.wanted}/environment" in asked


def test_without_oracles_client_nobody_asks_for_it(host: FakeHost) -> None:
    host.want()
    assert host.call("activate", "shop", "r2").code == DONE
    assert not [command for command in host.commands if "OCIClientVersion" in command]


@pytest.mark.parametrize(
    ("loaded", "error", "message"),
    [
        (
            "",
            "Traceback (most recent call last):\nOSError: libaio.so.1: cannot open shared object file",
            "Oracle's client cannot be loaded as the service would load it; release r2 was not activated. "
            "OSError: libaio.so.1: cannot open shared object file\n"
            "Look with `ldd /opt/oracle/instantclient/libclntsh.so` for a library that is not found.",
        ),
        (
            "19.30.0.0.0",
            "",
            "the service would load Oracle's client 19.30.0.0.0 instead of 19.3; release r2 was not activated. "
            "`ldconfig -p | grep libclntsh` shows the one that comes first.",
        ),
    ],
)
def test_a_client_that_the_service_cannot_load_is_refused(
    loaded: str, error: str, message: str, host: FakeHost
) -> None:
    want_oracle(host, loaded)
    if error:
        host.failing["OCIClientVersion"] = error
    result = host.call("activate", "shop", "r2")
    assert (result.code, result.message) == (REFUSED, message)
    assert serves(host, "r1")


def test_what_was_loaded_before_the_migration_is_loaded_again_before_it_is_judged(host: FakeHost) -> None:
    host.want(migrate_command="alembic upgrade head")
    host.build("r2", rehearsal="500 no such table then 200 ok")
    assert activate(host, "r2").code == DONE and serves(host, "r2")
    host.build("r3", rehearsal="500 x then 200 ok")
    host.want()
    assert activate(host, "r3").code == REFUSED, "without a migration there is nothing to load again for"


# --- a master that imports the application ----------------------------------------------------------------------------

FINDING = {"kind": "thread", "what": "the thread metrics", "where": "shop/metrics.py:12 (shop.metrics)"}
FINDING |= {"advice": "Start it in the worker."}


def findings(*verdicts: str) -> str:
    return json.dumps([{**FINDING, "verdict": verdict} for verdict in verdicts])


def test_a_preforking_master_starts_over_for_another_release(host: FakeHost) -> None:
    host.want(fork_mode="prefork")
    assert activate(host, "r1").json["action"] == "restart", "its ini has changed"
    done = activate(host, "r2")
    assert (done.code, done.json["action"], host.obeyed) == (DONE, "graceful reload", ["graceful reload"])
    assert serves(host, "r2")
    assert host.call("reload", "shop", "--json").json["action"] == "graceful reload"


def test_what_a_guard_cannot_cure_is_refused_where_the_master_imports_it(host: FakeHost) -> None:
    host.want(fork_mode="prefork")
    assert activate(host, "r1").code == DONE
    host.build("r2", audit=findings("harmless", "cured by the guard", "refused"))
    done = activate(host, "r2")
    assert done.code == REFUSED and serves(host, "r1") and whole(host)
    assert "release r2 is not fit for uwsgi_sqlalchemy_fork_mode prefork; it was not activated." in done.message
    said = "- thread (refused): the thread metrics, at shop/metrics.py:12 (shop.metrics). Start it in the worker."
    assert done.message.count("\n- ") == 1 and said in done.message
    assert done.message.endswith("or set uwsgi_sqlalchemy_fork_mode to lazy.")
    host.build("r2", audit=findings("harmless", "cured by the guard"))
    assert activate(host, "r2").code == DONE


def test_an_audit_without_a_report_is_no_pass(host: FakeHost) -> None:
    host.want(fork_mode="prefork")
    host.build("r2", audit="")
    done = activate(host, "r2")
    assert done.code == REFUSED and "the audit of release r2 ended without a report" in done.message


def test_where_every_worker_imports_the_application_the_audit_is_information(host: FakeHost) -> None:
    host.build("r2", audit=findings("refused"))
    asked = host.call("audit", "shop", "r2", "--json")
    assert (asked.code, [one["verdict"] for one in asked.json]) == (DONE, ["refused"])
    assert host.call("audit", "shop", "r2").out.startswith("- thread (refused): the thread metrics, at shop/metrics")
    assert host.call("audit", "shop").out == "nothing that a fork would share or lose\n"
    assert serves(host, "r1") and activate(host, "r2").code == DONE


# --- activation that fails -------------------------------------------------------------------------------------------

# What makes an activation of r2 fail before anything is live; and what is said.
REFUSALS: dict[str, tuple[Step, list[str]]] = {
    "a misspelt option": (
        lambda host: host.failing.update({"/usr/bin/uwsgi --ini": "[strict-mode] unknown config directive: lgo-slow"}),
        [
            "uWSGI refuses its configuration {root}/etc/uwsgi-shop/wanted/uwsgi.ini",
            "unknown config directive: lgo-slow",
            "Correct uwsgi_sqlalchemy_uwsgi_options",
        ],
    ),
    "a release that cannot be imported": (
        lambda host: host.build("r2", imports=False, proves=False),
        [
            "release r2 cannot be loaded; it was not activated. uWSGI said:\nTraceback",
            "ModuleNotFoundError: No module named 'shop'",
        ],
    ),
    "the migration": (
        steps(
            lambda host: host.want(migrate_command="alembic upgrade head"),
            lambda host: host.failing.update({"alembic": "sqlite3.OperationalError: no such table: books"}),
        ),
        ["uwsgi_sqlalchemy_migrate_command of release r2 failed (alembic upgrade head):\n", "no such table: books"],
    ),
    "a release that fails at its first request": (
        lambda host: host.build("r2", rehearsal="500 no such table: books"),
        [
            "release r2 does not answer its health path with this configuration; it was not activated.",
            "500, not 2xx (no such table: books)",
        ],
    ),
    "the command before": (
        steps(
            lambda host: host.want(before_activate="bin/warm"),
            lambda host: host.failing.update({"bin/warm": "cannot warm up"}),
        ),
        ["uwsgi_sqlalchemy_before_activate of release r2 failed (bin/warm):\n", "cannot warm up"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_before_the_switch_changes_nothing(host: FakeHost, name: str) -> None:
    prepare, said = REFUSALS[name]
    edit("service")(host)
    prepare(host)
    before, pids = host.files(), host.pids()
    done = activate(host, "r2")
    assert (done.code, done.json["code"]) == (REFUSED, REFUSED)
    assert all(part.replace("{root}", str(host.root)) in done.message for part in said), done.message
    assert (host.files(), host.pids()) == (before, pids)
    assert host.acted("systemd-run") == []
    host.failing.clear()
    host.build("r2")
    assert activate(host, "r2").code == DONE and serves(host, "r2")


def test_a_release_that_is_refused_before_its_migration_is_not_migrated(host: FakeHost) -> None:
    host.want(migrate_command="alembic upgrade head")
    host.build("r2", proves=False)
    assert activate(host, "r2").code == REFUSED
    assert [command.endswith(" alembic upgrade head") for command in host.dismissed] == [True]
    assert not any("alembic" in command for command in host.commands)


def test_a_command_after_the_activation_that_fails_is_told_and_the_release_stays(host: FakeHost) -> None:
    host.want(after_activate="bin/tell")
    host.failing["bin/tell"] = "nobody listens"
    done = activate(host, "r2")
    assert done.code == AFTER
    assert "uwsgi_sqlalchemy_after_activate of release r2 failed (bin/tell):\nnobody listens" in done.message
    assert serves(host, "r2") and whole(host)


def refuse_misspelt_sites(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `nginx -t` fail while the enabled site has a certain mistake."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        done = host.run(*command)
        if command[0] == "nginx" and host.site.exists() and "defualt" in host.site.read_text():
            return subprocess.CompletedProcess(command, 1, "emerg: invalid parameter defualt_server")
        return done

    monkeypatch.setattr(program, "run", run)


@pytest.mark.parametrize("first", [True, False], ids=["first site", "changed site"])
def test_a_site_that_nginx_refuses_is_taken_back(bare: FakeHost, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.live("nginx.conf").parent.mkdir()
    if not first:
        assert activate(bare, "r1").code == DONE
    (bare.wanted / "nginx.conf").write_text("listen 80 defualt_server;\n")
    refuse_misspelt_sites(bare, monkeypatch)
    before, loaded = bare.files(), bare.nginx
    done = activate(bare, "r1")
    assert done.code == REFUSED
    assert "Nginx refuses its configuration with the site of uwsgi-shop" in done.message
    assert "\nemerg: invalid parameter defualt_server\n" in done.message
    assert done.message.endswith("uwsgi_sqlalchemy_server_names.")
    assert (bare.files(), bare.nginx) == (before, loaded)


def test_a_site_with_a_name_that_another_one_has_is_refused(host: FakeHost) -> None:
    before = host.files()
    host.nginx_warns = 'nginx: [warn] conflicting server name "shop.example" on 0.0.0.0:80, ignored\n'
    host.want(server_names=["www.shop.example", "shop.example"])
    done = activate(host, "r1")
    assert done.code == REFUSED and "Nginx has another site for shop.example" in done.message
    assert "uwsgi_sqlalchemy_server_names" in done.message
    assert {name: value for name, value in host.files().items() if "/wanted/" not in name} == {
        name: value for name, value in before.items() if "/wanted/" not in name
    }
    host.want(server_names=["other.example"])
    assert activate(host, "r1").code == DONE, "a conflict between other sites is not this application's"


def test_a_site_is_not_blamed_when_nginx_refused_before(host: FakeHost) -> None:
    edit("nginx.conf")(host)
    host.failing["nginx -t"] = "emerg: unknown directive in /etc/nginx/conf.d/other.conf"
    done = activate(host, "r1")
    assert done.code == REFUSED
    assert "It refused it before this change too: repair the file named above." in done.message
    assert "other.conf" in done.message and "uwsgi_sqlalchemy_" not in done.message
    assert "# edited" not in host.site.read_text()


# Seconds until the program gives up; everything that should succeed has longer, for a busy machine.
SHORT = {"health_timeout": 0.3, "harakiri": 0.1}

# What makes r2 fail under traffic; and what is said.
FAILURES: dict[str, tuple[Step, str]] = {
    "answers 500": (
        lambda host: host.build("r2", answer="500 no such table: books"),
        "500, not 2xx (no such table: books)",
    ),
    "answers a redirect": (lambda host: host.build("r2", answer="302 login"), "302, not 2xx (login)"),
    "does not answer": (lambda host: host.build("r2", answer="silence"), "no answer within"),
    "closes the connection": (lambda host: host.build("r2", answer="close"), "closed without an answer"),
    "cannot be imported after all": (lambda host: host.build("r2", imports=False), "No module named 'shop'"),
}
CHANGED = ("settings.json", "environment", "service", "socket", "nginx.conf")


@pytest.mark.parametrize(
    ("name", "changed"),
    [(name, True) for name in FAILURES] + [("answers 500", False), ("cannot be imported after all", False)],
)
def test_a_release_that_does_not_serve_is_put_back(host: FakeHost, name: str, changed: bool) -> None:
    prepare, said = FAILURES[name]
    prepare(host)
    before, nginx = host.files(), host.nginx
    if changed:
        host.want(SHORT, harakiri=50, environment={"KEY": "new"}, server_names=["new.example"], listen_queue=2048)
        assert all(host.live(name).read_text() != (host.wanted / name).read_text() for name in CHANGED)
    wanted = {name: value for name, value in host.files().items() if "/wanted/" in name}
    done = activate(host, "r2")
    assert (done.code, done.json["code"]) == (PUT_BACK, PUT_BACK)
    assert said in done.message
    assert done.message.endswith("Release r1 and its configuration are back and serve.")
    assert serves(host, "r1") and whole(host)
    assert host.files() == before | wanted and host.nginx == nginx


def test_a_release_that_failed_is_not_activated_again_unasked(host: FakeHost) -> None:
    host.build("r2", answer="500 no such table")
    assert activate(host, "r2").code == PUT_BACK
    host.build("r2")
    pids = host.pids()
    done = activate(host, "r2")
    assert done.code == REFUSED and "no such table" in done.message
    assert "uwsgi-sqlalchemy activate shop r2 --retry" in done.message
    assert host.pids() == pids and serves(host, "r1")
    assert activate(host, "r2", "--retry").code == DONE and serves(host, "r2")


def test_with_another_configuration_a_release_that_failed_is_another_matter(host: FakeHost) -> None:
    host.build("r2", answer="500 wrong password")
    assert activate(host, "r2").code == PUT_BACK
    host.build("r2")
    host.want(environment={"PASSWORD": "right"})
    assert activate(host, "r2").code == DONE and serves(host, "r2")


def test_workers_that_do_not_get_ready_are_put_back(host: FakeHost) -> None:
    host.want(SHORT)
    assert activate(host, "r1").code == DONE
    host.build("r2", ready=False)
    done = activate(host, "r2")
    assert done.code == PUT_BACK and "only 0 of 2 workers serve r2" in done.message
    assert "restart instead: a worker does not get ready for requests" in done.err
    assert serves(host, "r1") and whole(host)


def test_a_service_that_does_not_start_is_put_back_with_its_journal(host: FakeHost) -> None:
    edit("service")(host)
    host.build("r2", imports=False)
    host.said = "what the journal says\n"
    done = activate(host, "r2")
    assert done.code == PUT_BACK
    assert "uwsgi-shop.service did not start:\nJob for uwsgi-shop.service failed.\nwhat the journal" in done.message


def test_a_first_release_that_does_not_serve_leaves_the_service_stopped(bare: FakeHost) -> None:
    bare.build("r1", answer="500 x")
    done = activate(bare, "r1")
    assert done.code == PUT_BACK
    assert done.message.endswith("There is no earlier release: the service was stopped.")
    assert (bare.state, bare.enabled, bare.workers, bare.nginx) == ("inactive", set(), [], None)
    assert not bare.current.is_symlink() and not bare.site.is_symlink() and whole(bare)
    assert not [name for name in FILES if bare.live(name).exists()]
    bare.build("r2")
    assert activate(bare, "r2").code == DONE and serves(bare, "r2")


def test_when_the_old_release_does_not_serve_either_that_is_said_and_it_stays_known(host: FakeHost) -> None:
    host.build("r1", answer="500 database away")
    host.build("r2", answer="500 no such table")
    done = activate(host, "r2")
    assert done.code == BROKEN
    assert "no such table" in done.message and "database away" in done.message
    assert "Release r1 is back in place but does not serve" in done.message
    assert os.readlink(host.current) == "releases/r1"
    host.build("r1")
    assert activate(host, "r1").code == DONE
    assert serves(host, "r1") and whole(host)


def test_a_better_release_can_be_activated_when_the_old_one_does_not_serve_either(host: FakeHost) -> None:
    host.build("r1", answer="500 database away")
    host.build("r2", answer="500 no such table")
    assert activate(host, "r2").code == BROKEN
    host.build("r3")
    assert activate(host, "r3").code == DONE
    assert serves(host, "r3") and whole(host)


def test_an_unchanged_application_that_is_not_healthy_is_a_failure(host: FakeHost) -> None:
    host.build("r1", answer="503 database away")
    pids = host.pids()
    done = activate(host, "r1")
    assert done.code == UNHEALTHY
    assert "nothing changed, but uwsgi-shop is not healthy: /healthz" in done.message
    assert "database away" in done.message
    assert host.pids() == pids and host.acted() == []


def test_the_old_release_is_judged_by_its_own_settings(host: FakeHost) -> None:
    host.build("r2", answer="500 x")
    host.want(processes=3, health_path="/new")
    host.requests.clear()
    done = activate(host, "r2")
    assert done.code == PUT_BACK and done.message.endswith("Release r1 and its configuration are back and serve.")
    assert (host.requests[0]["PATH_INFO"], host.requests[-1]["PATH_INFO"]) == ("/new", "/healthz")


def test_a_start_is_judged_by_the_settings_that_are_live(host: FakeHost) -> None:
    host.want(health_path="/new")
    assert host.call("health", "shop").code == DONE
    assert host.requests[-1]["PATH_INFO"] == "/healthz"


def test_a_full_disk_is_put_back(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    full = True

    def write(path: Path, content: bytes, mode: int) -> None:
        nonlocal full
        if full and path == host.live("service"):
            full = False
            raise OSError(28, "No space left on device", str(path))
        written(path, content, mode)

    before = {name: value for name, value in host.files().items() if "/wanted/" not in name}
    edit("uwsgi.ini")(host)
    edit("service")(host)
    written = program.write
    monkeypatch.setattr(program, "write", write)
    done = activate(host, "r2")
    assert done.code == PUT_BACK and "No space left on device" in done.message
    assert {name: value for name, value in host.files().items() if "/wanted/" not in name} == before
    assert serves(host, "r1") and whole(host)


# --- activation that is cut short ------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """The end of the program's process, at any moment."""


STEPS = [
    "prove",
    "keep",
    "site",
    "migrate",
    "before",
    "rehearse",
    "configure",
    "switch",
    "renew",
    "confirm",
    "finish",
    "after",
]


def activate_and_cut(host: FakeHost, release: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin an activation that changes release and configuration, and end the process as a step begins."""

    def step(name: str, _text: str) -> None:
        if name == at:
            raise Interrupted

    host.want(environment={"KEY": "new"}, server_names=["new.example"])
    with monkeypatch.context() as patched:
        patched.setattr(program, "step", step)
        with pytest.raises(Interrupted):
            activate(host, release)


@pytest.mark.parametrize("at", STEPS)
def test_the_next_run_finishes_what_was_cut_short(host: FakeHost, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    activate_and_cut(host, "r2", at, monkeypatch)
    assert host.running() in (["r1", "r1"], ["r2", "r2"])
    assert activate(host, "r2").code == DONE
    assert serves(host, "r2") and whole(host)
    assert {name: host.live(name).read_text() for name in FILES} == {
        name: (host.wanted / name).read_text() for name in FILES
    }
    assert host.nginx == (host.wanted / "nginx.conf").read_text()


@pytest.mark.parametrize("at", STEPS[:-2])
def test_a_failure_after_a_run_was_cut_short_brings_back_what_was_live_before_both(
    host: FakeHost, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value for name, value in host.files().items() if "/wanted/" not in name}
    activate_and_cut(host, "r2", at, monkeypatch)
    host.build("r3", answer="500 x")
    done = activate(host, "r3")
    assert done.code == PUT_BACK and done.message.endswith("Release r1 and its configuration are back and serve.")
    after = {name: value for name, value in host.files().items() if "/wanted/" not in name and "/r3" not in name}
    assert after == before and serves(host, "r1") and whole(host)


def test_a_refusal_after_a_run_was_cut_short_brings_back_what_was_live_before_it(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    activate_and_cut(host, "r2", "confirm", monkeypatch)
    host.build("r3", answer="500 x")
    host.want(migrate_command="alembic upgrade head")
    host.failing["alembic"] = "no such table"
    done = activate(host, "r3")
    assert done.code == PUT_BACK and "no such table" in done.message
    assert serves(host, "r1") and whole(host)
    assert not (host.releases / "r3" / "failed.json").exists(), "it never served"


@pytest.mark.parametrize("at", ["configure", "switch", "renew", "confirm"])
def test_a_host_that_starts_again_serves_what_was_live_before_the_cut(
    host: FakeHost, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value for name, value in host.files().items() if "/wanted/" not in name}
    activate_and_cut(host, "r2", at, monkeypatch)
    host.stop_service()
    host.systemctl("start", "uwsgi-shop.service")
    assert serves(host, "r1") and whole(host)
    assert {name: value for name, value in host.files().items() if "/wanted/" not in name} == before


# --- releases: back, again, and which of them stay -------------------------------------------------------------------


def test_a_rollback_goes_to_the_previous_release_with_neither_migration_nor_hooks(host: FakeHost) -> None:
    host.want(migrate_command="alembic upgrade head", before_activate="bin/warm", after_activate="bin/tell")
    assert activate(host, "r2").code == DONE
    host.commands.clear()
    edit("environment")(host)
    done = host.call("rollback", "shop", "--json")
    assert (done.code, done.json["release"], done.json["from"]) == (DONE, "r1", "r2")
    assert serves(host, "r1") and whole(host)
    assert len(sandboxed(host)) == 1, "more than the proof"
    assert not re.search(r"alembic|bin/warm|bin/tell", " ".join(sandboxed(host)))
    assert "# edited" not in host.live("environment").read_text(), "a rollback took the wanted configuration"


@pytest.mark.parametrize("words", [("--json", "r1"), ("r1", "--json")], ids=" ".join)
def test_a_release_may_be_named_before_and_after_the_options(host: FakeHost, words: tuple[str, str]) -> None:
    assert activate(host, "r2").code == DONE
    assert host.call("rollback", "shop", *words).json["release"] == "r1"


def test_a_release_that_was_left_by_a_rollback_is_not_the_previous_one(host: FakeHost) -> None:
    host.build("r3")
    for release in ("r2", "r3"):
        assert activate(host, release).code == DONE
    assert host.call("rollback", "shop").code == DONE and serves(host, "r2")
    assert host.call("rollback", "shop").code == DONE and serves(host, "r1")
    done = host.call("rollback", "shop")
    assert done.code == REFUSED and "uwsgi-shop has no previous release to roll back to" in done.err
    assert host.call("rollback", "shop", "r3").code == DONE and serves(host, "r3")


def test_a_rollback_says_that_the_schema_stays(host: FakeHost) -> None:
    host.want(migrate_command="alembic upgrade head")
    for release, schema in (("r2", "0001"), ("r3", "0002")):
        host.build(release)
        host.migrated = f"INFO running\nuwsgi-sqlalchemy schema: {schema}\n"
        assert activate(host, release).code == DONE
    (note,) = host.call("rollback", "shop", "--json").json["notes"]
    assert note == "the database stays at schema 0002; release r2 was made for 0001. Nothing migrates it back."


def test_a_rollback_knows_the_schema_that_a_refused_release_left(host: FakeHost) -> None:
    host.want(migrate_command="alembic upgrade head")
    for release, schema, rehearsal in (("r2", "1", "200 ok"), ("r3", "1", "200 ok"), ("r4", "2", "500 x")):
        host.build(release, rehearsal=rehearsal)
        host.migrated = f"uwsgi-sqlalchemy schema: {schema}\n"
        activate(host, release)
    (note,) = host.call("rollback", "shop", "--json").json["notes"]
    assert note.startswith("the database stays at schema 2; release r2 was made for 1.")


def test_a_rollback_that_does_not_serve_is_put_back(host: FakeHost) -> None:
    assert activate(host, "r2").code == DONE
    host.build("r1", answer="500 x")
    done = host.call("rollback", "shop", "--json")
    assert done.code == PUT_BACK and done.message.endswith("Release r2 and its configuration are back and serve.")
    assert serves(host, "r2") and whole(host)


def test_a_reload_renews_every_worker_of_the_same_release(host: FakeHost) -> None:
    pids, master = host.pids(), host.main_pid
    assert host.call("reload", "shop", "--json").json["action"] == "chain reload"
    assert serves(host, "r1") and host.main_pid == master and not set(pids) & set(host.pids())
    lose_fifo(host)
    assert host.call("reload", "shop", "--json").json["action"] == "restart"
    assert serves(host, "r1") and host.main_pid != master


def test_a_worker_that_still_imports_is_not_passed_over(host: FakeHost) -> None:
    host.workers[0].imports_until = time.monotonic() + 0.3
    pids = host.pids()
    assert host.call("reload", "shop", "--json").json["action"] == "chain reload"
    assert serves(host, "r1") and not set(pids) & set(host.pids())


@pytest.mark.parametrize("verb", ["reload", "activate"])
def test_a_worker_that_never_gets_ready_is_not_waited_for(host: FakeHost, verb: str) -> None:
    host.want(SHORT)
    assert activate(host, "r1").code == DONE
    host.workers[0].imports_until = math.inf
    done = host.call("reload", "shop", "--json") if verb == "reload" else activate(host, "r2")
    assert done.code == DONE and done.json["action"] == "restart"
    assert "restart instead: a worker does not get ready for requests" in done.err
    assert serves(host, "r1" if verb == "reload" else "r2")
    assert json.loads((host.home / "journal.jsonl").read_text().splitlines()[-1])["how"] == "restart"


def test_how_the_service_was_renewed_is_noted_of_a_failure_too(host: FakeHost) -> None:
    host.want(SHORT)
    assert activate(host, "r1").code == DONE
    host.workers[0].imports_until = math.inf
    host.build("r2", answer="500 x")
    assert activate(host, "r2").code == PUT_BACK
    last = json.loads((host.home / "journal.jsonl").read_text().splitlines()[-1])
    assert (last["result"], last["how"]) == ("put back", "restart")


def test_a_chain_that_runs_already_leaves_no_worker_behind(host: FakeHost) -> None:
    host.pause = 0.2
    (host.root / "run/uwsgi-shop/master.fifo").write_bytes(b"c")
    pids = host.pids()
    while pids[0] in host.pids():
        time.sleep(0.01)
    done = activate(host, "r2")
    assert done.code == DONE and done.json["action"] == "chain reload"
    assert serves(host, "r2")


def test_the_journal_tells_who_did_what_and_how_it_ended(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "ada")
    host.build("r2", answer="500 x")
    host.build("r3", proves=False)
    for release in ("r2", "r3"):
        activate(host, release)
    host.build("r4")
    activate(host, "r4")
    host.call("rollback", "shop")
    told = host.call("journal", "shop", "--json").json
    assert [(entry["action"], entry["release"], entry["result"]) for entry in told] == [
        ("activate", "r1", "ok"),
        ("activate", "r2", "put back"),
        ("activate", "r3", "refused"),
        ("activate", "r4", "ok"),
        ("rollback", "r1", "ok"),
    ]
    assert {entry["who"] for entry in told[1:]} == {"ada"}
    assert "500, not 2xx" in told[1]["note"] and "ModuleNotFoundError: No module named 'shop'" in told[2]["note"]
    assert "put back" in host.call("journal", "shop").out


def test_releases_are_listed_newest_first_with_what_is_to_be_said_of_them(host: FakeHost) -> None:
    activate(host, "r2")
    host.build("r3", answer="500 x")
    activate(host, "r3")
    told = host.call("releases", "shop", "--json").json
    assert [(record["release"], record["state"]) for record in told] == [
        ("r3", ["failed"]),
        ("r2", ["current", "running"]),
        ("r1", ["previous"]),
    ]
    assert "r2" in host.call("releases", "shop").out


def kept(host: FakeHost) -> list[str]:
    return sorted(path.name for path in host.releases.iterdir())


def build_many(host: FakeHost) -> None:
    for number in range(2, 8):
        host.build(f"r{number}")


def test_the_newest_releases_stay_with_the_one_to_roll_back_to(host: FakeHost) -> None:
    build_many(host)
    host.want(keep_releases=4)
    assert activate(host, "r7").code == DONE
    assert kept(host) == ["r1", "r5", "r6", "r7"]
    assert host.call("rollback", "shop").code == DONE


def test_the_current_release_stays_however_old_it_is(host: FakeHost) -> None:
    build_many(host)
    host.want(keep_releases=2)
    assert activate(host, "r1").code == DONE
    assert kept(host) == ["r1", "r7"]


def test_a_release_that_a_worker_still_runs_stays(host: FakeHost) -> None:
    build_many(host)
    host.want({"keep_releases": 2})
    copy_by_hand("settings.json")(host)
    flip_by_hand(host)
    assert host.call("prune", "shop").out == "removed: r7, r6, r5, r4, r3\n"
    assert kept(host) == ["r1", "r2"]
    assert host.running() == ["r1", "r1"]


def test_nothing_goes_while_nobody_knows_what_the_workers_run(host: FakeHost) -> None:
    build_many(host)
    host.want({"keep_releases": 2})
    copy_by_hand("settings.json")(host)
    host.listeners.pop("stats").close()
    assert host.call("prune", "shop").out == "removed: nothing\n"
    assert len(kept(host)) == 7


def test_what_is_being_built_stays(host: FakeHost) -> None:
    (host.releases / "torso").mkdir()
    build_many(host)
    host.want(keep_releases=2)
    assert activate(host, "r7").code == DONE
    assert kept(host) == ["r1", "r7", "torso"]


# --- refusals of the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["status"], ["health"], ["activate", "r1"], ["note-start"]])
def test_an_unknown_application_is_named_with_those_that_are_known(host: FakeHost, command: list[str]) -> None:
    (host.root / "etc/uwsgi-annex/wanted").mkdir(parents=True)
    (host.root / "etc/uwsgi-annex/wanted/settings.json").write_text("{}")
    done = host.call(command[0], "shpo", *command[1:])
    message = "uwsgi-sqlalchemy: no application 'shpo' on this host; there are: annex, shop\n"
    assert (done.code, done.out, done.err) == (REFUSED, "", message)


def test_a_host_without_applications_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "App", functools.partial(program.App, root=root))
    assert FakeHost(root, program).call("status", "shop").err.endswith("there are: none\n")


@pytest.mark.parametrize("release", ["r9", "../r1", "", ".", "r1/app"])
def test_an_unknown_release_is_named_with_those_that_are_known(host: FakeHost, release: str) -> None:
    (host.releases / "torso/app").mkdir(parents=True)
    before = host.files()
    done = host.call("activate", "shop", release)
    message = f"uwsgi-sqlalchemy: uwsgi-shop has no release '{release}'; there are: r1, r2\n"
    assert (done.code, done.out, done.err) == (REFUSED, "", message)
    assert host.files() == before


def test_a_release_that_was_not_finished_is_unknown(host: FakeHost) -> None:
    (host.releases / "torso/app").mkdir(parents=True)
    assert activate(host, "torso").code == REFUSED


def test_two_runs_do_not_cross(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "ada")
    before = host.files()
    with program.App("shop").lock():
        since = time.strftime("%Y-%m-%dT%H:", time.gmtime())
        done = activate(host, "r2")
    assert done.code == LOCKED
    assert f"uwsgi-shop is being changed by ada, process {os.getpid()}, since {since}" in done.message
    assert done.message.endswith("; try again later")
    assert host.files() == before
    assert activate(host, "r2").code == DONE, "the lock is still held"


def test_a_lock_whose_holder_died_is_free(host: FakeHost) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    lock = host.root / "run/uwsgi-shop.lock"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert activate(host, "r2").code == LOCKED
        holder.kill()
    assert activate(host, "r2").code == DONE


def test_looking_needs_no_lock(host: FakeHost) -> None:
    with program.App("shop").lock():
        assert host.call("status", "shop").code == DONE
        assert host.call("health", "shop").code == DONE


@pytest.mark.parametrize(
    "arguments", [[], ["activate", "shop"], ["deploy", "shop"], ["status"], ["health", "shop", "--x"]]
)
def test_wrong_usage_is_exit_2(host: FakeHost, arguments: list[str]) -> None:
    done = host.call(*arguments)
    assert done.code == USAGE and "usage: uwsgi-sqlalchemy" in done.err


def test_the_help_names_every_command_and_exit_code(host: FakeHost) -> None:
    told = host.call("--help").out
    assert all(re.search(rf"^  {code}  \w", told, re.M) for code in range(8))
    for command in ("status", "releases", "journal", "health", "prove", "activate", "rollback", "reload", "prune"):
        assert re.search(rf"^    {command} +\w", told, re.M)


# --- what it tells ---------------------------------------------------------------------------------------------------


def test_status_tells_release_service_workers_and_health(host: FakeHost) -> None:
    done = host.call("status", "shop", "--json")
    assert done.code == DONE
    workers = [{"pid": pid, "accepting": True, "release": "r1"} for pid in host.pids()]
    assert done.json.items() >= {"app": "shop", "release": "r1", "service": "active", "workers": workers}.items()
    assert done.json["healthy"] is True
    assert re.search(r"^workers +2 of 2 accept requests$", host.call("status", "shop").out, re.M)


def test_status_tells_what_is_wrong(host: FakeHost) -> None:
    host.build("r1", answer="500 x")
    assert host.call("status", "shop", "--json").json["healthy"] is False
    flip_by_hand(host)
    told = host.call("status", "shop", "--json").json
    assert (told["release"], {worker["release"] for worker in told["workers"]}) == ("r2", {"r1"})


def test_a_worker_elsewhere_is_of_no_release(host: FakeHost) -> None:
    assert program.App("shop").release_of(os.getpid()) == ""
    assert program.App("shop").release_of(2**22 + 1) == ""


def test_an_activation_is_told_in_one_line(host: FakeHost) -> None:
    done = host.call("activate", "shop", "r2")
    wanted = r"shop: release r2 \(from r1\) by chain reload in [\d.]+ s; 2 workers; health /healthz: 200\n"
    assert done.code == DONE and re.fullmatch(wanted, done.out)
    again = host.call("activate", "shop", "r2").out
    assert again == "shop: release r2 serves already; nothing changed; health /healthz: 200\n"


def test_health_is_exit_0_or_1(host: FakeHost) -> None:
    done = host.call("health", "shop")
    assert (done.code, done.out) == (DONE, "uwsgi-shop is healthy: /healthz: 200\n")
    host.build("r1", answer="404 nothing here")
    done = host.call("health", "shop")
    assert (done.code, done.out) == (UNHEALTHY, "") and "404, not 2xx (nothing here)" in done.err


def test_a_start_is_noted_with_what_it_started(host: FakeHost) -> None:
    note = host.root / "run/uwsgi-shop.started"
    before = json.loads(note.read_text())
    edit("environment")(host)
    copy_by_hand("environment")(host)
    assert host.call("note-start", "shop").code == DONE
    after = json.loads(note.read_text())
    assert {name for name in after if after[name] != before[name]} == {"environment"}
    assert note.stat().st_mode & 0o777 == 0o600


# --- asking uWSGI ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [("200 fine", (200, "fine")), ("204 ", (204, "")), ("302 elsewhere", (302, "elsewhere")), ("500 ä", (500, "ä"))],
)
def test_an_answer_is_its_status_and_body(root: Path, answer: str, wanted: tuple[int, str]) -> None:
    listener = Listener(
        root / "s", lambda connection: bool(fakehost.asked(connection)) and fakehost.say(connection, answer)
    )
    try:
        assert program.ask_uwsgi(root / "s", "/", "localhost", 5) == wanted
    finally:
        listener.close()


def trickle(connection: socket.socket) -> bool:
    """Answer a byte now and then, so that no single wait is long."""
    while True:
        connection.sendall(b"H")
        time.sleep(0.05)


def junk(connection: socket.socket) -> bool:
    fakehost.asked(connection)
    connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")
    return True


@pytest.mark.parametrize("answer", [lambda _: False, trickle], ids=["nothing", "a byte now and then"])
def test_waiting_for_an_answer_ends_at_the_limit(root: Path, answer: Callable[[socket.socket], bool]) -> None:
    listener = Listener(root / "s", answer)
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            program.ask_uwsgi(root / "s", "/", "localhost", 0.3)
    finally:
        listener.close()
    assert 0.25 < time.monotonic() - began < 4


@pytest.mark.parametrize("answer", [lambda _: True, junk], ids=["closed", "another protocol"])
def test_no_answer_is_an_error(root: Path, answer: Callable[[socket.socket], bool]) -> None:
    listener = Listener(root / "s", answer)
    try:
        with pytest.raises(OSError):
            program.ask_uwsgi(root / "s", "/", "localhost", 5)
    finally:
        listener.close()


def test_no_socket_is_an_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        program.ask_uwsgi(root / "s", "/", "localhost", 5)


# --- the file itself -------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_with_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "environment"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        program.write(path, b"new", 0o600)
    assert path.read_text() == "old"
    monkeypatch.undo()
    program.write(path, b"new", 0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777, list(tmp_path.iterdir())) == (b"new", 0o600, [path])


def test_the_program_is_written_in_the_python_of_every_supported_host() -> None:
    source = (ROLE / "files/uwsgi_sqlalchemy.py").read_text()
    ast.parse(source, feature_version=(3, 9))
    with pytest.raises(SyntaxError):
        ast.parse(source + "\nmatch 1:\n    case _: pass\n", feature_version=(3, 9))


def test_the_program_runs_alone_with_the_standard_library() -> None:
    command = [sys.executable, "-I", "-S", str(ROLE / "files/uwsgi_sqlalchemy.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: uwsgi-sqlalchemy" in done.stdout
