"""The two endpoints for machines: one asks whether all is well, one tells who answers."""

import importlib
import os
import time

from flask import Blueprint, current_app, request
from flask.typing import ResponseReturnValue
from sqlalchemy import BigInteger, Engine, bindparam, literal, select

from shelf import db

LONGEST_SLEEP_MS = 2000


def worker_id() -> int:
    """Return uWSGI's number for this worker, counted from 1; 0 when another server runs the application."""
    try:
        # A module that exists only inside uWSGI.
        return int(importlib.import_module("uwsgi").worker_id())
    except ImportError:
        return 0


def blueprint(engine: Engine, release: str) -> Blueprint:
    """Return the endpoints over one database.

    Args:
        engine: the database.
        release: release id that they report.
    """
    probes = Blueprint("probes", __name__)

    @probes.get("/healthz")
    def healthz() -> ResponseReturnValue:
        answer = {"release": release, "database": engine.dialect.name}
        try:
            with engine.connect() as connection:
                connection.execute(select(literal(1))).scalar_one()
        except Exception as error:  # whatever it is, a health check has to answer
            current_app.logger.error("healthz: %s: %s", type(error).__name__, db.short_reason(error, engine.url))
            return {"status": "error", "error": f"no answer from the database ({type(error).__name__})"} | answer, 503
        return {"status": "ok"} | answer

    @probes.get("/echo/<int(max=9223372036854775807):value>")
    def echo(value: int) -> ResponseReturnValue:
        sleep_ms = request.args.get("sleep_ms", "0")
        if not (sleep_ms.isascii() and sleep_ms.isdigit() and int(sleep_ms) <= LONGEST_SLEEP_MS):
            return {"error": f"sleep_ms must be a whole number from 0 to {LONGEST_SLEEP_MS}"}, 400
        with engine.connect() as connection:
            # The database's own words, so that an answer meant for another request shows as a wrong value.
            asked = select(bindparam("value", value, BigInteger), db.session_function(engine.dialect.name))
            answered, session = connection.execute(asked).one()
            session = connection.info.get("session", session)
            # Asleep with the connection in hand, as a slow query would be.
            time.sleep(int(sleep_ms) / 1000)
        return {
            "value": int(answered),
            "pid": os.getpid(),
            "worker": worker_id(),
            "session": str(session),
            "release": release,
        }

    return probes
