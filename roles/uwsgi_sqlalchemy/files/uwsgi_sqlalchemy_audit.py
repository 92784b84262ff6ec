"""Say what a fork would share or lose after an application was imported, with the line of code that made it.

    python uwsgi_sqlalchemy_audit.py [--text] [--report FILE] MODULE[:CALLABLE]

uWSGI does the same in the throw-away process that proves a release: the ini imports this module before the application,
and the environment names both (FORK_AUDIT_MODULE = MODULE[:CALLABLE], FORK_AUDIT_REPORT = FILE).

The report is a list of findings: kind, what, where, verdict, advice. The verdicts are those of a preforking master with
uwsgi_sqlalchemy_guard in it; with lazy-apps nothing of this crosses a fork. An application that cannot be imported ends
the process with its traceback and status 22, as uWSGI's need-app does. It runs in the application's environment, on
Linux, with Python 3.9 or later, and changes nothing but the process it runs in.
"""

from __future__ import annotations

import _thread
import argparse
import collections
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import re
import socket
import sys
import sysconfig
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from types import CellType, FrameType, GeneratorType, ModuleType
from typing import Any

CURED, REFUSED, HARMLESS = "cured by the guard", "refused", "harmless"
UNKNOWN = "not seen"

# Drivers whose idle connection is nothing but a socket and memory, touched only by who uses the object: an inherited
# one that nobody uses is safe (each was tried). Oracle's have threads behind it, ODBC's driver manager a pool.
SAFE_DRIVERS = {"psycopg", "psycopg2", "asyncpg", "pg8000", "pymysql", "mysqldb", "mysqlconnector", "aiomysql"}
ORACLE = {"oracledb", "cx_Oracle"}
DRIVERS = ORACLE | {"psycopg", "psycopg2", "asyncpg", "pg8000", "pymysql", "MySQLdb", "mysql", "aiomysql", "pyodbc"}

# Pools of the drivers' own, and how to tell one that is open from one that was only declared, or is closed.
POOLS: dict[tuple[str, str], Callable[[Any], bool]] = {
    ("oracledb.pool", "BaseConnectionPool"): lambda pool: pool._impl is not None,
    ("cx_Oracle", "SessionPool"): bool,
    ("psycopg_pool.base", "BasePool"): lambda pool: not pool.closed,
    ("psycopg2.pool", "AbstractConnectionPool"): lambda pool: bool(pool._pool or pool._used),
    ("mysql.connector.pooling", "MySQLConnectionPool"): lambda pool: pool._cnx_queue.qsize() > 0,
    ("asyncpg.pool", "Pool"): lambda pool: pool._initialized and not pool._closed,
    ("aiomysql.pool", "Pool"): lambda pool: pool.size > 0,
    ("asyncmy.pool", "Pool"): lambda pool: pool.size > 0,
}

STANDARD = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
PASSING = (FrameType, GeneratorType, CellType)
OBSERVED = {"socket.connect", "socket.bind", "subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty"}
# What to do about a thing of this kind that no guard can cure.
ADVICE = {
    "driver's pool": "Make it in the worker, or let an Engine's pool do its work (no creator=).",
    "event loop": "Make it in the worker, or close it before the import ends.",
    "raw connection": "Connect in the worker, at the first use, instead of at import.",
    "socket": "Open it in the worker, at the first use, instead of at import.",
    "thread": "It would not exist in any worker: start it there (uwsgidecorators.postfork).",
    "native thread": "It would not exist in any worker: use the library there, at the first use.",
    "child process": "A worker could neither wait for it nor have its pipes alone: start it in the worker.",
    "held lock": "No worker could ever take it: release it before the import ends.",
}
LOCKS = (type(threading.Lock()), type(threading.RLock()))


@dataclass(frozen=True)
class Finding:
    """One thing that a fork would share or lose."""

    kind: str
    what: str
    where: str
    verdict: str
    advice: str


def refused(kind: str, what: str, where: str) -> Finding:
    """Return the finding on a thing that no guard can cure."""
    return Finding(kind, what, where, REFUSED, ADVICE[kind])


def library(path: str) -> bool:
    """Say whether a file belongs to an installed distribution."""
    return "/site-packages/" in path or "/dist-packages/" in path


def standard(path: str) -> bool:
    """Say whether a file belongs to Python itself, or is this one."""
    return path.startswith(("<", __file__)) or (path.startswith(STANDARD) and not library(path))


def place(path: str, line: int | str, module: str) -> str:
    """Return a place in code as a person reads it."""
    return f"{os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path}:{line} ({module})"


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame, its caller, and so on, also out of the greenlet in which SQLAlchemy runs an async driver."""
    module = sys.modules.get("greenlet")
    greenlet = module.getcurrent() if module else None
    while frame:
        yield frame
        frame = frame.f_back
        if frame is None and greenlet is not None and greenlet.parent is not None:
            greenlet = greenlet.parent
            frame = greenlet.gr_frame


def caller(frame: FrameType | None) -> str:
    """Return the innermost place in the application's own code, or else in a library's, on the way out of a frame."""
    fallback = UNKNOWN
    for outer in outward(frame):
        path = outer.f_code.co_filename
        if not standard(path):
            here = place(path, outer.f_lineno, outer.f_globals.get("__name__", "?"))
            if not library(path):
                return here
            fallback = here if fallback == UNKNOWN else fallback
    return fallback


def opener(frame: FrameType | None) -> str:
    """Return the name of the library nearest to a frame on its way out, or "the application"."""
    nearest = next((outer for outer in outward(frame) if not standard(outer.f_code.co_filename)), None)
    if nearest is None or not library(nearest.f_code.co_filename):
        return "the application"
    return str(nearest.f_globals.get("__name__", "?")).partition(".")[0]


def holder(thing: object) -> tuple[str, object]:
    """Return the place of the module variable through which a thing is reached, and what holds the thing directly."""
    modules = {id(vars(module)): module for module in list(sys.modules.values()) if isinstance(module, ModuleType)}
    direct: object = None
    level, seen = [thing], {id(thing), id(modules)}
    for _ in range(6):
        above: list[object] = []
        seen |= {id(level), id(above)}
        for one in level:
            for parent in gc.get_referrers(one):
                if id(parent) in seen or isinstance(parent, PASSING):
                    continue
                seen.add(id(parent))
                above.append(parent)
                module = modules.get(id(parent))
                if module is None:
                    direct = direct or (None if isinstance(parent, (dict, list, set, tuple)) else parent)
                    continue
                direct = direct or module
                path = getattr(module, "__file__", None) or "<built in>"
                if not standard(path) and isinstance(parent, dict):
                    name = next(str(name) for name, value in parent.items() if value is one)
                    return place(path, definition(path, name), f"{module.__name__}, {name}"), direct
        level = above[:2000]
    return UNKNOWN, direct


def definition(path: str, name: str) -> int | str:
    """Return the line of a module's file where one of its variables is first set."""
    sets = re.compile(rf"\s*((class|def)\s+)?{re.escape(name)}\b|.*\bimport\b.*\b{re.escape(name)}\b")
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as source:
        return next((number for number, line in enumerate(source, 1) if sets.match(line)), "?")
    return "?"


def descriptors() -> dict[int, str]:
    """Return this process's open files: number and what it leads to, which names sockets by a number of their own."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def target(number: int) -> str:
    """Return what an open file leads to, or nothing."""
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


class Audit:
    """Observes the import of an application and then looks at what it left."""

    def __init__(self) -> None:
        self.inherited = set(descriptors().values())
        self.tasks = set(os.listdir("/proc/self/task"))
        self.threads = {thread.ident for thread in threading.enumerate()}
        self.children = set(children())
        self.connected: dict[str, tuple[str, str]] = {}
        self.started: weakref.WeakKeyDictionary[threading.Thread, str] = weakref.WeakKeyDictionary()
        self.bare: list[str] = []
        self.spawned: list[str] = []
        self.records: weakref.WeakSet[Any] = weakref.WeakSet()
        self.known: set[str] = set()
        self.watching = True
        sys.addaudithook(self.observe)
        self.observe_threads()
        try:
            from sqlalchemy import event  # noqa: PLC0415
            from sqlalchemy.engine import Engine  # noqa: PLC0415
            from sqlalchemy.pool import Pool  # noqa: PLC0415
        except ImportError:
            return
        event.listen(Engine, "do_connect", self.connecting)
        event.listen(Pool, "connect", self.opened)
        event.listen(Pool, "checkout", self.lent)

    def observe(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note who connects or binds a socket or starts a process. What an audit hook raises would stop it."""
        if event not in OBSERVED or not self.watching:
            return  # the look at the stack below is an event of its own
        frame = sys._getframe(1)
        if event.startswith("socket."):
            # A pooled connection's own socket is noted with the connection.
            if not any(one.f_code.co_filename.endswith("sqlalchemy/pool/base.py") for one in outward(frame)):
                self.connected[target(arguments[0].fileno())] = (caller(frame), opener(frame))
        else:
            self.spawned.append(caller(frame))

    def observe_threads(self) -> None:
        """Note who starts a thread: Python 3.11 and older raise no event for it."""
        start, start_bare = threading.Thread.start, _thread.start_new_thread

        def start_noted(thread: threading.Thread) -> None:
            where = caller(sys._getframe(1))
            self.started[thread] = self.started.get(threading.current_thread(), where) if where == UNKNOWN else where
            start(thread)

        def start_bare_noted(*arguments: Any) -> int:
            self.bare.append(caller(sys._getframe(1)))
            return start_bare(*arguments)

        threading.Thread.start = start_noted  # type: ignore[assignment,method-assign]
        _thread.start_new_thread = start_bare_noted

    def sockets(self) -> set[str]:
        """Return the sockets that were opened since the beginning."""
        return {name for name in descriptors().values() if name.startswith("socket:")} - self.inherited

    def connecting(self, *_: Any) -> None:
        """Note, before SQLAlchemy connects, the sockets that are there: they are none of the new connection's."""
        self.known |= self.sockets()

    def opened(self, connection: Any, record: Any) -> None:
        """Note with a pooled connection where it was opened and which sockets are its own."""
        told = target(fileno(getattr(connection, "driver_connection", connection)))
        mine = {told} if told else self.sockets() - self.known - set(self.connected)
        self.known |= mine
        record.info[__name__] = {"sockets": mine, "opened": caller(sys._getframe(1))}
        self.records.add(record)

    def lent(self, connection: Any, record: Any, fairy: Any) -> None:
        """Note where a pooled connection was taken."""
        record.info.setdefault(__name__, {})["lent"] = caller(sys._getframe(1))

    def findings(self) -> list[Finding]:
        """Return what a fork now would share or lose."""
        self.watching = False
        gc.collect()
        if set(os.listdir("/proc/self/task")) != self.tasks:
            # A thread that has done its work may still be on its way out.
            time.sleep(0.2)
        pooled, their_sockets = self.pooled()
        pools, locks = self.held()
        threads = (*self.python_threads(), *self.native_threads())
        found = (*pooled, *pools, *self.unpooled(their_sockets), *threads, *self.processes(), *locks)
        counts = collections.Counter(found)
        return [one if n == 1 else replace(one, what=f"{n} times: {one.what}") for one, n in counts.items()]

    def pooled(self) -> tuple[list[Finding], set[str]]:
        """Return the findings on SQLAlchemy's pools, and the sockets that they account for."""
        found: list[Finding] = []
        sockets: set[str] = set()
        if not self.records:
            return found, sockets
        from sqlalchemy.engine import Engine  # noqa: PLC0415

        engines = {id(thing.pool): thing for thing in gc.get_objects() if isinstance(thing, Engine)}
        for record in list(self.records):
            if record.dbapi_connection is None:
                continue
            seen = record.info.get(__name__, {})
            sockets |= seen.get("sockets", set())
            engine = engines.get(id(record._ConnectionRecord__pool))
            lent = record.in_use
            verdict, advice = judged(engine, lent)
            if verdict == HARMLESS:
                continue
            url = engine.url.render_as_string(hide_password=True) if engine else "a pool outside of any engine"
            what = f"a connection {'taken from' if lent else 'idle in'} the pool of {url}"
            where = seen.get("lent" if lent else "opened", UNKNOWN)
            kind = "connection checked out" if lent else "pooled connection"
            found.append(Finding(kind, what, where, verdict, advice))
        return found, sockets

    def unpooled(self, accounted: set[str]) -> Iterator[Finding]:
        """Yield the findings on sockets, event loops and raw connections of drivers."""
        raw = list(raw_connections())
        loops = "anon_inode:[eventpoll]" in set(descriptors().values()) - self.inherited
        if loops:
            selectors = [one for one in gc.get_objects() if type(one).__name__ in {"EpollSelector", "Loop"}]
            loop = next((seen for seen, _ in map(holder, selectors) if seen != UNKNOWN), UNKNOWN)
            yield refused("event loop", "an open event loop (epoll), which all workers would share", loop)
        for number, name in descriptors().items():
            if name in self.inherited or name in accounted or not name.startswith("socket:"):
                continue
            driver = next((one for one in raw if fileno(one) == number), None)
            other = peer(number)
            if other is None or (loops and other == "a socket pair"):
                continue
            where, library_name = self.connected.get(name, (UNKNOWN, ""))
            if driver is not None:
                raw.remove(driver)
                library_name = type(driver).__module__.partition(".")[0]
                where = holder(driver)[0] if where == UNKNOWN else where
            what = f"{other}, opened by {library_name}" if library_name else other
            if other.startswith("datagrams"):
                advice = "Each datagram is sent whole, and logs and metrics wait for no answer."
                yield Finding("socket", what, where, HARMLESS, advice)
            else:
                yield refused("socket" if driver is None else "raw connection", what, where)
        for one in raw:
            if type(one).__module__.partition(".")[0] in ORACLE and not self.in_pool(one):
                yield refused("raw connection", "a connection to Oracle outside of any pool", holder(one)[0])

    def in_pool(self, connection: object) -> bool:
        """Say whether a driver's connection is one that SQLAlchemy's pools account for."""
        return any(connection is getattr(record, "driver_connection", None) for record in list(self.records))

    def python_threads(self) -> Iterator[Finding]:
        """Yield the findings on threads that Python started."""
        for thread in threading.enumerate():
            if thread.ident not in self.threads:
                yield refused("thread", f"the thread {thread.name}", self.started.get(thread, UNKNOWN))

    def native_threads(self) -> Iterator[Finding]:
        """Yield the findings on threads that libraries started below Python."""
        python = {str(thread.native_id) for thread in threading.enumerate()}
        for task in set(os.listdir("/proc/self/task")) - self.tasks - python:
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm", encoding="utf-8") as name:
                what, origin = f"a native thread named {name.read().strip()}", library_of(task)
                if "openblas" in origin:
                    # It registers pthread_atfork: its threads end before a fork and start again when they are needed.
                    advice = "OpenBLAS starts its threads again in a worker."
                    yield Finding("native thread", what, origin, HARMLESS, advice)
                else:
                    # A thread of _thread.start_new_thread() that runs no Python code looks native too.
                    where = origin if origin != UNKNOWN else ", ".join(dict.fromkeys(self.bare)) or UNKNOWN
                    yield refused("native thread", what, where)

    def processes(self) -> Iterator[Finding]:
        """Yield the findings on child processes."""
        for child, command in children().items():
            if child in self.children or "multiprocessing.resource_tracker" in command:
                continue  # Python's tracker is made to be inherited: it only reads whole lines from a pipe.
            yield refused("child process", command, ", ".join(dict.fromkeys(self.spawned)) or UNKNOWN)

    def held(self) -> tuple[list[Finding], list[Finding]]:
        """Return the findings on drivers' pools and on locks that are held, from one walk over all objects."""
        kinds = pool_kinds()
        pools: dict[int, object] = {}
        locks: dict[int, object] = {}
        for parent in gc.get_objects():
            for thing in (parent, *gc.get_referents(parent)):
                kind = type(thing)
                if kind in LOCKS:
                    if repr(thing).startswith("<locked"):
                        locks[id(thing)] = thing
                elif kind in kinds and kinds[kind](thing):
                    pools[id(thing)] = thing
        found = [
            refused("driver's pool", f"an open {type(pool).__module__}.{type(pool).__name__}", holder(pool)[0])
            for pool in pools.values()
        ]
        return found, [finding for lock in locks.values() for finding in held_lock(lock)]


def judged(engine: Any, lent: bool) -> tuple[str, str]:
    """Return the verdict on a pooled connection, and the advice."""
    if engine is None:
        advice = "Let an Engine own the pool, or fill it in the worker."
    elif engine.dialect.name == "sqlite" and not (lent and os.path.isfile(engine.url.database or "")):
        return HARMLESS, ""
    elif lent:
        advice = "Give it back before the import ends (with engine.connect() as ...:), or take it in the worker."
    elif engine.dialect.name == "oracle":
        advice = "Ask the database in the worker, not at import: Oracle's drivers do not survive a fork."
    elif "close" not in inspect.signature(type(engine).dispose).parameters:
        advice = "Use SQLAlchemy 1.4.33 or later, or ask the database in the worker."
    elif engine.dialect.driver.replace("_async", "") not in SAFE_DRIVERS:
        advice = f"Ask the database in the worker: {engine.dialect.driver} is not known to survive a fork."
    else:
        return CURED, "Every worker opens connections of its own; the master keeps this one."
    return REFUSED, advice


def held_lock(lock: object) -> Iterator[Finding]:
    """Yield the finding on a held lock, if it is neither Python's own nor this module's."""
    where, owner = holder(lock)
    if isinstance(owner, threading.Condition):
        where, owner = holder(owner)
    module = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__module__
    path = getattr(sys.modules.get(module), "__file__", None) or "<built in>"
    if owner is not None and not standard(path):
        yield refused("held lock", f"a lock of {module}", where)


def pool_kinds() -> dict[type, Callable[[Any], bool]]:
    """Return the types of drivers' pools that were imported, and how to tell whether one of them is open."""
    found: dict[type, Callable[[Any], bool]] = {}
    for (module, name), is_open in POOLS.items():
        kinds = [getattr(sys.modules.get(module), name, None)]
        while kinds:
            kind = kinds.pop()
            if kind is not None:
                found[kind] = is_open
                kinds += kind.__subclasses__()
    return found


def raw_connections() -> Iterator[object]:
    """Yield the connection objects of known drivers."""
    for thing in gc.get_objects():
        kind = type(thing)
        root = kind.__module__.partition(".")[0] if isinstance(kind.__module__, str) else ""
        if root in DRIVERS and "connection" in kind.__name__.lower() and "pool" not in kind.__name__.lower():
            yield thing


def fileno(connection: object) -> int:
    """Return the number of a driver's connection's socket, or -1 for one that does not tell."""
    parts = (connection, *(getattr(connection, name, None) for name in ("_sock", "_usock", "_transport", "_writer")))
    for part in parts:
        with contextlib.suppress(Exception):
            one = part.get_extra_info("socket") if hasattr(part, "get_extra_info") else part
            return int(one.fileno())  # type: ignore[union-attr]
    return -1


def peer(number: int) -> str | None:
    """Return what a socket is connected to, or None for one that shares nothing: not connected, or the kernel's."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as one:
        if one.family not in {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}:
            return None
        if one.type == socket.SOCK_STREAM and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return f"a socket that listens on {address(one.getsockname())}"
        other = one.getpeername()
        if one.type == socket.SOCK_DGRAM:
            return f"datagrams to {address(other)}" if other else "a socket pair"
        return f"a connection to {address(other)}" if other else "a socket pair"
    return None


def address(of: Any) -> str:
    """Return a socket's address as text."""
    return f"{of[0]}:{of[1]}" if isinstance(of, tuple) else os.fsdecode(of)


def children() -> dict[int, str]:
    """Return this process's living children: their process ids and command lines."""
    found = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{int(name)}/stat", "rb") as status:
                state, parent = status.read().rpartition(b")")[2].split()[:2]
            if int(parent) == os.getpid() and state != b"Z":
                with open(f"/proc/{name}/cmdline", "rb") as command:
                    found[int(name)] = command.read().replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def library_of(task: str) -> str:
    """Return the shared library that a native thread runs in, from the return addresses on its stack.

    The kernel shows the stack pointer of a thread that waits (proc(5), /proc/PID/syscall); it is memory of this very
    process. The first address there that lies in code of something else than libc, the loader or Python tells.
    """
    system = re.compile(r"libc\b|libpthread|ld-linux|libpython|libstdc|libgcc|python|uwsgi")
    code = []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            part = line.split()
            low, high = (int(end, 16) for end in part[0].split("-"))
            code.append((low, high, part[1], part[5] if len(part) > 5 else ""))
    try:
        with open(f"/proc/self/task/{task}/syscall", encoding="utf-8") as state:
            pointer = int(state.read().split()[-2], 16)
    except (OSError, ValueError, IndexError):
        return UNKNOWN
    end = next((high for low, high, _, _ in code if low <= pointer < high), pointer)
    words = min(end - pointer, 16384) // 8
    for word in (ctypes.c_size_t * words).from_address(pointer):
        for low, high, mode, path in code:
            if low <= word < high and "x" in mode and path.startswith("/"):
                if not system.match(os.path.basename(path)):
                    return path
                break
    return UNKNOWN


def load(name: str) -> None:
    """Import the application's module, and call its factory where `MODULE:FACTORY()` says that it has one."""
    module_name, _, attribute = name.partition(":")
    module = importlib.import_module(module_name)
    if attribute.endswith("()"):
        application = getattr(module, attribute[:-2])()
        # uWSGI calls the factory too: it gets what was made already, for not every factory can be called twice.
        setattr(module, attribute[:-2], lambda: application)


def audit(name: str) -> list[Finding]:
    """Import an application and return the findings. Raises SystemExit(22) after the traceback of one that fails."""
    observer = Audit()
    try:
        load(name)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(22) from None
    return observer.findings()


def as_text(findings: Iterable[Finding]) -> str:
    """Return the report for a person."""
    lines = [f"{one.verdict}: {one.kind}: {one.what}\n    at {one.where}\n    {one.advice}\n" for one in findings]
    return "".join(lines) or "Nothing that a fork would share or lose.\n"


def as_json(findings: Iterable[Finding]) -> str:
    """Return the report for a program."""
    return json.dumps([asdict(one) for one in findings], indent=2, ensure_ascii=False) + "\n"


def write(path: str, text: str) -> None:
    """Write a report."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(description="Say what a fork would share or lose after importing an application.")
    parser.add_argument("application", metavar="MODULE[:CALLABLE]")
    parser.add_argument("--text", action="store_true", help="for a person; JSON without it")
    parser.add_argument("--report", metavar="FILE", help="write it there and not to the standard output")
    options = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    findings = audit(options.application)
    text = (as_text if options.text else as_json)(findings)
    if options.report:
        write(options.report, text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
elif "FORK_AUDIT_MODULE" in os.environ:
    write(os.environ["FORK_AUDIT_REPORT"], as_json(audit(os.environ["FORK_AUDIT_MODULE"])))
