"""Imported by the preforking master before its application: no worker uses a database connection that crossed the fork.

uWSGI forks its workers after the application has been imported. A connection that the import left in a pool is then one
socket with several readers. So every SQLAlchemy Engine is remembered as it is made, and each new worker gives each of
them an empty pool before it runs anything else. Nothing is sent on what it inherited: that belongs to the master.

It needs uWSGI 2.0.21 with master, enable-threads and py-call-uwsgi-fork-hooks: uWSGI's fork is plain C otherwise and
Python's handlers do not run. Mules and the spooler are forked without them in every version: this covers workers only.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import os
import sys
import traceback
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

# Engine.__init__ is the one way to every Engine: create_engine(), engine_from_config(), the Engine inside an
# AsyncEngine, a framework's own. Walking the garbage collector's objects for them instead has no place to happen: uWSGI
# 2.0.21 calls no handler before the fork, and in the worker the walk would touch, and so unshare, all memory.
engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def watch() -> None:
    """Remember every Engine from now on.

    Does nothing where SQLAlchemy is absent or cannot dispose(close=False), which came with 1.4.33; the audit refuses
    pooled connections of older ones.
    """
    try:
        # SQLAlchemy is imported here although the application will do it: the first Engine must not be missed.
        from sqlalchemy.engine import Engine  # noqa: PLC0415
    except ImportError:
        return
    if "close" not in inspect.signature(Engine.dispose).parameters:
        return
    initialise = Engine.__init__

    @functools.wraps(initialise)
    def remember(self: Engine, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        engines.add(self)

    Engine.__init__ = remember  # type: ignore[method-assign]


def in_memory(engine: Engine) -> bool:
    """Say whether an engine's database is SQLite in memory: it lives in its connection and is private to a process."""
    if engine.dialect.name != "sqlite":
        return False
    database = engine.url.database or ":memory:"
    return ":memory:" in database or "mode=memory" in database or engine.url.query.get("mode") == "memory"


def discard_inherited() -> None:
    """Give every engine an empty pool, and keep the inherited one, unused, for as long as this process lives.

    Dropping it would be enough for psycopg. But mysqlclient's and Oracle's connections say goodbye to the server from
    their destructor, also while the interpreter ends, and the session that they end is the master's. The reference
    that is never given back holds the pool, and with it its connections, beyond that.
    """
    for engine in list(engines):
        if not in_memory(engine):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine.pool))
            engine.dispose(close=False)


def become_worker() -> None:
    """Make this process safe to serve from; end it where that fails, for it would answer with other requests' rows."""
    try:
        discard_inherited()
        if os.getppid() == master:
            # The collector would write into every object that it visits, and so unshare the master's.
            gc.freeze()
            os.chdir(release)
    except BaseException:
        print("uwsgi_sqlalchemy_guard: this worker cannot discard the connections it inherited:", file=sys.stderr)
        traceback.print_exc()
        os._exit(1)


# The master stands in the release only while it imports it (hook-pre-app, hook-post-app): a SIGHUP fails in a folder
# that was pruned meanwhile. Its workers return there, also one that is forked long after the link `current` moved on.
master, release = os.getpid(), os.getcwd()
watch()
# Not for uWSGI's forks alone: a process that the application forks itself inherits a pool just as a worker does.
os.register_at_fork(after_in_child=become_worker)
