"""Imported by the workers of a uWSGI before 2.0.25 that have several threads: let them end without losing a request.

On SIGHUP such a worker waits for its other threads inside the signal handler, on top of whatever its main thread was
doing (gracefully_kill and wait_for_threads in uWSGI's core/uwsgi.c). When that is Python code, or holds a lock or a row
that another thread's request needs, nobody moves until worker-reload-mercy kills them all. uWSGI 2.0.25 no longer waits
there. Here a thread that holds nothing takes the signal and does the waiting, and the main thread never sees it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time

QUIET = 29  # UWSGI_QUIET_CODE: the master replaces the worker without calling it a mishap


def loaded() -> bool:
    """Whether the worker has imported its application."""
    uwsgi = sys.modules["uwsgi"]
    return any(worker["id"] == uwsgi.worker_id() and worker["apps"] for worker in uwsgi.workers())


def end_on_sighup() -> None:
    """Wait for SIGHUP, let every thread finish the request in its hands, and end the process."""
    while not loaded():
        time.sleep(0.1)
    time.sleep(0.1)  # uWSGI starts its threads now
    signal.sigwait({signal.SIGHUP})
    # Ends each thread between two requests. ctypes lets go of Python's lock for the time.
    ctypes.CDLL(None).wait_for_threads()
    # What the interpreter does at its end. It cannot, as the main thread is gone, and would wait for it.
    for call in reversed(threading._threading_atexits):  # type: ignore[attr-defined]
        call()
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    getattr(sys.modules["uwsgi"], "atexit", lambda: None)()
    atexit._run_exitfuncs()
    os._exit(QUIET)


# Every thread that is started from now on inherits it.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
threading.Thread(target=end_on_sighup, name="uwsgi-sqlalchemy-threads", daemon=True).start()
