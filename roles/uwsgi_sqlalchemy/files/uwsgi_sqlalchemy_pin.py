"""Imported by every worker before its application: keep a worker to the one release that it was started with.

uWSGI's module path names the link `current`. When that moves on, a worker of the old release would import what it has
not imported yet (a module inside a function, a database dialect) from the new one. So each worker replaces the link in
its module path by the release that it stands in: the unit's hook-post-fork has entered that folder before any import.
"""

from __future__ import annotations

import os
import sys


def pin(working_directory: str) -> None:
    """Let the module path name the release of a working directory, /srv/uwsgi-APP/releases/ID/app, and not the link."""
    release = os.path.dirname(working_directory)
    current = os.path.join(os.path.dirname(os.path.dirname(release)), "current") + os.sep
    sys.path[:] = [
        os.path.join(release, path[len(current) :]) if path.startswith(current) else path for path in sys.path
    ]
    for name in ("prefix", "exec_prefix"):
        prefix = getattr(sys, name)
        if prefix.startswith(current):
            setattr(sys, name, os.path.join(release, prefix[len(current) :]))


pin(os.getcwd())
