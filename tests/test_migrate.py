"""The program that runs a migration (files/uwsgi_sqlalchemy_migrate.py): when it goes, and what it says.

Its lock is shown by two real hosts and a real database: molecule/releases/tests/test_two_hosts.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import uwsgi_sqlalchemy_migrate

COMMAND = ("sh", "-c", "cat; echo migrated; exit 3")


def migrate(url: str, told: str) -> subprocess.CompletedProcess[str]:
    """Run the program as uwsgi-sqlalchemy does, with this on its standard input."""
    command = [sys.executable, str(Path(uwsgi_sqlalchemy_migrate.__file__)), "uwsgi-shop", *COMMAND]
    environment = {"DATABASE_URL": url, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, input=told, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("told", ["", "no\n"], ids=["the pipe is closed", "another word"])
def test_without_the_word_nothing_is_migrated(told: str) -> None:
    done = migrate("sqlite://", told)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_migration_gets_no_input_and_its_exit_code_is_the_programs() -> None:
    done = migrate("sqlite://", "go\nmore\n")
    assert (done.returncode, done.stdout) == (3, "migrated\n")


def test_without_a_url_of_a_database_it_says_that_there_is_no_lock() -> None:
    done = migrate("shelf.db", "go\n")
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "no lock in the database (ArgumentError): the lock of this host's deployment has to do",
        "migrated",
    ]
