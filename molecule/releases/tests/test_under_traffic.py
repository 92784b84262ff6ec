"""Everything that happens to a deployment, done while clients ask all the time; then what the clients saw of it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from testkit import hosts
from testkit.apps import Deployed
from testkit.releases import Ran, activate, command, look, program, versions
from testkit.story import Play, Seen, Story

CUT = "python3 /opt/cut.py %s activate %s %s --json"
# What each of them does is said in variants.py.
REFUSED = (
    "broken-import",
    "missing-dependency",
    "no-callable",
    "failing-migration",
    "broken-request",
    "broken-health",
    "redirected-health",
)


@dataclass
class Told:
    """The story, when it is over."""

    story: Story
    ones: list[Deployed]  # one application of each host, for the plays, which take their time
    names: dict[tuple[str, str], dict[str, str]]  # by host and application, the ids of the releases by their variant
    cuts: list[str] = field(default_factory=list)
    second: dict[tuple[str, str], Ran] = field(default_factory=dict)  # the deploy that came while another ran

    def __post_init__(self) -> None:
        self.apps = {str(app.host.backend.hostname): [app.name] for app in self.ones}
        self.unchanged = Play(variant="v2", apps=self.apps)


def cut(app: Deployed, number: int, variant: str) -> Ran:
    """Activate a variant with the program killed before its step of that number; 0 lets it finish."""
    return command(app, CUT, str(number), app.name, versions(app)[variant])


def steps(ran: Ran) -> list[str]:
    """Return the steps that cut.py told of."""
    return [line.partition(" ")[2] for line in ran.errors.splitlines() if line.startswith("cut: ")]


def kill_worker(app: Deployed) -> Ran:
    return command(app, "kill -KILL %s && sleep 3", str(min(look(app).workers)))


def kill_master(app: Deployed) -> Ran:
    return command(app, "systemctl kill --kill-whom=main --signal=KILL %s.service && sleep 6", app.unit)


def stop_and_start(app: Deployed) -> Ran:
    units = f"{app.unit}.socket {app.unit}.service"
    return command(app, f"systemctl stop {units}; systemctl start {units}")


def link_alone(app: Deployed, variant: str) -> Ran:
    """Let `current` name another release, and nothing else."""
    return command(app, "ln -sfn releases/%s /srv/%s/current && sleep 3", versions(app)[variant], app.unit)


def without(app: Deployed, file: str, version: str) -> Ran:
    """Activate a version after one of the files that the service is steered by has gone."""
    app.host.check_output("rm /run/%s/%s", app.unit, file)
    return activate(app, version)


def stopped(app: Deployed) -> Ran:
    """Activate v4 while the service is stopped; the socket is not, and the next request would start it again."""
    app.host.check_output("systemctl stop %s.service", app.unit)
    return activate(app, "v4")


def impatient(app: Deployed) -> Ran:
    """Activate a release that does not answer its health path, with 10 seconds for it instead of 30."""
    settings = f"/etc/{app.unit}/wanted/settings.json"
    app.host.check_output("sed -i.kept '/health_timeout/s/30/10/' %s", settings)
    try:
        return activate(app, "silent-health")
    finally:
        app.host.check_output("mv %s.kept %s", settings, settings)


def repaired(app: Deployed) -> Ran:
    """Activate the release that failed before, after what it needs is there."""
    app.host.check_output("touch /var/lib/%s/repaired", app.unit)
    return activate(app, "broken-live", "--retry")


def deploy_good_and_broken_releases(told: Told) -> None:
    do = told.story.step
    do("v1 serves", lambda app: command(app, "sleep 2"))
    do("deploy v2", Play(variant="v2"))
    do("deploy v2 once more", told.unchanged, to=told.ones)
    for variant in (*REFUSED, "broken-live"):
        do(f"deploy {variant}", partial(activate, version=variant))
    do("deploy broken-live once more", partial(activate, version="broken-live"))
    do("roll back", lambda app: program(app, "rollback"))
    do("roll back once more", lambda app: program(app, "rollback"))
    do("change the configuration", Play(setting="two", apps=told.apps), to=told.ones)
    do("deploy silent-health", impatient)
    do("retry broken-live, repaired", repaired)
    do("roll back from it", lambda app: program(app, "rollback"))


def disturb_the_service(told: Told) -> None:
    do = told.story.step
    do("reload", lambda app: program(app, "reload"))
    do("systemctl restart", lambda app: command(app, "systemctl restart %s.service", app.unit))
    do("kill a worker", kill_worker)
    do("kill the master", kill_master, one_by_one=True)
    do("deploy v4 without the FIFO", partial(without, file="master.fifo", version="v4"))
    do("deploy v3 without statistics", partial(without, file="stats.sock", version="v3"))
    do("deploy v4 to a stopped service", stopped)


def cut_deploys_short(told: Told) -> None:
    do = told.story.step
    whole = do("deploy v3", partial(cut, number=0, variant="v3"))
    told.cuts = steps(whole[0].ran)
    numbered = list(enumerate(told.cuts, start=1))
    configure = told.cuts.index("configure") + 1

    # Every step is cut on both platforms and with one thread and two, though not in all four combinations.
    others = [app for app in told.story.applications if app not in told.ones]
    for apps, mine in ((told.ones, numbered[0::2]), (others, numbered[1::2])):
        new, old = "v4", "v3"
        for number, name in mine:
            do(f"deploy cut before {name}", partial(cut, number=number, variant=new), to=apps)
            # Until then nothing has been touched, which the tests see; the next cut is the deploy that comes after.
            if number > configure:
                do(f"deploy again after {name}", partial(activate, version=new), to=apps)
                new, old = old, new

    def two_at_once(app: Deployed) -> Ran:
        first: list[Ran] = []
        thread = threading.Thread(target=lambda: first.append(activate(app, "v2")))
        thread.start()
        time.sleep(2)
        told.second[Story.key(app)] = activate(app, "v1")
        thread.join()
        return first[0]

    do("two deploys at once", two_at_once)

    every = threading.Barrier(len(told.story.applications))

    def cut_power(app: Deployed) -> Ran:
        # The link is the new release's and the workers are the old one's when the power goes.
        ran = cut(app, told.cuts.index("renew") + 1, "v3")
        every.wait(300)
        if app in told.ones:
            hosts.power_cut(app.host.backend.hostname)
        every.wait(300)
        return ran

    do("deploy and power cut", cut_power, after=5)
    do("deploy again after the power cut", partial(activate, version="v3"))


def make_the_checks_fail(told: Told) -> None:
    do = told.story.step
    do("control: a release mixed of two", partial(activate, version="mixed"))
    do("control: back from it", partial(activate, version="v3"))
    do("control: the link alone", partial(link_alone, variant="v2"))
    do("control: the link back", partial(link_alone, variant="v3"))
    do("control: an unpinned release", partial(activate, version="unpinned"))
    do("control: the link under an unpinned release", partial(link_alone, variant="v2"))
    do("control: the link back to it", partial(link_alone, variant="unpinned"))
    do("control: stop and start", stop_and_start)


CHAPTERS = (deploy_good_and_broken_releases, disturb_the_service, cut_deploys_short, make_the_checks_fail)


@pytest.fixture(scope="module")
def told(applications: list[Deployed], ones: list[Deployed]) -> Told:
    # A page that needs a module for the first time: what is mixed in a worker shows in its answers at once.
    story = Story(applications, path="/late/{value}")
    told = Told(story, ones, {})
    try:
        with story:
            for chapter in CHAPTERS:
                chapter(told)
    finally:
        told.names = dict(zip(map(Story.key, applications), story.everywhere(versions), strict=True))
        record(told)
    return told


def record(told: Told) -> None:
    """Write the story to where the test reports go."""
    folder = Path(os.environ.get("TEST_REPORTS") or hosts.ROOT / ".run" / "reports" / "releases")
    platforms = {
        Story.key(app)[0]: app.host.check_output(
            "{ . /etc/os-release; echo $PRETTY_NAME; uwsgi --version; python3 --version; nginx -v 2>&1; }"
        ).splitlines()
        for app in told.ones
    }
    names = [{"host": host, "app": app, "releases": found} for (host, app), found in told.names.items()]
    told.story.save(
        folder / "releases.json", date=time.strftime("%Y-%m-%d"), platforms=platforms, names=names, cuts=told.cuts
    )


def keeps_all(step: str) -> bool:
    """Whether the design promises that a step loses no request."""
    return step not in {"kill the master", "deploy and power cut"} and not step.startswith("control")


@pytest.fixture
def seen(told: Told, app: Deployed) -> Callable[[str], Seen]:
    """Return what asks for a step of one application."""
    return lambda step: told.story.seen(step, *Story.key(app))


@pytest.fixture
def ids(told: Told, app: Deployed) -> dict[str, str]:
    return told.names[Story.key(app)]


def test_no_request_fails_or_is_answered_wrongly(told: Told, app: Deployed) -> None:
    mine = [seen for seen in told.story.steps if (seen.host, seen.app) == Story.key(app) and keeps_all(seen.step)]
    assert sum(seen.traffic.sent for seen in mine) > 5000
    bad = {seen.step: seen.traffic.summary() for seen in mine if seen.traffic.bad or not seen.traffic.sent}
    assert bad == {}


def test_no_worker_answers_for_two_releases(told: Told, app: Deployed) -> None:
    mine = [seen for seen in told.story.steps if (seen.host, seen.app) == Story.key(app)]
    assert {seen.step: seen.traffic.mixed_pids for seen in mine if seen.traffic.mixed_pids} == {}


@pytest.mark.parametrize(
    ("step", "old", "new", "action"),
    [("deploy v2", "v1", "v2", "activate"), ("roll back", "v2", "v1", "rollback")],
)
def test_deploy_and_rollback_replace_one_worker_after_the_other(
    step: str, old: str, new: str, action: str, seen: Callable[[str], Seen], ids: dict[str, str]
) -> None:
    it = seen(step)
    assert it.ran.code == 0, it.ran.said
    assert it.traffic.ok, it.traffic.summary()
    assert set(it.traffic.releases) == {ids[old], ids[new]}
    assert it.traffic.release_runs[0][0] == ids[old]
    assert it.traffic.release_runs[-1][0] == ids[new]
    assert it.after.current == ids[new]
    assert list(it.after.workers.values()) == [ids[new]] * 4
    assert it.before.workers.keys().isdisjoint(it.after.workers)
    assert it.noted
    said = {key: it.after.journal[key] for key in ("action", "release", "from", "result", "how")}
    assert said == {
        "action": action,
        "release": ids[new],
        "from": ids[old],
        "result": "ok",
        "how": "chain reload",
    }


def test_unchanged_deploy_changes_nothing(told: Told, one: Deployed) -> None:
    it = told.story.seen("deploy v2 once more", *Story.key(one))
    assert told.unchanged.played is not None
    assert it.ran.code == 0, told.unchanged.played.output[-3000:]
    counts = told.unchanged.played.counts[it.host]
    assert (counts["changed"], counts["failed"]) == (0, 0)
    # The role has run for the host's one application, up to its end.
    assert counts["ok"] > 20
    assert "TASK [uwsgi_sqlalchemy : Make it live]" in told.unchanged.played.output
    assert it.after == it.before


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("broken-import", 'raise RuntimeError("this release cannot be imported")'),
        ("missing-dependency", "No module named 'absent_dependency'"),
        ("no-callable", "(callable not found or import error)"),
        ("failing-migration", "RuntimeError: this migration fails"),
        ("broken-request", "NameError: name 'absent_name' is not defined"),
        ("broken-health", "RuntimeError: never healthy"),
        ("redirected-health", "it answers 302, not 2xx"),
        ("silent-health", "no answer within 10 s"),
    ],
)
def test_broken_release_is_refused_before_it_serves(
    variant: str, message: str, seen: Callable[[str], Seen], ids: dict[str, str]
) -> None:
    it = seen(f"deploy {variant}")
    assert it.ran.code == 3
    assert message in it.ran.said
    assert it.after.current == it.before.current
    assert it.after.workers == it.before.workers
    assert set(it.traffic.releases) == {it.before.current}
    assert (it.after.journal["release"], it.after.journal["result"]) == (variant, "refused")
    assert it.after.journal["note"]


def test_release_that_fails_when_it_serves_is_put_back_and_marked(
    seen: Callable[[str], Seen], ids: dict[str, str]
) -> None:
    it, again = seen("deploy broken-live"), seen("deploy broken-live once more")
    assert it.ran.code == 5
    assert "healthy no more" in it.ran.said
    assert f"Release {ids['v2']} and its configuration are back and serve." in it.ran.said
    assert list(it.after.workers.values()) == [ids["v2"]] * 4
    assert it.after.current == ids["v2"]
    assert (it.after.journal["release"], it.after.journal["result"]) == ("broken-live", "put back")
    assert set(it.traffic.releases) == {ids["v2"], "broken-live"}
    assert it.traffic.release_runs[-1][0] == ids["v2"]

    assert again.ran.code == 3
    assert "--retry" in again.ran.said
    assert again.after.workers == again.before.workers


def test_release_that_failed_is_taken_with_retry_when_its_cause_is_gone(
    seen: Callable[[str], Seen], ids: dict[str, str]
) -> None:
    it, back = seen("retry broken-live, repaired"), seen("roll back from it")
    assert it.ran.code == 0, it.ran.said
    assert list(it.after.workers.values()) == ["broken-live"] * 4
    assert back.ran.code == 0, back.ran.said
    assert list(back.after.workers.values()) == [ids["v1"]] * 4


@pytest.mark.parametrize(
    ("step", "version", "how", "reason"),
    [
        ("deploy v4 without the FIFO", "v4", "restart", "uWSGI takes no commands"),
        ("deploy v3 without statistics", "v3", "restart", "uWSGI gives no statistics"),
    ],
)
def test_what_a_chain_reload_cannot_do_is_done_by_a_restart_and_said(
    step: str, version: str, how: str, reason: str, seen: Callable[[str], Seen], ids: dict[str, str]
) -> None:
    it = seen(step)
    assert it.ran.code == 0, it.ran.said
    assert list(it.after.workers.values()) == [ids[version]] * 4
    assert it.after.journal["how"] == how
    assert any(reason in said for said in it.ran.answer["reasons"])


def test_stopped_service_is_started(seen: Callable[[str], Seen], ids: dict[str, str]) -> None:
    it = seen("deploy v4 to a stopped service")
    assert it.ran.code == 0, it.ran.said
    assert list(it.after.workers.values()) == [ids["v4"]] * 4


def test_rollback_tells_of_a_newer_schema(seen: Callable[[str], Seen]) -> None:
    assert "schema v2" in seen("roll back").ran.said or "schema broken-live" in seen("roll back").ran.said
    assert "was made for v1" in seen("roll back").ran.said


def test_second_rollback_does_not_bounce(seen: Callable[[str], Seen]) -> None:
    it = seen("roll back once more")
    assert it.ran.code == 3
    assert "has no previous release to roll back to" in it.ran.said
    assert it.after.workers == it.before.workers


def test_changed_configuration_restarts_the_service(told: Told, one: Deployed) -> None:
    it = told.story.seen("change the configuration", *Story.key(one))
    assert it.ran.code == 0
    assert (it.after.journal["how"], it.after.journal["result"]) == ("restart", "ok")
    assert it.after.current == it.before.current
    assert it.before.workers.keys().isdisjoint(it.after.workers)
    assert 'SETTING="two"' in one.host.file(f"/etc/{one.unit}/environment").content_string


def test_killed_worker_is_replaced(seen: Callable[[str], Seen]) -> None:
    it = seen("kill a worker")
    assert len(it.before.workers.keys() & it.after.workers.keys()) == 3
    assert len(it.after.workers) == 4


def test_killed_master_is_back_within_5_seconds(seen: Callable[[str], Seen]) -> None:
    it = seen("kill the master")
    assert it.traffic.counts["wrong"] == 0
    assert it.right_again < 5, it.traffic.summary()
    assert it.before.workers.keys().isdisjoint(it.after.workers)
    assert len(it.after.workers) == 4


def test_deploy_cut_at_any_step_leaves_a_whole_release_and_the_next_one_finishes(
    told: Told, seen: Callable[[str], Seen], ids: dict[str, str], app: Deployed
) -> None:
    assert {"prove", "rehearse", "migrate", "keep", "switch", "renew", "confirm", "finish"} <= set(told.cuts)
    mine = [step.step for step in told.story.steps if (step.host, step.app) == Story.key(app)]
    cuts = [(number, name) for number, name in enumerate(told.cuts) if f"deploy cut before {name}" in mine]
    assert [name for _, name in cuts] == told.cuts[0 if app in told.ones else 1 :: 2]
    for number, name in cuts:
        it = seen(f"deploy cut before {name}")
        assert it.ran.code not in range(8), f"before {name} it was not killed: {it.ran}"
        assert len(it.after.workers) == 4, name
        assert len(set(it.after.workers.values())) == 1, name
        if number <= told.cuts.index("configure"):
            assert it.after == it.before, name
            continue
        again = seen(f"deploy again after {name}")
        assert again.ran.code == 0, f"after {name}: {again.ran.said}"
        assert again.after.current in (ids["v3"], ids["v4"])
        assert again.after.current != it.before.current, name
        assert list(again.after.workers.values()) == [again.after.current] * 4, name
        assert "took over the lock that ansible, process" in again.ran.errors, name
        assert (again.after.journal["release"], again.after.journal["result"]) == (again.after.current, "ok"), name


def test_second_deploy_at_the_same_time_is_told_who_and_since_when(
    told: Told, seen: Callable[[str], Seen], ids: dict[str, str], app: Deployed
) -> None:
    first, second = seen("two deploys at once"), told.second[Story.key(app)]
    assert first.ran.code == 0
    assert second.code == 4
    assert re.search(r"being changed by ansible, process \d+, since 20\d\d-\d\d-\d\dT", second.said)
    assert first.after.current == ids["v2"]


def test_power_cut_in_a_deploy_leaves_a_whole_release_and_the_next_one_finishes(
    seen: Callable[[str], Seen], ids: dict[str, str]
) -> None:
    it, again = seen("deploy and power cut"), seen("deploy again after the power cut")
    assert it.after.current == ids["v2"], "what was live before is live again"
    assert list(it.after.workers.values()) == [ids["v2"]] * 4
    assert it.traffic.counts["wrong"] == 0
    assert it.right_again < 60, it.traffic.summary()
    assert again.ran.code == 0, again.ran.said
    assert list(again.after.workers.values()) == [ids["v3"]] * 4


def test_the_checks_notice_a_mixture_of_two_releases(seen: Callable[[str], Seen]) -> None:
    it = seen("control: a release mixed of two")
    assert it.traffic.counts["wrong"] > 0
    assert it.traffic.first_bad is not None
    assert "made by mixed with a module of v1" in it.traffic.first_bad.text


def test_the_link_alone_brings_no_worker_to_another_release(seen: Callable[[str], Seen], ids: dict[str, str]) -> None:
    it = seen("control: the link alone")
    assert it.after.current == ids["v2"]
    assert list(it.after.workers.values()) == [ids["v3"]] * 4
    assert set(it.traffic.releases) == {ids["v3"]}


def test_the_checks_notice_workers_that_follow_the_link(seen: Callable[[str], Seen]) -> None:
    """What uwsgi_sqlalchemy_pin.py is for: without it a moved link mixes two releases in every worker."""
    assert seen("control: an unpinned release").ran.code == 0
    it = seen("control: the link under an unpinned release")
    assert it.traffic.counts["wrong"] > 0
    assert it.traffic.first_bad is not None
    assert "made by unpinned with a module of v2" in it.traffic.first_bad.text


def test_stop_and_start_in_place_of_a_deploy_would_lose_requests(seen: Callable[[str], Seen]) -> None:
    it = seen("control: stop and start")
    assert it.traffic.counts["error"] > 0
    assert it.traffic.first_bad is not None
    assert "502" in it.traffic.first_bad.text
