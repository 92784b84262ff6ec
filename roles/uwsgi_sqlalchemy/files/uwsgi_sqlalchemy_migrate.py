"""Run a migration while holding a lock in the database, so that two hosts never run it at the same time.

    python uwsgi_sqlalchemy_migrate.py NAME COMMAND [ARGUMENT …]

Runs in a release's virtual environment, as the application's account. PostgreSQL and MariaDB (MySQL) have locks that
end with the session that holds them, so none is left behind by a crash. On other databases the lock of the deployment
on its own host has to do, and a line says so. Afterwards a line tells the database's schema (Alembic's version).
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
    """Return Alembic's version of the schema, or an empty text where there is none."""
    with suppress(Exception):  # another tool, or no table yet: nothing to tell
        rows = connection.exec_driver_sql("SELECT version_num FROM alembic_version ORDER BY version_num").scalars()
        return " ".join(str(row) for row in rows)
    return ""


def main(arguments: list[str]) -> int:
    """Carry out the command line and return the command's exit code."""
    name, *command = arguments
    url = os.environ.get("DATABASE_URL", "")
    try:
        from sqlalchemy import create_engine  # noqa: PLC0415 (the application may be without)
        from sqlalchemy.pool import NullPool  # noqa: PLC0415

        # As the application does: what the thick mode reaches may be out of the thin mode's reach.
        thick = url.startswith("oracle+oracledb:") and os.environ.get("ORA_PYTHON_DRIVER_TYPE") == "thick"
        options = {"thick_mode": True} if thick else {}
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", **options)
    except Exception as error:  # no SQLAlchemy, no URL, or one that only the application understands
        print(f"no lock in the database ({type(error).__name__}): the lock of this host's deployment has to do")
        return subprocess.run(command, check=False).returncode
    with ExitStack() as stack:
        # A connection that stays open without a lock would only be in the way. SQLite is used by one host alone.
        if engine.dialect.name in LOCKING:
            lock(stack.enter_context(engine.connect()), name)
        elif engine.dialect.name != "sqlite":
            print(f"{engine.dialect.name} has no lock for this: the lock of this host's deployment has to do")
        code = subprocess.run(command, check=False).returncode
    with suppress(Exception), engine.connect() as connection:
        if version := schema(connection):
            print(f"uwsgi-sqlalchemy schema: {version}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
