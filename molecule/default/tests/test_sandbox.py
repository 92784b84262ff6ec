from __future__ import annotations

from testinfra.host import Host
from testkit.apps import Deployed


def exposure(host: Host, unit: str) -> float:
    said = host.check_output("systemd-analyze security --no-pager %s | tail -1", unit)
    return float(said.partition(": ")[2].split()[0])


def test_service_is_hardly_exposed(app: Deployed) -> None:
    assert exposure(app.host, f"{app.unit}.service") <= 2.0
    assert exposure(app.host, "nginx.service") > 8.0, "the same figure for a service without a sandbox"


def test_code_is_not_writable_by_its_account(app: Deployed) -> None:
    assert app.as_account(f"find /srv/{app.unit}/ -writable -not -type l").stdout == ""
    assert app.as_account("find /etc /usr /opt /var/log -writable -not -type l -not -type c").stdout == ""
    assert app.as_account(f"test -w /var/lib/{app.unit}").rc == 0


def test_workers_see_a_read_only_system(shelf: Deployed) -> None:
    pid = str(min(shelf.pids()))
    for path in ("/etc", "/usr", "/srv/uwsgi-shelf", "/var/log"):
        refused = shelf.host.run("nsenter --target %s --mount touch %s/probe", pid, path)
        assert "Read-only file system" in refused.stderr
    allowed = shelf.host.run(
        "nsenter --target %s --mount sh -c 'touch /var/lib/uwsgi-shelf/probe && rm /var/lib/uwsgi-shelf/probe'", pid
    )
    assert allowed.rc == 0


def test_workers_have_private_temporary_files_and_no_devices(shelf: Deployed) -> None:
    pid = str(min(shelf.pids()))
    shelf.host.check_output("touch /tmp/of-the-host")
    assert shelf.host.run("nsenter --target %s --mount test -e /tmp/of-the-host", pid).rc == 1
    assert shelf.host.run("nsenter --target %s --mount test -e /dev/kmsg", pid).rc == 1
    assert shelf.host.run("nsenter --target %s --mount test -e /dev/urandom", pid).rc == 0


def test_workers_can_gain_no_privileges(shelf: Deployed) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in shelf.host.check_output("cat /proc/%s/status", str(min(shelf.pids()))).splitlines()
        if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["CapBnd"], 16) == 0
    assert int(status["CapEff"], 16) == 0


def test_system_directories_still_belong_to_root(host: Host) -> None:
    for path in ("/", "/etc", "/usr", "/usr/local/sbin", "/var", "/srv", "/run"):
        assert (host.file(path).user, host.file(path).mode & 0o022) == ("root", 0)
