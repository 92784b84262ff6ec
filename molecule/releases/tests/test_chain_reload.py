"""A reload replaces every worker, and also the one that uWSGI's own chain reload would leave out."""

from __future__ import annotations

import pytest
from testkit import hosts
from testkit.apps import Deployed
from testkit.releases import PROGRAM, command

CHAIN = "printf c > /run/{unit}/master.fifo"
# What makes a chain that is asked for at that moment leave the first worker out: it passes over one that still imports
# the application, and there is no second chain while one runs that has already been at that worker.
LEFT_OUT = {"still imports": "kill -KILL $old", "was new when it began": CHAIN}
ROUND = """
first() {{ pgrep --full '^{unit} uWSGI worker 1$'; }}
began=$(date +%s.%6N); old=$(first); {left_out}
until new=$(first) && [ "$new" != "$old" ]; do sleep 0.02; done
{reload}
[ -e /proc/$new ] && echo "left out" || echo replaced
"""
# The end of the chain that runs, in the service's journal.
BY_HAND = (
    f"{CHAIN}; until journalctl -u {{unit}} --since=@$began | grep -q 'chain reloading complete'; do sleep 0.2; done"
)


def first_worker(app: Deployed, left_out: str, reload: str) -> str:
    """Return what a reload makes of the first worker."""
    words = {"unit": app.unit}
    text = ROUND.format(left_out=left_out.format(**words), reload=reload.format(**words), **words)
    done = command(app, "timeout 120 sh -c %s", text)
    assert done.code == 0, done.errors
    return done.output.splitlines()[-1]


@pytest.mark.parametrize("moment", LEFT_OUT)
def test_it_replaces_every_worker(moment: str, one: Deployed) -> None:
    assert first_worker(one, LEFT_OUT[moment], f"{PROGRAM} reload {one.name} || exit") == "replaced"


@pytest.mark.parametrize("moment", LEFT_OUT)
def test_uwsgi_alone_leaves_one_out(moment: str, one: Deployed) -> None:
    assert first_worker(one, LEFT_OUT[moment], BY_HAND) == "left out"


testinfra_hosts = hosts.urls()[:1]
