"""What is removed when there are more releases than are to be kept. It comes last: the variants are gone then."""

from __future__ import annotations

from testkit.apps import Deployed
from testkit.releases import activate, command, look, program, versions


def kept(app: Deployed) -> set[str]:
    return set(versions(app).values())


def test_prune_keeps_what_is_current_previous_or_running(app: Deployed) -> None:
    ids = versions(app)
    for version in ("v1", "v3", "v4"):
        assert activate(app, version).code == 0
    assert len(kept(app)) > 8
    # Workers run v4 and `current` is v3, before which v1 was good: whoever moved the link, what runs must stay.
    app.host.check_output("ln -sfn releases/%s /srv/%s/current", ids["v3"], app.unit)
    for place in ("", "wanted/"):
        app.host.check_output("sed -i '/\"keep_releases\"/s/50/2/' /etc/%s/%ssettings.json", app.unit, place)
    ran = program(app, "prune")
    assert ran.code == 0, ran.said
    assert kept(app) == {ids["v1"], ids["v3"], ids["v4"]}
    assert set(look(app).workers.values()) == {ids["v4"]}
    command(app, "ln -sfn releases/%s /srv/%s/current", ids["v4"], app.unit)
    assert program(app, "prune").code == 0
    assert kept(app) == {ids["v3"], ids["v4"]}
