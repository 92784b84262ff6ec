"""The fork guard: what a forked process does with the pools it inherits. Real uWSGI and drivers are a scenario's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from templating import ROLE

TESTS = Path(__file__).resolve().parent
GUARD = "import uwsgi_sqlalchemy_guard\n"

IMPORTS = "import gc, json, os, sys\nimport sqlalchemy as sa\nimport standin\n"
ENGINE = """
engine = sa.create_engine("mysql+pymysql://app:secret@db/shop", module=standin, _initialize=False)
with engine.connect() as connection:
    inherited = connection.connection.dbapi_connection
"""
# The worker ends as uWSGI's do, through the interpreter's finalization, after it has used the engine.
WORKER = """
other = sa.engine_from_config({"url": "mysql+pymysql://db/x", "_initialize": False}, prefix="", module=standin)
pools = [other.pool, engine.pool]
memory = sa.create_engine("sqlite://")
with memory.begin() as connection:
    connection.execute(sa.text("create table kept (x)"))
del connection
servers = list(standin.servers)
servers[0].recv(1000)
os.chdir("/")
inward, outward = os.pipe()
if os.fork() == 0:
    del inherited
    said = {"directory": os.getcwd(), "frozen": gc.get_freeze_count() > 1000, "new": [other.pool is not pools[0], engine.pool is not pools[1]]}
    del pools
    with engine.connect():
        said["connections"] = len(standin.servers)
    with memory.connect() as connection:
        said["memory"] = connection.execute(sa.text("select count(*) from kept")).scalar()
    os.chdir("/")
    if os.fork() == 0:
        os.write(outward, os.getcwd().encode())
        os._exit(0)
    os.wait()
    said["directory of its child"] = os.read(inward, 1000).decode()
    if DISPOSE:
        engine.dispose(close=False)
    os.write(outward, json.dumps(said).encode())
    sys.exit()
os.wait()
said = json.loads(os.read(inward, 1000))
servers[0].setblocking(False)
try:
    said["sent to the master's session"] = servers[0].recv(1000).decode()
except BlockingIOError:
    said["sent to the master's session"] = ""
with engine.connect() as connection:
    said["master keeps its session"] = connection.connection.dbapi_connection is inherited
print(json.dumps(said))
"""


def run(folder: Path, app: str) -> subprocess.CompletedProcess[str]:
    """Run an application in a process of its own, in a folder."""
    path = os.pathsep.join((str(folder), str(ROLE / "files"), str(TESTS)))
    environment = {**os.environ, "PYTHONPATH": path}
    command = (sys.executable, "-c", app)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30, check=False)


def facts(folder: Path, app: str) -> dict[str, Any]:
    done = run(folder, app)
    assert not done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_a_worker_uses_nothing_that_it_inherited(tmp_path: Path) -> None:
    assert facts(tmp_path, GUARD + IMPORTS + ENGINE + WORKER.replace("DISPOSE", "False")) == {
        "connections": 2,
        "new": [True, True],
        "memory": 0,
        "directory": str(tmp_path),
        "frozen": True,
        "directory of its child": "/",
        "sent to the master's session": "",
        "master keeps its session": True,
    }


def test_without_the_guard_it_uses_its_masters_and_drops_it_loudly(tmp_path: Path) -> None:
    """Also where the application does what SQLAlchemy documents: dispose(close=False), but drops the old pool."""
    said = facts(tmp_path, IMPORTS + ENGINE + WORKER.replace("DISPOSE", "True"))
    assert said["connections"] == 1 and said["new"] == [False, False] and (said["directory"], said["frozen"]) == ("/", False)
    assert said["sent to the master's session"].startswith("rollback ")
    assert said["sent to the master's session"].endswith("goodbye ")


def test_a_worker_that_cannot_discard_its_inheritance_ends(tmp_path: Path) -> None:
    app = GUARD + IMPORTS + ENGINE + "engine.pool.recreate = lambda: 1 / 0\n"
    app += "if os.fork() == 0:\n    print('serves', flush=True)\n    os._exit(0)\n"
    done = run(tmp_path, app + "print(os.waitstatus_to_exitcode(os.wait()[1]))")
    assert done.stdout == "1\n"
    assert done.stderr.startswith("uwsgi_sqlalchemy_guard: this worker cannot discard the connections it inherited:\n")
    assert "ZeroDivisionError" in done.stderr


def test_an_application_without_sqlalchemy_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sqlalchemy.py").write_text("raise ImportError('absent')")
    done = run(tmp_path, GUARD + "import os\nif os.fork() == 0:\n    os._exit(0)\nprint(os.wait()[1])")
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize(("parameters", "left_alone"), [("self", True), ("self, close=True", False)])
def test_a_sqlalchemy_that_cannot_discard_is_left_alone(tmp_path: Path, parameters: str, left_alone: bool) -> None:
    (tmp_path / "sqlalchemy").mkdir()
    (tmp_path / "sqlalchemy" / "__init__.py").touch()
    (tmp_path / "sqlalchemy" / "engine.py").write_text(f"class Engine:\n    def dispose({parameters}): pass\n")
    app = "from sqlalchemy.engine import Engine\nbefore = Engine.__init__\n"
    assert run(tmp_path, app + GUARD + "print(Engine.__init__ is before)").stdout == f"{left_alone}\n"
