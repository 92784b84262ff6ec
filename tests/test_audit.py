"""The fork audit finds what an application's import leaves behind, and raises no alarm over what is safe to fork."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from templating import ROLE

# Who connects is answered by nobody: the connections wait in the backlog.
SERVER = socket.create_server(("127.0.0.1", 0), backlog=100)
AUDIT = ROLE / "files" / "uwsgi_sqlalchemy_audit.py"
TESTS = Path(__file__).resolve().parent

IDLE = "pooled connection"
POOLS = """\
import sqlalchemy as sa, standin
from sqlalchemy.pool import QueuePool
def ask(url, **options):
    engine = sa.create_engine(url, module=standin, _initialize=False, **options)
    engine.connect().close()
    return engine
idle = ask("mysql+pymysql://app:secret@db/shop")
oracle = ask("oracle+oracledb://app:secret@db/shop")
odbc = ask("mysql+pyodbc://app:secret@db/shop")
lent = sa.create_engine("mysql+pymysql://app:secret@db/lent", module=standin, _initialize=False)
connection = lent.connect()
bare = QueuePool(standin.connect)
bare.connect().close()
"""

OTHERS = """\
import _thread, asyncio, os, socket, subprocess, threading, time
import oracledb
client = socket.create_connection(("127.0.0.1", int(os.environ["STANDIN_PORT"])))
listening = socket.create_server(("127.0.0.1", 0))
metrics = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
metrics.connect(("127.0.0.1", 8125))
thread = threading.Thread(target=time.sleep, args=(60,), daemon=True, name="collector")
thread.start()
_thread.start_new_thread(time.sleep, (60,))
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
lock = threading.Lock()
lock.acquire()
class Cache:
    def __init__(self):
        self.changed = threading.Condition()
        self.changed.acquire()
cache = Cache()
loop = asyncio.new_event_loop()
pool = oracledb.create_pool(user="app", password="secret", dsn="127.0.0.1:1/shop", min=0, max=2)
import atexit
atexit.register(child.kill)
"""

HARMLESS = """\
import asyncio, concurrent.futures, logging, logging.handlers, multiprocessing, socket, ssl, subprocess, threading
import sqlalchemy as sa, standin
url = "mysql+pymysql://app:secret@db/shop"
unused = sa.create_engine(url, module=standin)
unpooled = sa.create_engine(url, module=standin, _initialize=False, poolclass=sa.NullPool)
unpooled.connect().close()
disposed = sa.create_engine(url, module=standin, _initialize=False)
disposed.connect().close()
disposed.dispose()
memory = sa.create_engine("sqlite://")
held = memory.connect()
file = sa.create_engine("sqlite:///shop.db")
file.connect().close()
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journal.bind("journal")
logging.getLogger().addHandler(logging.handlers.SysLogHandler("journal"))
logging.getLogger().addHandler(logging.FileHandler("log"))
executor = concurrent.futures.ThreadPoolExecutor()
shared = multiprocessing.Lock()
context = ssl.create_default_context()
lock = threading.Lock()
with lock:
    pass
finished = threading.Thread(target=int)
finished.start()
subprocess.run(["true"], check=True)
async def nothing(): await asyncio.sleep(0)
asyncio.run(nothing())
def fill(): disposed.connect().close()
"""


def run(folder: Path, app: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Audit an application, as a person does or (with an environment) as uWSGI does: by importing the audit."""
    (folder / "shop.py").write_text(app)
    if "sqlalchemy" not in app:
        # Its import takes longer than all the rest.
        (folder / "sqlalchemy.py").write_text("raise ImportError('absent')")
    command = ("-c", "import uwsgi_sqlalchemy_audit") if environment else (str(AUDIT), *(arguments or ("shop",)))
    return subprocess.run(
        (sys.executable, *command),
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}:{TESTS}:{AUDIT.parent}",
            "STANDIN_PORT": str(SERVER.getsockname()[1]),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def report(folder: Path, app: str, *arguments: str) -> list[dict[str, str]]:
    done = run(folder, app, *arguments)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def line(app: str, text: str) -> str:
    return f"shop.py:{next(n for n, one in enumerate(app.splitlines(), 1) if text in one)} (shop)"


def test_pooled_connections(tmp_path: Path) -> None:
    made = line(POOLS, "    engine.connect")
    found = {one["what"].partition(" the pool of ")[2]: one for one in report(tmp_path, POOLS)}
    assert {pool: (one["kind"], one["verdict"], one["where"]) for pool, one in found.items()} == {
        "mysql+pymysql://app:***@db/shop": (IDLE, "cured by the guard", made),
        "oracle+oracledb://app:***@db/shop": (IDLE, "refused", made),
        "mysql+pyodbc://app:***@db/shop": (IDLE, "refused", made),
        "mysql+pymysql://app:***@db/lent": ("connection checked out", "refused", line(POOLS, "lent.connect")),
        "a pool outside of any engine": (IDLE, "refused", line(POOLS, "bare.connect")),
    }, "and their sockets are not reported once more"
    assert "Oracle's drivers" in found["oracle+oracledb://app:***@db/shop"]["advice"]
    assert "pyodbc is not known" in found["mysql+pyodbc://app:***@db/shop"]["advice"]


def test_what_else_a_fork_shares_or_loses(tmp_path: Path) -> None:
    found = [
        (one["kind"], re.sub(r":\d{5}\b", ":PORT", one["what"]), one["verdict"], one["where"].partition(" (")[0])
        for one in report(tmp_path, OTHERS)
    ]
    expected = [
        ("socket", "a connection to 127.0.0.1:PORT, opened by the application", "refused", "client = "),
        ("socket", "a socket that listens on 127.0.0.1:PORT, opened by the application", "refused", "listening = "),
        ("socket", "datagrams to 127.0.0.1:8125, opened by the application", "harmless", "metrics.connect"),
        ("thread", "the thread collector", "refused", "thread.start()"),
        ("child process", "sleep 60", "refused", "child = "),
        ("held lock", "a lock of shop", "refused", "lock = "),
        ("held lock", "a lock of shop", "refused", "cache = "),
        ("event loop", "an open event loop (epoll), which all workers would share", "refused", "loop = "),
        ("driver's pool", "an open oracledb.pool.ConnectionPool", "refused", "pool = "),
        ("thread", "the thread Thread-1 (_bg_task_func)", "refused", "pool = "),
    ]
    for kind, what, verdict, made in expected:
        assert (kind, what, verdict, line(OTHERS, made).partition(" (")[0]) in found
    native = [one[2:] for one in found if one[0] == "native thread"]
    assert native == [("refused", line(OTHERS, "_thread.start").partition(" (")[0])]


def test_no_false_alarm(tmp_path: Path) -> None:
    found = report(tmp_path, HARMLESS)
    assert [one for one in found if one["verdict"] != "harmless"] == []
    assert [one["what"] for one in found] == ["datagrams to journal, opened by the application"]


def test_a_worker_that_fills_its_pool_later_is_no_finding_and_one_that_fills_it_now_is(tmp_path: Path) -> None:
    kinds = [one["kind"] for one in report(tmp_path, HARMLESS + "fill()\n")]
    assert kinds == ["pooled connection", "socket"]


def test_a_sqlalchemy_that_cannot_discard_is_refused(tmp_path: Path) -> None:
    old = POOLS.replace("idle =", "from sqlalchemy.engine import Engine\nEngine.dispose = lambda self: None\nidle =")
    found = next(one for one in report(tmp_path, old) if "pymysql://app:***@db/shop" in one["what"])
    assert found["verdict"] == "refused" and found["advice"].startswith("Use SQLAlchemy 1.4.33 or later")


@pytest.mark.parametrize(
    ("library", "verdict"), [("libscipy_openblas64_.so", "harmless"), ("librdkafka.so", "refused")]
)
def test_native_threads_are_told_by_their_library(tmp_path: Path, library: str, verdict: str) -> None:
    app = "import _thread, time, uwsgi_sqlalchemy_audit as audit\n_thread.start_new_thread(time.sleep, (60,))\n"
    app += f"audit.library_of = lambda task: '/usr/lib/{library}'\n"
    file = tmp_path / "report.json"
    assert run(tmp_path, app, FORK_AUDIT_MODULE="shop", FORK_AUDIT_REPORT=str(file)).stderr == ""
    found = json.loads(file.read_text())
    assert [(one["kind"], one["where"], one["verdict"]) for one in found] == [
        ("native thread", f"/usr/lib/{library}", verdict)
    ]


@pytest.mark.parametrize("app", ["import absent_module", "raise SystemExit(0)"])
def test_an_import_that_fails_ends_with_its_traceback(tmp_path: Path, app: str) -> None:
    done = run(tmp_path, app)
    assert (done.returncode, done.stdout) == (22, "")
    assert "Traceback (most recent call last)" in done.stderr and app in done.stderr


def test_a_factory_is_called_once_and_what_it_opens_is_found(tmp_path: Path) -> None:
    app = "import threading, time\ncalls = []\ndef make():\n    calls.append(1)\n    return start\n"
    app += "def start():\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n    return calls\n"
    assert report(tmp_path, app, "shop") == []
    assert [one["kind"] for one in report(tmp_path, app, "shop:start()")] == ["thread"]
    again = "import uwsgi_sqlalchemy_audit as audit, shop\naudit.load('shop:make()')\nshop.make()\nprint(shop.calls)"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{AUDIT.parent}"}
    done = subprocess.run(
        (sys.executable, "-c", again), env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[1]\n"


def test_imported_it_writes_its_report_to_the_file_that_the_environment_names(tmp_path: Path) -> None:
    app = "import threading\nlock = threading.Lock()\nlock.acquire()\n"
    file = tmp_path / "report.json"
    names = {"FORK_AUDIT_MODULE": "shop:app", "FORK_AUDIT_REPORT": str(file)}
    done = run(tmp_path, app, **names)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [(one["kind"], one["where"]) for one in json.loads(file.read_text())] == [
        ("held lock", "shop.py:2 (shop, lock)")
    ]


def test_a_person_reads_it_as_text(tmp_path: Path) -> None:
    said = run(tmp_path, "import threading\nlock = threading.Lock()\nlock.acquire()\n", "--text", "shop").stdout
    assert said.startswith("refused: held lock: a lock of shop\n    at shop.py:2 (shop, lock)\n    No worker could")
    assert run(tmp_path, "", "--text", "shop").stdout == "Nothing that a fork would share or lose.\n"


def test_a_report_is_added_to_what_its_output_holds(tmp_path: Path) -> None:
    (tmp_path / "empty.py").touch()
    (tmp_path / "sqlalchemy.py").write_text("raise ImportError('absent')")
    log = tmp_path / "log"
    with log.open("w") as output:
        output.write("before\n")
        output.flush()
        subprocess.run((sys.executable, str(AUDIT), "empty"), cwd=tmp_path, stdout=output, timeout=60, check=True)
    assert log.read_text() == "before\n[]\n"
