from __future__ import annotations

from testkit.apps import Deployed


def test_start_fails_while_the_application_does_not_answer_its_health_path(annex: Deployed) -> None:
    host, drop_in = annex.host, "/run/systemd/system/uwsgi-annex.service.d"
    host.check_output(
        "mkdir -p %s && printf '[Service]\\nRestart=no\\nEnvironmentFile=/run/broken-database\\n' > %s/broken.conf"
        " && echo DATABASE_URL=sqlite:////var/lib/absent/no.sqlite > /run/broken-database && systemctl daemon-reload",
        drop_in,
        drop_in,
    )
    try:
        restarted = host.run("systemctl restart uwsgi-annex.service")
        assert restarted.rc != 0
        assert host.service("uwsgi-annex.service").is_running is False
        said = host.check_output("journalctl --unit uwsgi-annex.service --output cat --lines 50")
        assert "it answers 503, not 2xx" in said
    finally:
        host.check_output("rm -r %s /run/broken-database && systemctl daemon-reload && systemctl reset-failed", drop_in)
        started = host.run("systemctl restart uwsgi-annex.service")
    assert started.rc == 0, "the same start succeeds once the database is there"
    assert host.service("uwsgi-annex.service").is_running is True
