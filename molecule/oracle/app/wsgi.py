"""A WSGI application on an Oracle database; an answer tells what was asked for and which session said it.

AT_IMPORT=query has it ask the database something when it is imported, as many applications do.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, Identity, Sequence, String, create_engine, func, make_url, select, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

RELEASE = Path(__file__).resolve().parents[1].name
DATABASE = make_url(os.environ["DATABASE_URL"])
# No driver reads this variable by itself: the application chooses the mode with it, before its first connection.
THICK = os.environ.get("ORA_PYTHON_DRIVER_TYPE") == "thick"
# Two things that the protocol double does not know from Oracle's client (ORA-03115, ORA-00900): executing a cursor that
# the client has kept, and RETURNING, by which a driver gets an identity column's key.
LIMITED = os.environ.get("PROTOCOL_DOUBLE") == "yes" and (THICK or DATABASE.get_driver_name() == "cx_oracle")
# From a subquery, because the double looks a table's columns up for each answer, which takes it twice as long.
QUESTION = text("select :value as value, sys_context('userenv', 'sid') as sid from (select 1 as one from dual) single")


def connect_to(url: URL) -> Engine:
    """Return an engine as the service uses it."""
    options: dict[str, Any] = {"thick_mode": THICK} if url.get_driver_name() == "oracledb" else {}
    careful = os.environ.get("PRE_PING", "yes") == "yes"
    return create_engine(url, pool_pre_ping=careful, connect_args={"stmtcachesize": 0} if LIMITED else {}, **options)


class Base(DeclarativeBase):
    """The model."""


class Book(Base):
    """A row with a key that the database gives."""

    __tablename__ = "books"
    id: Mapped[int] = mapped_column(Sequence("books_key") if LIMITED else Identity(), primary_key=True)
    title: Mapped[str] = mapped_column(String(80))


Book.__table__.implicit_returning = not LIMITED  # type: ignore[attr-defined]
engine = connect_to(DATABASE)


def echo(value: str) -> dict[str, Any]:
    """Have the database say a value; its session's number with it."""
    with engine.connect() as connection:
        said, session = connection.execute(QUESTION, {"value": value}).one()
    return {"value": str(said), "session": str(session)}


def insert(value: str) -> dict[str, Any]:
    """Insert a row by the ORM, and read it again by the key that the database gave it."""
    with Session(engine) as session:
        book = Book(title=value)
        session.add(book)
        session.commit()
        key = book.id
    with Session(engine) as session:
        return {"value": session.scalars(select(Book.title).where(Book.id == key)).one(), "id": key}


def rolled_back(value: str) -> dict[str, Any]:
    """Insert a row, count it, take it back and count again."""
    count = select(func.count()).select_from(Book).where(Book.title == value)
    with Session(engine) as session:
        session.add(Book(title=value))
        within = session.scalar(count)
        session.rollback()
        return {"value": value, "within": within, "after": session.scalar(count)}


def missing(value: str) -> dict[str, Any]:
    """Ask for a table that is not there."""
    with engine.connect() as connection:
        return {"value": value, "name": connection.scalar(text("select name from no_such_table"))}


def wrong_password(value: str) -> dict[str, Any]:
    """Log in with a password that is not the user's."""
    with connect_to(DATABASE.set(password=f"not-{value}")).connect():
        return {"value": value}


def alive(value: str) -> dict[str, Any]:
    """Answer without the database."""
    return {"value": value}


def driver(value: str) -> dict[str, Any]:
    """Tell the driver, and the version of Oracle's client that it works with."""
    name = DATABASE.get_driver_name()
    module = importlib.import_module({"cx_oracle": "cx_Oracle"}.get(name, name))
    thin = name == "oracledb" and module.is_thin_mode()
    return {"value": value, "driver": name, "client": "" if thin else ".".join(map(str, module.clientversion()))}


ANSWERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "alive": alive,
    "driver": driver,
    "echo": echo,
    "insert": insert,
    "rolled-back": rolled_back,
    "missing": missing,
    "wrong-password": wrong_password,
}

if os.environ["AT_IMPORT"] == "query":
    echo("import")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer /WHAT/VALUE in JSON; what the database refuses is a 500, and is written to the service's log."""
    what, _, value = environ["PATH_INFO"].strip("/").partition("/")
    status = "200 OK"
    answer: dict[str, Any] = {"release": RELEASE, "pid": os.getpid()}
    answer["worker"] = importlib.import_module("uwsgi").worker_id()
    try:
        answer |= ANSWERS[what](value or "ok")
    except DatabaseError as error:
        status = "500 Internal Server Error"
        answer["error"] = str(error.orig)
        print(f"{what}: {error.orig}", file=sys.stderr, flush=True)
    body = json.dumps(answer).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
