"""A WSGI application whose answers tell which release gave them, and whether a process mixes two of them.

variants.py makes the good and the broken releases of the scenario from it.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Iterable
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlalchemy import create_engine, text

VERSION = "v1"
# /srv/uwsgi-APP/releases/ID/app/wsgi.py, found at import: a path through the link `current` changes its meaning.
RELEASE = Path(__file__).resolve().parents[1].name

# With 50 ms of work in the database most workers have a request in hand at any moment.
QUESTION = text("select cast(:value as text), pg_backend_pid() from pg_sleep(0.05)")
# As many connections as requests that a worker serves at the same time, and one for the health path.
engine = create_engine(os.environ["DATABASE_URL"], pool_size=3, max_overflow=0)

# An application of some size takes a second to import.
time.sleep(1)


def worker_id() -> int:
    """Return uWSGI's number of this worker; the module exists inside uWSGI alone."""
    return int(importlib.import_module("uwsgi").worker_id())


def read_again(name: str) -> ModuleType:
    """Load a module as if no request had needed it before: from where it lies at this moment."""
    spec = PathFinder.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def health() -> str:
    """Return what a machine should know; raises when the database does not answer."""
    with engine.connect() as connection:
        connection.execute(text("select 1"))
    return f"200 OK {os.environ.get('SETTING', '')}"


def answer(value: str, answers: ModuleType) -> dict[str, Any]:
    """Return the answer to one request; a module of another release spoils its value."""
    with engine.connect() as connection:
        said, session = connection.execute(QUESTION, {"value": value}).one()
    right: str = answers.confirm(said, VERSION)
    return {"value": right, "pid": os.getpid(), "worker": worker_id(), "session": str(session), "release": RELEASE}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer /healthz; /echo/VALUE, with a module that is imported when it is first needed; /late/VALUE; /busy/VALUE.

    /late/VALUE needs that module for the first time in every request, as a page may that nobody asked for until now.
    /busy/VALUE does its work in Python and not in the database.
    """
    _, page, value = [*environ["PATH_INFO"].split("/", 2), ""][:3]
    if page == "healthz":
        start_response(health(), [("Content-Type", "text/plain")])
        return [b"\n"]
    if page == "busy":
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass
    if page not in {"echo", "late", "busy"}:
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"not found\n"]
    answers = read_again("answers") if page == "late" else importlib.import_module("answers")
    body = json.dumps(answer(value, answers)).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
