"""The engine: one per process, made at import, connecting only when a request first asks."""

import os
import sqlite3
from typing import Any

from sqlalchemy import URL, ColumnElement, Engine, create_engine, event, func, make_url, null
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

EXAMPLE = "sqlite:////var/lib/uwsgi-shelf/shelf.sqlite3"

# Seconds. A health check must be able to say "no" sooner than the proxy in front gives up; the drivers' own limits
# reach from 10 seconds (PyMySQL) over 20 (python-oracledb) to none (psycopg).
CONNECT_TIMEOUT = 5
CONNECT_TIMEOUT_ARGUMENT = {
    "psycopg": "connect_timeout",
    "psycopg2": "connect_timeout",
    "pymysql": "connect_timeout",
    "oracledb": "tcp_connect_timeout",
}


class ConfigurationError(Exception):
    """A setting is missing or unusable. The message is for a person and holds no secret."""


def setting(name: str) -> str:
    """Return the environment variable `name` without surrounding blanks; an unset one is the empty string."""
    return os.environ.get(name, "").strip()


def database_url() -> str:
    """Return the environment's DATABASE_URL.

    Raises:
        ConfigurationError: it is not set.
    """
    url = setting("DATABASE_URL")
    if not url:
        raise ConfigurationError(f"DATABASE_URL is not set. Set it to an SQLAlchemy URL, for example {EXAMPLE}")
    return url


def pool_size() -> int:
    """Return the greatest number of database connections of one worker: SHELF_POOL_SIZE, or 5.

    Raises:
        ConfigurationError: SHELF_POOL_SIZE is no whole number from 1 to 100.
    """
    text = setting("SHELF_POOL_SIZE") or "5"
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 100):
        raise ConfigurationError(f"SHELF_POOL_SIZE is {text!r}. Set it to a whole number from 1 to 100, or remove it.")
    return int(text)


def make_engine(text: str, connections: int) -> Engine:
    """Make an engine that connects when it is first used.

    Args:
        text: SQLAlchemy URL.
        connections: greatest number of connections it keeps open.

    Raises:
        ConfigurationError: the URL cannot be parsed, its driver is missing, or it names an in-memory database.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # Without the cause: SQLAlchemy 2.0 quotes the whole URL in it, password included.
        raise ConfigurationError(f"DATABASE_URL cannot be parsed. Write it like {EXAMPLE}") from None
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite and url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "DATABASE_URL names an in-memory database, which every connection would have for itself. "
            f"Name a file, for example {EXAMPLE}"
        )
    try:
        engine = create_engine(
            url,
            connect_args=_connect_arguments(url),
            pool_size=connections,
            # Nothing beyond the pool, so the database has to allow workers times SHELF_POOL_SIZE connections.
            max_overflow=0,
            pool_timeout=10,
            # A restarted database costs one extra round trip and no failed request.
            pool_pre_ping=True,
            # Half an hour: below the idle limits of common firewalls and of MariaDB (wait_timeout, 8 hours).
            pool_recycle=1800,
        )
    except (NoSuchModuleError, ImportError):
        raise ConfigurationError(
            f"DATABASE_URL asks for {url.drivername!r}, which is not installed. "
            "Use sqlite, postgresql+psycopg, mysql+pymysql or oracle+oracledb, or install that driver."
        ) from None
    if sqlite:
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _connect_arguments(url: URL) -> dict[str, Any]:
    """Limit the time of connecting, unless the URL has a limit of its own."""
    argument = CONNECT_TIMEOUT_ARGUMENT.get(url.get_driver_name())
    return {argument: CONNECT_TIMEOUT} if argument and argument not in url.query else {}


def _prepare_sqlite(connection: sqlite3.Connection, entry: ConnectionPoolEntry) -> None:
    """Let workers read while one writes, wait for each other, and enforce foreign keys."""
    # The wait comes first: switching to WAL needs a lock itself.
    connection.execute("PRAGMA busy_timeout = 5000")
    connection.execute("PRAGMA journal_mode = WAL")
    # With WAL this loses at most the last commits on power failure, and never corrupts (sqlite.org/pragma.html).
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    # Noted while connecting: a connection inherited through a fork keeps the id of the process that opened it.
    entry.info["session"] = f"{os.getpid()}-{id(connection)}"


def session_function(dialect: str) -> ColumnElement[Any]:
    """Return the expression with which a database names the session that evaluates it; SQL's NULL for SQLite.

    Args:
        dialect: SQLAlchemy's name of the database, `engine.dialect.name`.
    """
    functions: dict[str, ColumnElement[Any]] = {
        "postgresql": func.pg_backend_pid(),
        "mysql": func.connection_id(),
        "mariadb": func.connection_id(),
        "oracle": func.sys_context("userenv", "sid"),
    }
    return functions.get(dialect, null())


def short_reason(error: BaseException, url: URL) -> str:
    """Return a database error as one line for the log, with the URL's password blotted out.

    Args:
        error: what the driver or SQLAlchemy raised.
        url: the URL that was connected to.
    """
    text = " ".join(str(getattr(error, "orig", None) or error).split())
    return text.replace(url.password, "***") if url.password else text
