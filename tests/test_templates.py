"""What the role writes on a host, for the defaults and for each variable that changes it."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

import pytest
from templating import GIVEN, TEMPLATES, evaluate, plain, render, variables

INI = "uwsgi-APP/uwsgi.ini"
SETTINGS = "uwsgi-APP/settings.json"
ENVIRONMENT = "uwsgi-APP/environment"
SERVICE = "systemd/system/uwsgi-APP.service"
SOCKET = "systemd/system/uwsgi-APP.socket"
SITE = "nginx/sites-available/uwsgi-APP.conf"


def options(text: str) -> list[tuple[str, str]]:
    """Return the `key = value` lines of an ini or a unit in their order, without comments and section names."""
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return [(key.strip(), value.strip()) for key, _, value in (line.partition("=") for line in lines)]


def ini(**given: Any) -> list[tuple[str, str]]:
    return options(render(INI, **given))


def differences(template: str, **given: Any) -> set[str]:
    """Return the lines in which a template differs from itself with the defaults, with - and + before them."""
    lines = difflib.ndiff(render(template).splitlines(), render(template, **given).splitlines())
    return {line for line in lines if line[0] in "-+"}


@pytest.mark.parametrize("template", [INI, SETTINGS, SERVICE, SOCKET, SITE])
def test_numbers_may_be_given_as_texts(template: str) -> None:
    # So they come from `-e processes=4` and from an inventory in ini format, where a specification does not convert.
    numbers = {
        name.removeprefix("uwsgi_sqlalchemy_"): 7
        for name, value in plain("defaults/main.yml").items()
        if type(value) is int
    }
    assert len(numbers) > 8
    assert render(template, **dict.fromkeys(numbers, "7")) == render(template, **numbers)
    nothing = dict.fromkeys(("max_requests", "max_worker_lifetime", "reload_on_rss", "post_buffering"), 0)
    assert render(template, **dict.fromkeys(nothing, "0")) == render(template, **nothing)
    yes_or_no = {"nginx": False, "allow_home": True, "allow_devices": True, "allow_writable_code": True}
    assert render(template, **{name: str(value) for name, value in yes_or_no.items()}) == render(template, **yes_or_no)


@pytest.mark.parametrize("template", [INI, SERVICE, SOCKET, SITE])
def test_files_are_tidy_and_say_who_wrote_them(template: str) -> None:
    more = {"uwsgi_options": [{"log-slow": 2000}], "service_options": ["MemoryMax=2G"], "nginx_options": ["gzip on;"]}
    for text in (render(template), render(template, **more)):
        assert text.startswith("# Ansible managed\n") and text.endswith("\n")
        assert not re.search(r"\n\n\n|[ \t]\n|[{}]{2}|\{[%#]|\n\n\Z", text)


def test_every_template_is_rendered_here() -> None:
    tested = {INI, SETTINGS, ENVIRONMENT, SERVICE, SOCKET, SITE}
    assert {path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*.j2")} == {
        f"{name}.j2" for name in tested
    }


# --- uwsgi.ini -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uwsgi", ["debian", "pyuwsgi"])
@pytest.mark.parametrize("debian", [12, 13])
def test_what_the_role_promises_is_always_set(debian: int, uwsgi: str) -> None:
    found = ini(debian=debian, uwsgi=uwsgi)
    home = "/srv/uwsgi-shop"
    assert set(found) >= {
        ("strict", "true"),
        ("lazy-apps", "true"),
        ("need-app", "true"),
        ("master", "true"),
        ("single-interpreter", "true"),
        ("enable-threads", "true"),
        ("socket", "fd://3"),
        ("chdir", "/"),
        ("hook-post-fork", f"chdir:{home}/current/app"),
        ("hook-post-fork", "unix_signal:1 _exit"),
        ("hook-master-start", "unix_signal:15 gracefully_kill_them_all"),
        ("pythonpath", f"{home}/current/app"),
        ("module", "wsgi:application"),
        ("processes", "4"),
        ("harakiri", "60"),
        ("reload-mercy", "60"),
        ("worker-reload-mercy", "60"),
        ("max-requests", "10000"),
        ("max-worker-lifetime", "86400"),
        ("buffer-size", "32768"),
        ("post-buffering", "65536"),
        ("listen", "1024"),
        ("stats", "/run/uwsgi-shop/stats.sock"),
        ("master-fifo", "/run/uwsgi-shop/master.fifo"),
    }
    keys = [key for key, _ in found]
    # uWSGI takes these two as lists.
    assert {key: keys.count(key) for key in keys if keys.count(key) > 1} == {"pythonpath": 2, "hook-post-fork": 2}
    # `lazy` changes what a reload does, `py-call-osafterfork` ends every worker on Python 3.13, `die-on-term` loses the
    # requests in flight, and `exit-on-reload` stops instead of reloading.
    assert not {"lazy", "py-call-osafterfork", "die-on-term", "exit-on-reload", "daemonize", "threads"} & set(keys)


def test_debians_uwsgi_loads_its_plugin_and_the_virtual_environment() -> None:
    found = dict(ini(uwsgi="debian"))
    assert (found["plugin"], found["virtualenv"]) == ("python3", "/srv/uwsgi-shop/current/venv")
    assert "binary-path" not in found


def test_pyuwsgi_is_executed_again_through_the_link_when_it_reloads() -> None:
    found = dict(ini(uwsgi="pyuwsgi"))
    assert found["binary-path"] == "/srv/uwsgi-shop/current/venv/bin/uwsgi"
    # It is part of the virtual environment and ignores the one; the other it does not have.
    assert not {"virtualenv", "plugin"} & found.keys()


def test_options_of_newer_versions_are_left_out_of_older_ones() -> None:
    # strict stops uWSGI on an option that it does not know; max-requests-delta came with 2.0.29.
    assert "max-requests-delta" not in dict(ini(debian=12)) | dict(ini(debian=13))
    assert dict(ini(uwsgi="pyuwsgi"))["max-requests-delta"] == "500"
    assert dict(ini(uwsgi="pyuwsgi", max_requests=1))["max-requests-delta"] == "1"
    assert dict(ini(__uwsgi_sqlalchemy_debian_uwsgi_version="2.0.29"))["max-requests-delta"] == "500"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("max_requests", {"max-requests", "max-requests-delta"}),
        ("max_worker_lifetime", {"max-worker-lifetime", "max-worker-lifetime-delta"}),
        ("reload_on_rss", {"reload-on-rss"}),
        ("post_buffering", {"post-buffering"}),
    ],
)
def test_zero_leaves_an_option_out(name: str, written: set[str]) -> None:
    on, off = dict(ini(uwsgi="pyuwsgi", **{name: 512})), dict(ini(uwsgi="pyuwsgi", **{name: 0}))
    assert on.keys() - off.keys() == written
    assert on.items() >= off.items()
    assert on[name.replace("_", "-")] == "512"


def test_threads_are_set_when_there_are_several() -> None:
    helped = {"+ threads = 4", "+ import = uwsgi_sqlalchemy_threads"}
    assert {line for line in differences(INI, threads=4) if "#" not in line} == helped


def test_a_uwsgi_that_ends_its_threads_itself_gets_no_help() -> None:
    new = {"__uwsgi_sqlalchemy_debian_uwsgi_version": "2.0.28", "max_requests": 0}
    assert dict(ini(threads=4, **new))["threads"] == "4"
    assert ("import", "uwsgi_sqlalchemy_threads") not in ini(threads=4, **new)
    assert ("import", "uwsgi_sqlalchemy_threads") in ini(threads=4)


def test_a_preforking_master_has_the_guard_and_stays_out_of_the_releases() -> None:
    found = ini(fork_mode="prefork")
    keys = [key for key, _ in found]
    assert not {"lazy-apps", "lazy", "hook-post-fork"} & set(keys)
    assert found.index(("import", "uwsgi_sqlalchemy_pin")) < found.index(("import", "uwsgi_sqlalchemy_guard"))
    assert dict(found).items() >= {
        ("py-call-uwsgi-fork-hooks", "true"),
        ("enable-threads", "true"),
        ("hook-pre-app", "chdir:/srv/uwsgi-shop/current/app"),
        ("hook-post-app", "chdir:/"),
        ("chdir", "/"),
    }
    assert "uwsgi_sqlalchemy_guard" not in dict(map(reversed, ini()))  # type: ignore[arg-type]


def test_the_module_may_lie_in_a_folder_of_the_source() -> None:
    assert differences(INI, pythonpath="src", module="shop.web:create()") == {
        "- pythonpath = /srv/uwsgi-shop/current/app",
        "+ pythonpath = /srv/uwsgi-shop/current/app/src",
        "- module = wsgi:application",
        "+ module = shop.web:create()",
    }


def test_the_users_options_come_last_in_their_order_with_repeated_keys_and_booleans_as_uwsgi_writes_them() -> None:
    given = [
        {"route": "^/a break:403"},
        {"cron2": "hour=3 /bin/a"},
        {"route": "^/b break:404"},
        {"thunder-lock": True},
        {"memory-report": False, "log-slow": 2000},
        {"cron2": "hour=4 /bin/{{ b }}"},
        {"http-auto-gzip": "True"},
    ]
    assert ini(uwsgi_options=given)[len(ini()) :] == [
        ("route", "^/a break:403"),
        ("cron2", "hour=3 /bin/a"),
        ("route", "^/b break:404"),
        ("thunder-lock", "true"),
        ("memory-report", "false"),
        ("log-slow", "2000"),
        ("cron2", "hour=4 /bin/{{ b }}"),
        ("http-auto-gzip", "True"),
    ]
    assert ini(uwsgi_options=given)[: len(ini())] == ini()


def test_two_applications_share_nothing() -> None:
    shop, other = (dict(ini(app=name)) for name in ("shop", "other"))
    for key in ("stats", "master-fifo", "hook-post-fork", "virtualenv", "procname-prefix-spaced"):
        assert "uwsgi-shop" in shop[key] and other[key] == shop[key].replace("uwsgi-shop", "uwsgi-other")


# --- environment -----------------------------------------------------------------------------------------------------


def read_by_systemd(text: str) -> dict[str, str]:
    """Return the variables of an EnvironmentFile= whose values all stand in double quotes, as systemd reads them.

    Inside double quotes a backslash makes the next one of " \\ ` $ plain, vanishes together with a line break, and is
    itself before anything else; a value goes on over line breaks up to its closing quote (systemd.exec(5), and
    parse_env_file_internal in systemd's src/basic/env-file.c).
    """
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        head = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_]*)="').match(text, position)
        assert head, f'no NAME=" at: {text[position : position + 40]!r}'
        position, value = head.end(), ""
        while text[position] != '"':
            if text[position] == "\\":
                position += 1
                following = text[position]
                value += following if following in '"\\`$' else "" if following == "\n" else "\\" + following
            else:
                value += text[position]
            position += 1
        found[head[1]] = value
        rest = re.compile(r"\s*(?:\n|\Z)").match(text, position + 1)
        assert rest, f"something follows the closing quote of {head[1]}"
        position = rest.end()
    return found


def test_the_reader_of_environment_files_follows_systemd() -> None:
    text = 'A="a b"\nB="\\"\\\\\\`\\$"\nC="\\n"\nD="1\n2"\nE="1\\\n2"\n\nF="#=\'"\n'
    assert read_by_systemd(text) == {"A": "a b", "B": '"\\`$', "C": "\\n", "D": "1\n2", "E": "12", "F": "#='"}
    for wrong in ('A="a" b\n', "A=a\n", 'A="a"\n#"\n'):
        with pytest.raises(AssertionError):
            read_by_systemd(wrong)


AWKWARD = {
    "EMPTY": "",
    "SPACES": "  a  b\t",
    "QUOTES": """a"b'c""",
    "BACKSLASHES": r"\ \\ \n \" \$ end\ "[:-1],
    "DOLLARS": "$HOME ${HOME} $$ $(id) `id`",
    "LINES": "-----BEGIN KEY-----\nab\\\ncd\n\n-----END KEY-----\n",
    "COMMENT": "# ; not a comment",
    "EQUALS": "a=b\nFORGED=1",
    "SPECIFIERS": "%n %% %h",
    "TEMPLATE": "{{ lookup('env', 'HOME') }} {% if %} {# #}",
    "LETTERS": "pässwört ☃",
    "GROUPS": r"\1 \g<0> \\1",
}


def test_awkward_values_arrive_as_they_were_given() -> None:
    assert read_by_systemd(render(ENVIRONMENT, environment=AWKWARD)) == AWKWARD


def test_values_that_are_no_texts_are_written_as_texts() -> None:
    assert read_by_systemd(render(ENVIRONMENT, environment={"A": 1, "B": 2.5, "C": True})) == {
        "A": "1",
        "B": "2.5",
        "C": "True",
    }


def test_the_database_url_is_the_environments_when_it_is_given() -> None:
    url = "postgresql+psycopg://shop:p%40ss$word@db/shop"
    assert read_by_systemd(render(ENVIRONMENT, database_url=url)) == {"DATABASE_URL": url}
    both = read_by_systemd(render(ENVIRONMENT, database_url=url, environment={"KEY": "x"}))
    assert both == {"DATABASE_URL": url, "KEY": "x"}
    assert render(ENVIRONMENT) == ""


def test_secrets_are_in_no_other_file() -> None:
    given = {"database_url": "postgresql+psycopg://shop:hunter2@db/shop", "environment": {"KEY": "hunter2"}}
    assert "hunter2" in render(ENVIRONMENT, **given)
    for template in (INI, SETTINGS, SERVICE, SOCKET, SITE):
        assert render(template, **given) == render(template)


# --- units -----------------------------------------------------------------------------------------------------------


def service(**given: Any) -> dict[str, list[str]]:
    """Return the values of each key of the service's [Service] section."""
    text = render(SERVICE, **given).partition("[Service]")[2].partition("[Install]")[0]
    found: dict[str, list[str]] = {}
    for key, value in options(text):
        found.setdefault(key, []).append(value)
    return found


def test_the_service_runs_as_the_applications_account_and_counts_as_started_when_it_answers() -> None:
    found = service()
    assert found["User"] == found["Group"] == found["StateDirectory"] == found["RuntimeDirectory"] == ["uwsgi-shop"]
    assert found["ExecStartPre"] == ["+/usr/local/sbin/uwsgi-sqlalchemy note-start shop"]
    assert found["ExecStart"] == ["/usr/bin/uwsgi --ini /etc/uwsgi-shop/uwsgi.ini"]
    assert found["ExecStartPost"] == ["+/usr/local/sbin/uwsgi-sqlalchemy health shop"]
    assert found["EnvironmentFile"] == ["/etc/uwsgi-shop/environment"]
    assert found["UnsetEnvironment"] == ["LISTEN_PID LISTEN_FDS LISTEN_FDNAMES"]
    assert "Requires=uwsgi-shop.socket" in render(SERVICE).splitlines()
    assert service(uwsgi="pyuwsgi")["ExecStart"] == [
        "/srv/uwsgi-shop/current/venv/bin/uwsgi --ini /etc/uwsgi-shop/uwsgi.ini"
    ]


def test_the_limits_of_start_and_stop_are_longer_than_what_they_wait_for() -> None:
    found = service(health_timeout=100, harakiri=300)
    assert int(found["TimeoutStartSec"][0]) > 100
    assert int(found["TimeoutStopSec"][0]) > 300


def test_the_sandbox_is_shut_by_default() -> None:
    found = {key: values for key, values in service().items() if values != ["true"]}
    assert found["ProtectSystem"] == ["strict"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["ProtectProc"] == ["invisible"]
    assert found["RestrictAddressFamilies"] == ["AF_UNIX AF_INET AF_INET6"]
    assert found["SystemCallFilter"] == ["@system-service", "~@privileged @resources"]
    assert found["UMask"] == ["0027"]
    assert "ReadWritePaths" not in found
    shut = {key for key, values in service().items() if values == ["true"]}
    assert shut >= {
        *(
            "LockPersonality",
            "MemoryDenyWriteExecute",
            "NoNewPrivileges",
            "PrivateDevices",
            "PrivateTmp",
            "ProtectClock",
        ),
        *("ProtectControlGroups", "ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules"),
        *("ProtectKernelTunables", "RemoveIPC", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID"),
    }


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            {"writable_paths": ["/srv/media", "/var/spool/shop"]},
            {"+ ReadWritePaths=/srv/media", "+ ReadWritePaths=/var/spool/shop"},
        ),
        (
            {"address_families": ["AF_UNIX", "AF_NETLINK"]},
            {"- RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6", "+ RestrictAddressFamilies=AF_UNIX AF_NETLINK"},
        ),
        ({"system_calls": ["@resources", "ptrace"]}, {"+ SystemCallFilter=@resources ptrace"}),
        ({"allow_writable_code": True}, {"- MemoryDenyWriteExecute=true", "+ MemoryDenyWriteExecute=false"}),
        ({"allow_devices": True}, {"- PrivateDevices=true", "+ PrivateDevices=false"}),
        ({"allow_home": True}, {"- ProtectHome=true", "+ ProtectHome=read-only"}),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_a_relaxation_changes_its_own_line_and_no_other(given: dict[str, Any], lines: set[str]) -> None:
    assert differences(SERVICE, **given) == lines


def test_allowed_system_calls_come_after_the_refused_ones() -> None:
    # The last word on a system call counts.
    assert service(system_calls=["@resources"])["SystemCallFilter"][-1] == "@resources"


def test_the_users_lines_end_the_service_section() -> None:
    lines = ["MemoryMax=2G", "ProtectHome=tmpfs"]
    text = render(SERVICE, service_options=lines)
    assert text.partition("[Service]")[2].partition("\n\n[Install]")[0].splitlines()[-2:] == lines
    assert differences(SERVICE, service_options=lines) >= {f"+ {line}" for line in lines}


def test_only_nginx_and_root_may_use_the_socket() -> None:
    found = dict(options(render(SOCKET)))
    assert (
        found.items()
        >= {
            "ListenStream": "/run/uwsgi-shop.socket",
            "SocketUser": "root",
            "SocketGroup": "www-data",
            "SocketMode": "0660",
            "Backlog": "1024",
        }.items()
    )
    assert differences(SOCKET, nginx=False) == {"- SocketGroup=www-data", "+ SocketGroup=uwsgi-shop"}


# --- Nginx -----------------------------------------------------------------------------------------------------------


def test_without_names_the_site_is_the_hosts_default() -> None:
    text = render(SITE)
    assert re.findall(r"^    (?:listen|server_name) .*", text, re.M) == [
        "    listen 80 default_server;",
        "    listen [::]:80 default_server;",
        "    server_name _;",
    ]


def test_with_names_the_site_answers_to_them_alone() -> None:
    text = render(SITE, server_names=["shop.example", "*.shop.example"], listen=["443 ssl"])
    assert re.findall(r"^    (?:listen|server_name) .*", text, re.M) == [
        "    listen 443 ssl;",
        "    server_name shop.example *.shop.example;",
    ]


def test_requests_go_to_the_socket_that_systemd_holds() -> None:
    listening = dict(options(render(SOCKET)))["ListenStream"]
    upstream, servers = re.findall(r"^upstream (\S+) {\n((?:    server .*;\n)+)}", render(SITE), re.M)[0]
    # A second server is what makes Nginx ask again, and one that failed must not be left out: there is no other.
    assert servers == f"    server unix:{listening} max_fails=0;\n" * 2
    assert f"        uwsgi_pass {upstream};" in render(SITE).splitlines()


@pytest.mark.parametrize("harakiri", [1, 60, 600])
def test_nginx_waits_longer_than_harakiri(harakiri: int) -> None:
    found = re.search(r"uwsgi_read_timeout (\d+)s;", render(SITE, harakiri=harakiri))
    assert found and int(found[1]) == harakiri + 5 > int(dict(ini(harakiri=harakiri))["harakiri"])


def test_static_files_come_from_the_current_release() -> None:
    text = render(SITE, static={"/static": "shop/static", "/media/img": "img"})
    places = re.findall(r"    location (\S+) \{\n        alias (\S+);\n    \}", text)
    home = "/srv/uwsgi-shop/current/app"
    assert places == [("/static/", f"{home}/shop/static/"), ("/media/img/", f"{home}/img/")]
    assert "alias" not in render(SITE)


def test_the_users_lines_end_the_server_block() -> None:
    lines = ["ssl_certificate /etc/ssl/certs/shop.pem;", "location /x { return 200 '{{ a }}'; }"]
    text = render(SITE, nginx_options=lines)
    assert text.splitlines()[-3:] == [*(f"    {line}" for line in lines), "}"]
    assert text.startswith(render(SITE).removesuffix("}\n"))
    assert text.count("{") == text.count("}")


def test_the_size_of_a_body_is_the_given_one() -> None:
    assert differences(SITE, client_max_body_size="2g") == {
        "-     client_max_body_size 10m;",
        "+     client_max_body_size 2g;",
    }


# --- settings.json ---------------------------------------------------------------------------------------------------


def settings(**given: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(render(SETTINGS, **given))
    return found


def test_the_program_gets_its_settings_as_json_of_the_right_types() -> None:
    found = settings(processes="2", migrate_command='sh -c "echo \\"ä\\""')
    assert found["processes"] == 2
    assert found["migrate_command"] == 'sh -c "echo \\"ä\\""'
    numbers = ("processes", "harakiri", "health_timeout", "keep_releases")
    assert {name: type(found[name]) for name in numbers} == dict.fromkeys(numbers, int)
    assert (found["health_path"], found["uwsgi"]) == ("/healthz", "debian")


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        ([], "localhost"),
        (["shop.example", "www.shop.example"], "shop.example"),
        (["*.shop.example", "~^x", ".y", "www.shop.example"], "www.shop.example"),
        (["*.shop.example"], "localhost"),
    ],
)
def test_health_is_asked_under_a_name_of_the_site(names: list[str], asked: str) -> None:
    assert settings(server_names=names)["health_host"] == asked


def release(**given: Any) -> str:
    return str(evaluate("{{ __uwsgi_sqlalchemy_release }}", variables(**given)))


def test_a_release_is_named_by_what_is_in_it() -> None:
    host = {"stdout": json.dumps({"python": "cpython-313 /usr/bin/python3", "uv": ""})}
    others = [
        release(__uwsgi_sqlalchemy_packed={"stdout": "1" * 64}),
        release(__uwsgi_sqlalchemy_host=host),
        release(requirements="none"),
        release(uwsgi="pyuwsgi"),
        release(source={"package": "shop==1.0"}),
    ]
    assert len({release(), *others}) == 6
    assert all(re.fullmatch("[0-9a-f]{12}", name) for name in others)


def test_a_release_is_not_named_by_how_it_is_served_or_built() -> None:
    with_uv = {"stdout": GIVEN["__uwsgi_sqlalchemy_host"]["stdout"].replace('"uv": ""', '"uv": "/usr/bin/uv"')}
    served = {"processes": 9, "server_names": ["a"], "environment": {"A": "1"}, "uwsgi_options": [{"log-slow": 1}]}
    assert release(**served, __uwsgi_sqlalchemy_host=with_uv, installer="uv") == release()
