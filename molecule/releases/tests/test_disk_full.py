"""The disk is full while a release is built."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import testinfra
from testinfra.host import Host
from testkit import hosts, playbook
from testkit.apps import Deployed
from testkit.releases import versions
from testkit.story import Play, Seen, Story

# tiny-1 and its virtual environment fit into it, and the ballast of tiny-2 does not (variants.py).
MOUNT = "mkdir -p /srv/uwsgi-tiny && mount -t tmpfs -o size=48m,mode=0755 tmpfs /srv/uwsgi-tiny"

TINY = {name: ["tiny"] for name in hosts.names()}


@dataclass
class Told:
    """What happened on all hosts."""

    story: Story
    full: playbook.Played
    left: dict[str, list[str]]  # by host, the folders of releases that are not whole, after the disk was full
    cut: dict[str, str]  # by host, the folder of a build that was cut short with no time to clear up


def torsos(app: Deployed) -> list[str]:
    said: str = app.host.check_output(
        "cd /srv/uwsgi-tiny/releases && for r in *; do [ -e $r/release.json ] || echo $r; done"
    )
    return said.split()


def cut_short(app: Deployed, output: str) -> str:
    """Leave what a build of tiny-2 leaves whose controller was killed, and return its name."""
    host = re.escape(str(app.host.backend.hostname))
    # A host's own message: the indented lines below it.
    own = "".join(re.findall(rf"^fatal: \[{host}\]: FAILED!.*\n((?:[ ].*\n|\n)*)", output, re.MULTILINE))
    found = re.search("Release ([0-9a-f]{12}) could not be built", own)
    assert found, output[-3000:]
    app.host.check_output("cd /srv/uwsgi-tiny/releases && mkdir -p %s/app && echo > %s/app/half.py", found[1], found[1])
    return found[1]


@pytest.fixture(scope="module")
def told() -> Told:
    tinies = [
        Deployed(testinfra.get_host(url, ssh_config=str(hosts.ssh_config()), sudo=True), "tiny") for url in hosts.urls()
    ]
    for app in tinies:
        app.host.check_output(MOUNT)
    first = playbook.play(apps=TINY, variant="tiny-1")
    assert first.status == 0, first.output[-3000:]

    full, room = Play(apps=TINY, variant="tiny-2"), Play(apps=TINY, variant="tiny-2")
    with Story(tinies, connections=4) as story:
        story.step("deploy to a full disk", full)
        left = {str(app.host.backend.hostname): torsos(app) for app in tinies}
        assert full.played is not None
        cut = {str(app.host.backend.hostname): cut_short(app, full.played.output) for app in tinies}
        story.everywhere(lambda app: app.host.check_output("mount -o remount,size=256m /srv/uwsgi-tiny"))
        story.step("deploy when there is room again", room)
    return Told(story, full.played, left, cut)


@pytest.fixture
def tiny(host: Host) -> Deployed:
    return Deployed(host, "tiny")


@pytest.fixture
def seen(told: Told, tiny: Deployed) -> Callable[[str], Seen]:
    return lambda step: told.story.seen(step, *Story.key(tiny))


def test_full_disk_is_told_and_the_old_release_serves_on(told: Told, seen: Callable[[str], Seen]) -> None:
    it = seen("deploy to a full disk")
    assert it.ran.code != 0
    assert "No space left on device" in told.full.output
    assert it.traffic.ok, it.traffic.summary()
    assert (it.after.current, it.after.workers) == (it.before.current, it.before.workers)
    assert told.left[it.host] == []


def test_next_deploy_clears_up_a_build_that_was_cut_short(
    told: Told, tiny: Deployed, seen: Callable[[str], Seen]
) -> None:
    it = seen("deploy when there is room again")
    assert it.ran.code == 0
    assert it.traffic.ok, it.traffic.summary()
    assert torsos(tiny) == []
    assert versions(tiny)["tiny-2"] == it.after.current == told.cut[it.host]
    assert not tiny.host.file(f"/srv/uwsgi-tiny/releases/{it.after.current}/app/half.py").exists
