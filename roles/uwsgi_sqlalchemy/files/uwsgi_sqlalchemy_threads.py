"""Imported where a uWSGI before 2.0.25 has workers with several threads: let them end without losing a request.

On SIGHUP such a worker waits for its other threads inside the signal handler, on top of whatever its main thread was
doing (gracefully_kill and wait_for_threads in uWSGI's core/uwsgi.c). When that is Python code, or holds a lock or a row
that another thread's request needs, nobody moves until worker-reload-mercy kills them all. And it ends them by
pthread_cancel, which in Debian 12's C library may still strike a thread that has just forbidden it to take a request
(sigcancel_handler in glibc 2.36 does not ask): its request is lost, and a lock it held, as Python's, is never free.
uWSGI 2.0.25 does neither. Here a thread that holds nothing takes the signal, the main thread never sees it, and no
thread is cancelled: they get no further requests, and the process ends when none is in a request.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from typing import Any

QUIET = 29  # UWSGI_QUIET_CODE: the master replaces the worker without calling it a mishap
PAUSE = 0.01  # seconds


def this_worker() -> dict[str, Any]:
    """Return what uWSGI says of this worker."""
    uwsgi = sys.modules["uwsgi"]
    return next(worker for worker in uwsgi.workers() if worker["id"] == uwsgi.worker_id())


def close_doors() -> None:
    """Let no thread of uWSGI accept another request: each waits for one at an epoll of its own."""
    uwsgi = sys.modules["uwsgi"]
    closed: set[str] = set()
    while len(closed) < uwsgi.cores:  # A worker that has just been made is still starting its threads.
        for descriptor, listener in itertools.product(os.listdir("/proc/self/fd"), uwsgi.sockets):
            # Whatever is no such epoll, or closed by now, refuses.
            with contextlib.suppress(OSError), select.epoll.fromfd(os.dup(int(descriptor))) as door:
                door.unregister(listener)
                closed.add(descriptor)
        time.sleep(PAUSE)


def asleep(thread: str) -> bool:
    """Whether a thread of this process waits for something or has ended (/proc/PID/task/TID/stat, see proc(5))."""
    try:
        with open(f"/proc/self/task/{thread}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return True


def finish_requests() -> None:
    """Wait until no thread of uWSGI is in a request, or in a handler of uWSGI's own signals; the doors are closed."""
    # uWSGI calls a worker busy a moment after it has accepted a request. A thread does not sleep in that moment, so one
    # that was seen asleep is past it. One of the application's own may compute for ever: a second is long enough.
    until = time.monotonic() + 1
    for thread in set(os.listdir("/proc/self/task")) - {str(threading.get_native_id())}:
        while not asleep(thread) and time.monotonic() < until:
            time.sleep(PAUSE)
    while this_worker()["status"].startswith((b"busy", b"sig")):
        time.sleep(PAUSE)


def end_on_sighup() -> None:
    """Wait for SIGHUP, let every thread finish the request in its hands, and end the process."""
    signal.sigwait({signal.SIGHUP})
    if not this_worker()["apps"]:
        os._exit(QUIET)  # It still imports its application, and serves nobody.
    close_doors()
    finish_requests()
    # What the interpreter does at its end. It cannot, as the main thread is in uWSGI's hands.
    for call in reversed(threading._threading_atexits):  # type: ignore[attr-defined]
        call()
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    getattr(sys.modules["uwsgi"], "atexit", lambda: None)()
    atexit._run_exitfuncs()
    os._exit(QUIET)


def take_sighup() -> None:
    """Let a thread of its own take this worker's SIGHUP."""
    # Every thread that is started from now on inherits it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    threading.Thread(target=end_on_sighup, name="uwsgi-sqlalchemy-threads", daemon=True).start()


def become_worker() -> None:
    """Do so in a worker that a preforking master has made; its own children are none of that."""
    if os.getppid() == master:
        take_sighup()


master = os.getpid()
if sys.modules["uwsgi"].worker_id():
    take_sighup()
else:
    os.register_at_fork(after_in_child=become_worker)
