"""A WSGI application whose import asks the database something, or does another thing that a fork does not survive.

AT_IMPORT chooses: `query`; `nothing`; `thread`, a background thread that requests need; `lock`, one that it holds when
the master forks; `checked-out`, a connection that is never given back. BALLAST_MB makes the application larger,
AUTOCOMMIT=yes leaves out what begins and ends a transaction around each request's query.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

RELEASE = Path(__file__).resolve().parents[1].name
URL = make_url(os.environ["DATABASE_URL"])
MYSQL = URL.get_backend_name() == "mysql"
QUESTION = text(f"select :value as value, {'connection_id()' if MYSQL else 'pg_backend_pid()'} as session")
SETTINGS: dict[str, Any] = {
    "pool_size": 5,
    "pool_pre_ping": os.environ.get("PRE_PING", "yes") == "yes",
    "pool_recycle": 1800,
}
if os.environ.get("AUTOCOMMIT") == "yes":
    SETTINGS["isolation_level"] = "AUTOCOMMIT"

# What an application of that size holds: many small objects, which the garbage collector visits.
ballast = [{"id": number, "text": f"{number:0700d}"} for number in range(int(os.environ.get("BALLAST_MB", "0")) * 1000)]


class Sync:
    """An engine as most applications have it."""

    def __init__(self) -> None:
        self.engine: Engine = create_engine(URL, **SETTINGS)

    def ask(self, value: str) -> tuple[str, str]:
        """Return what the database says, and its number of the session."""
        with self.engine.connect() as connection:
            said, session = connection.execute(QUESTION, {"value": value}).one()
        return str(said), str(session)


class Async:
    """An asyncio engine in a WSGI application: each thread has an event loop and an engine's pool is used in one."""

    def __init__(self) -> None:
        self.engine: AsyncEngine = create_async_engine(URL, **SETTINGS)
        self.local = threading.local()

    async def asked(self, value: str) -> tuple[str, str]:
        """Return what `ask` does."""
        async with self.engine.connect() as connection:
            said, session = (await connection.execute(QUESTION, {"value": value})).one()
        return str(said), str(session)

    def ask(self, value: str) -> tuple[str, str]:
        """Return what the database says, and its number of the session."""
        if not hasattr(self.local, "loop"):
            self.local.loop = asyncio.new_event_loop()
        answer: tuple[str, str] = self.local.loop.run_until_complete(self.asked(value))
        return answer


database = Async() if URL.get_driver_name() == "psycopg_async" else Sync()
jobs: queue.Queue[threading.Event] = queue.Queue()
lock = threading.Lock()


def nothing() -> None:
    """Need no background thread."""


def serve_jobs() -> None:
    """Answer requests' jobs, as a thread for metrics or tracing does."""
    while True:
        jobs.get().set()


def have_a_job_done() -> None:
    """Wait for the background thread."""
    done = threading.Event()
    jobs.put(done)
    done.wait()


def hold_the_lock() -> None:
    """Hold the lock nearly all the time."""
    while True:
        with lock:
            time.sleep(0.05)


def take_the_lock() -> None:
    """Wait for the lock."""
    with lock:
        pass


needed = nothing  # of the background thread, by every request
at_import = os.environ["AT_IMPORT"]
if at_import == "query":
    if isinstance(database, Async):
        asyncio.run(database.asked("0"))
    else:
        database.ask("0")
elif at_import == "checked-out" and isinstance(database, Sync):
    kept = database.engine.connect()
elif at_import == "thread":
    threading.Thread(target=serve_jobs, name="jobs", daemon=True).start()
    needed = have_a_job_done
elif at_import == "lock":
    threading.Thread(target=hold_the_lock, name="holder", daemon=True).start()
    needed = take_the_lock
    time.sleep(0.01)  # the thread has it now


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer /healthz and /echo/VALUE."""
    value = environ["PATH_INFO"].rpartition("/")[2]
    if environ["PATH_INFO"] == "/healthz":
        database.ask("1")
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"ok\n"]
    needed()
    try:
        said, session = database.ask(value)
    except Exception as error:  # to be told to who asked
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [" ".join(str(error).split())[:300].encode()]
    answer = {"value": said, "pid": os.getpid(), "session": session, "release": RELEASE}
    answer["worker"] = importlib.import_module("uwsgi").worker_id()
    body = json.dumps(answer).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
