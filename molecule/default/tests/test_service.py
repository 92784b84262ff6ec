from __future__ import annotations

import re

from testinfra.host import Host
from testkit.apps import Deployed

WORKERS = {"shelf": 4, "annex": 2, "testapp": 1}
PATHS = {"shelf": "/healthz", "annex": "/healthz", "testapp": "/"}


def test_service_and_socket_run_now_and_at_boot(app: Deployed) -> None:
    for unit in (f"{app.unit}.service", f"{app.unit}.socket"):
        service = app.host.service(unit)
        assert service.is_running is True
        assert service.is_enabled is True
    assert app.host.service("nginx").is_enabled is True


def test_uwsgi_says_that_all_workers_serve_the_current_release(app: Deployed) -> None:
    workers = app.stats()["workers"]
    assert len(workers) == WORKERS[app.name]
    assert [worker["accepting"] for worker in workers] == [1] * len(workers)
    release = app.release()
    assert re.fullmatch("[0-9a-f]{12}", release)
    for pid in app.pids():
        assert app.host.check_output("readlink /proc/%s/cwd", str(pid)) == f"/srv/{app.unit}/releases/{release}/app"


def test_each_worker_has_loaded_the_application_itself(app: Deployed) -> None:
    stats = app.stats()
    for worker in stats["workers"]:
        assert [loaded["mountpoint"] for loaded in worker["apps"]] == [""]
    # The master has imported nothing: no library of the virtual environment is mapped into it.
    if app.name == "shelf":
        mapped = app.host.check_output("cat /proc/%s/maps", str(stats["pid"]))
        assert "/venv/" not in mapped
        assert "/venv/" in app.host.check_output("cat /proc/%s/maps", str(stats["workers"][0]["pid"]))


def test_threads_are_as_wanted(shelf: Deployed, annex: Deployed) -> None:
    assert {len(worker["cores"]) for worker in shelf.stats()["workers"]} == {1}
    assert {len(worker["cores"]) for worker in annex.stats()["workers"]} == {2}


def test_annex_runs_the_newer_uwsgi(shelf: Deployed, annex: Deployed) -> None:
    assert annex.stats()["version"] == "2.0.30"
    assert shelf.stats()["version"].startswith({"12": "2.0.21", "13": "2.0.28"}[shelf.host.system_info.release[:2]])


def test_requests_wait_in_a_queue_of_the_wanted_length(app: Deployed) -> None:
    assert app.stats()["listen_queue_errors"] == 0
    queue = app.host.check_output("ss -Hlx src unix:/run/%s.socket", app.unit).split()
    assert queue[3] == "1024"


def test_site_answers_through_nginx_under_its_own_name(app: Deployed) -> None:
    asked = (
        "import sys, urllib.request as r; "
        "print(r.urlopen(r.Request(sys.argv[1], headers={'Host': sys.argv[2]})).status)"
    )
    name = "anything.example" if app.name == "shelf" else f"{app.name}.test"
    assert app.host.check_output("python3 -c %s %s %s", asked, f"http://127.0.0.1{PATHS[app.name]}", name) == "200"


def test_nginx_serves_static_files_itself(shelf: Deployed) -> None:
    (style,) = shelf.host.check_output("ls /srv/uwsgi-shelf/current/app/shelf/static/*.css").split()
    before = sum(worker["requests"] for worker in shelf.stats()["workers"])
    asked = "import sys, urllib.request as r; sys.stdout.write(r.urlopen(sys.argv[1]).read().decode())"
    served = shelf.host.check_output("python3 -c %s %s", asked, f"http://127.0.0.1/static/{style.rpartition('/')[2]}")
    assert served == shelf.host.file(style).content_string.strip()
    assert sum(worker["requests"] for worker in shelf.stats()["workers"]) == before


def test_debian_welcome_page_is_gone(host: Host) -> None:
    assert host.file("/etc/nginx/sites-enabled/default").exists is False
    assert host.run("nginx -t -q").rc == 0


def test_own_options_reach_uwsgi_in_order(annex: Deployed) -> None:
    ini = annex.host.file("/etc/uwsgi-annex/uwsgi.ini").content_string
    options = ini.partition("# uwsgi_sqlalchemy_uwsgi_options\n")[2]
    assert options == "log-slow = 1000\nstatic-expires = /a/* 1\nlog-4xx = true\nstatic-expires = /b/* 2\n"


def test_sources_are_what_was_asked_for(host: Host) -> None:
    for app, requirement in {"shelf": "flask", "annex": "flask", "testapp": "werkzeug"}.items():
        found = host.run(f"/srv/uwsgi-{app}/current/venv/bin/python -c 'import {requirement}'")
        assert found.rc == 0
    lock = {"12": "pylock.toml", "13": "uv.lock"}[host.system_info.release[:2]]
    assert host.file(f"/srv/uwsgi-annex/current/app/{lock}").is_file is True
    assert host.file("/srv/uwsgi-annex/current/app/requirements.txt").exists is False
    # Debian 12's host has no uv of its own: the role brought one for the pylock.toml alone.
    assert host.file("/usr/local/lib/uwsgi-sqlalchemy/uv/bin/uv").exists is (lock == "pylock.toml")
