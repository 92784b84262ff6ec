from __future__ import annotations

import pytest
from testinfra.host import Host
from testkit.apps import Deployed

# As converge.yml gives it to the application.
AWKWARD = "p@ss/ \"double\" 'single' $HOME ${HOME} `id` \\n \\ %n %% #; ünï"
SECRET_FILES = ["/etc/uwsgi-shelf/environment", "/etc/uwsgi-shelf/wanted/environment"]


@pytest.mark.parametrize("path", SECRET_FILES)
def test_secrets_are_for_root_alone(host: Host, path: str) -> None:
    file = host.file(path)
    assert (file.user, file.group, file.mode) == ("root", "root", 0o600)
    assert 'SECRET_KEY="s3cret-of-shelf"' in file.content_string


def test_peers_cannot_read_what_is_private(shelf: Deployed) -> None:
    pid = min(shelf.pids())
    private = [
        *SECRET_FILES,
        f"/proc/{pid}/environ",
        "/var/lib/uwsgi-shelf/shelf.sqlite",
        "/srv/uwsgi-shelf/current/app/wsgi.py",
    ]
    for path in private:
        assert shelf.host.run("cat %s", path).rc == 0, "root can read it, so that the refusals below mean something"
        for peer in ("uwsgi-annex", "nobody"):
            refused = shelf.as_account(f"cat {path}", peer)
            assert refused.rc != 0
            assert "Permission denied" in refused.stderr


def test_only_nginx_and_root_reach_the_uwsgi_socket(shelf: Deployed) -> None:
    file = shelf.host.file("/run/uwsgi-shelf.socket")
    assert file.is_socket is True
    assert (file.user, file.group, file.mode) == ("root", "www-data", 0o660)
    connect = "python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"/run/uwsgi-shelf.socket\")'"
    assert shelf.as_account(connect, "www-data").rc == 0
    for peer in ("uwsgi-annex", "uwsgi-shelf", "nobody"):
        assert "PermissionError" in shelf.as_account(connect, peer).stderr


def test_statistics_and_commands_are_for_the_account_and_root(shelf: Deployed) -> None:
    for name in ("stats.sock", "master.fifo"):
        assert shelf.as_account(f"test -e /run/uwsgi-shelf/{name}").rc == 0
        assert shelf.as_account(f"test -e /run/uwsgi-shelf/{name}", "uwsgi-annex").rc != 0


def test_application_gets_awkward_values_unchanged(annex: Deployed) -> None:
    variables = annex.host.check_output("cat /proc/%s/environ | tr '\\0' '\\001'", str(min(annex.pids()))).split("\x01")
    assert f"AWKWARD={AWKWARD}" in variables


def test_no_process_list_journal_or_other_file_shows_a_secret(host: Host) -> None:
    # Cut in two, so that sudo's log of these very commands does not hold it.
    secret = 's3cret-of-""shelf'
    search = "grep --recursive --files-with-matches -F %s"
    assert host.check_output(f"{search} /etc" % secret).split() == SECRET_FILES
    assert host.run(f"{search} /run /var/log /tmp /srv /home /root /var/lib" % secret).stdout == ""
    assert "s3cret-of-shelf" not in host.check_output("ps -eo args")
    assert "s3cret-of-shelf" not in host.check_output("journalctl --no-pager")
