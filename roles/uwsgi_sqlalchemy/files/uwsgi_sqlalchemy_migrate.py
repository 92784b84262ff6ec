"""Run a migration while holding a lock in the database, so that two hosts never run it at the same time.

    python uwsgi_sqlalchemy_migrate.py NAME COMMAND [ARGUMENT …]

Runs in a release's virtual environment, as the application's account, once a line on standard input says "go": it is
started while the release is still being proved, which takes about as long as importing SQLAlchemy. PostgreSQL and
MariaDB (MySQL) have locks that end with the session that holds them, so none is left behind by a crash. On other
databases the lock of the deployment on its own host has to do, and a line says so. Afterwards a line tells the
database's schema (Alembic's version).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from typing import Any

WAIT = 600  # seconds for which another host may migrate
LOCKING = ("postgresql", "mysql", "mariadb")


def say(text: str) -> None:
    """Print a line before what the migration prints."""
    print(text, flush=True)


def lock(connection: Any, name: str) -> None:
    """Wait for the database's lock of that name.

    Raises what the driver raises when WAIT is over, or RuntimeError.
    """
    if connection.dialect.name == "postgresql":
        # Advisory locks are named by a signed 64-bit number (PostgreSQL manual, 9.28.10).
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        connection.exec_driver_sql(f"SET lock_timeout = '{WAIT}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_lock({number})")
    elif connection.exec_driver_sql(f"SELECT GET_LOCK('{name}', {WAIT})").scalar() != 1:
        raise RuntimeError(f"another host held the lock of the migration for more than {WAIT} s")


def schema(connection: Any) -> str:
    """Return Alembic's version of the schema. Raises what the driver raises where there is none."""
    rows = connection.exec_driver_sql("SELECT version_num FROM alembic_version ORDER BY version_num").scalars()
    return " ".join(str(row) for row in rows)


def engine_for(url: str) -> Any:
    """Return an engine that keeps no connections. Raises what there is to raise: the application may be without one."""
    from sqlalchemy import create_engine  # noqa: PLC0415 (the application may be without)
    from sqlalchemy.pool import NullPool  # noqa: PLC0415

    # As the application does: what the thick mode reaches may be out of the thin mode's reach.
    thick = url.startswith("oracle+oracledb:") and os.environ.get("ORA_PYTHON_DRIVER_TYPE") == "thick"
    options = {"thick_mode": True} if thick else {}
    return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", **options)


def main(arguments: list[str]) -> int:
    """Carry out the command line and return the command's exit code."""
    name, *command = arguments
    engine, reason = None, ""
    try:
        engine = engine_for(os.environ.get("DATABASE_URL", ""))
    except Exception as error:  # no SQLAlchemy, no URL, or one that only the application understands
        reason = type(error).__name__
    if sys.stdin.readline() != "go\n":
        return 0
    with ExitStack() as stack:
        connection = None
        if engine is None:
            say(f"no lock in the database ({reason}): the lock of this host's deployment has to do")
        # A connection that stays open without a lock would only be in the way. SQLite is used by one host alone.
        elif engine.dialect.name in LOCKING:
            connection = stack.enter_context(engine.connect())
            lock(connection, name)
        elif engine.dialect.name != "sqlite":
            say(f"{engine.dialect.name} has no lock for this: the lock of this host's deployment has to do")
        code = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
        if engine is not None:
            with suppress(Exception):  # another tool, or no table yet: nothing to tell
                print(f"uwsgi-sqlalchemy schema: {schema(connection or stack.enter_context(engine.connect()))}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
