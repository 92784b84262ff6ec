"""The migration: notes when it ran and on which host, and the version of the schema where Alembic keeps it."""

import os
import socket
import time

from sqlalchemy import create_engine, text

VERSION = "v1"
SECONDS = 0.0
TABLES = (
    "create table if not exists alembic_version (version_num varchar(32) primary key)",
    "create table if not exists migrations (id serial primary key, version text, host text,"
    " began timestamptz default clock_timestamp(), ended timestamptz)",
)


def migrate() -> None:
    """Run it; every statement is committed at once, so that another run sees this one."""
    with create_engine(os.environ["DATABASE_URL"], isolation_level="AUTOCOMMIT").connect() as connection:
        for table in TABLES:
            connection.execute(text(table))
        run = connection.execute(
            text("insert into migrations (version, host) values (:version, :host) returning id"),
            {"version": VERSION, "host": socket.gethostname()},
        ).scalar_one()
        time.sleep(SECONDS)
        connection.execute(text("delete from alembic_version"))
        connection.execute(text("insert into alembic_version values (:version)"), {"version": VERSION})
        connection.execute(text("update migrations set ended = clock_timestamp() where id = :run"), {"run": run})


if __name__ == "__main__":
    migrate()
