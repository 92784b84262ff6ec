"""What is removed when there are more releases than are to be kept. It comes last: the variants are gone then."""

from __future__ import annotations

from testkit.apps import Deployed
from testkit.releases import activate, command, look, program, versions


def kept(app: Deployed) -> set[str]:
    return set(versions(app).values())


def test_prune_keeps_what_is_current_previous_or_running(one: Deployed) -> None:
    ids = versions(one)
    for version in ("v1", "v3", "v4"):
        assert activate(one, version).code == 0
    assert len(kept(one)) > 8
    # Workers run v4 and `current` is v3, before which v1 was good: whoever moved the link, what runs must stay.
    one.host.check_output("ln -sfn releases/%s /srv/%s/current", ids["v3"], one.unit)
    for place in ("", "wanted/"):
        one.host.check_output("sed -i '/\"keep_releases\"/s/50/2/' /etc/%s/%ssettings.json", one.unit, place)
    ran = program(one, "prune")
    assert ran.code == 0, ran.said
    assert kept(one) == {ids["v1"], ids["v3"], ids["v4"]}
    assert set(look(one).workers.values()) == {ids["v4"]}
    command(one, "ln -sfn releases/%s /srv/%s/current", ids["v4"], one.unit)
    assert program(one, "prune").code == 0
    assert kept(one) == {ids["v3"], ids["v4"]}
