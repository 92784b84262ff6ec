"""How a worker of several threads ends. Real uWSGI under traffic is a scenario's; here threads stand in for its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from templating import ROLE

QUIET = 29

# The loop of uWSGI's threads (simple_loop_run in core/loop.c), with its steps from the event to the request drawn out.
WORKER = """
import hashlib, os, select, socket, sys, threading, time, types
listener = socket.socket(fileno=int(sys.argv[1]))
listener.setblocking(False)
apps, working, one_at_a_time = [], set(), threading.Lock()

def workers():
    return [{"id": 1, "apps": apps, "status": b"busy" if working else b"idle"}]

uwsgi = types.SimpleNamespace(worker_id=lambda: 1, workers=workers, sockets=[listener.fileno()], cores=2)
uwsgi.atexit = lambda: print("atexit", flush=True)
sys.modules["uwsgi"] = uwsgi
import uwsgi_sqlalchemy_threads

def core(number):
    queue = select.epoll()
    queue.register(listener.fileno(), select.EPOLLIN)
    while True:
        with one_at_a_time:
            queue.poll()
            compute()
            try:
                request = listener.accept()[0]
            except BlockingIOError:
                continue
        compute()
        working.add(number)
        asked = request.recv(100)
        time.sleep(0.3)
        request.send(asked)
        request.close()
        working.discard(number)

def compute():
    # For about 0.1 s, without the lock of Python, which uWSGI does not hold there either.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
"""
IMPORTING = "print('importing', flush=True); time.sleep(20)"
SERVING = """
apps.append("the application")
print("serving", flush=True)
time.sleep({late})
threading.Thread(target=core, args=(1,), daemon=True).start()
core(0)
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


def start(tmp_path: Path, listener: socket.socket, program: str) -> subprocess.Popen[str]:
    """Start such a worker, and return it when it has said how far it is."""
    (tmp_path / "worker.py").write_text(WORKER + program)
    worker = subprocess.Popen(
        [sys.executable, str(tmp_path / "worker.py"), str(listener.fileno())],
        env={"PYTHONPATH": str(ROLE / "files")},
        pass_fds=[listener.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout
    assert worker.stdout.readline()
    return worker


@contextmanager
def asked(listener: socket.socket, question: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(listener.getsockname(), timeout=5) as connection:
        connection.sendall(question)
        yield connection


def test_a_worker_that_imports_its_application_ends_at_once(tmp_path: Path, listener: socket.socket) -> None:
    with start(tmp_path, listener, IMPORTING) as worker:
        worker.send_signal(signal.SIGHUP)
        assert worker.communicate(timeout=5)[0] == ""
    assert worker.returncode == QUIET


@pytest.mark.parametrize("late", [0, 0.3], ids=["its threads wait", "its threads are still to come"])
def test_a_worker_ends_when_nobody_asks_anything(tmp_path: Path, listener: socket.socket, late: float) -> None:
    with start(tmp_path, listener, SERVING.format(late=late)) as worker:
        worker.send_signal(signal.SIGHUP)
        assert worker.communicate(timeout=5)[0] == "atexit\n"
    assert worker.returncode == QUIET


# Seconds from the question to the signal: before the request is accepted, before uWSGI calls it one, and in it.
@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.35])
def test_an_accepted_request_is_finished_and_the_next_one_left_to_others(
    tmp_path: Path, listener: socket.socket, seconds: float
) -> None:
    with start(tmp_path, listener, SERVING.format(late=0)) as worker, asked(listener, b"first") as first:
        assert first.recv(100) == b"first"
        with asked(listener, b"accepted") as accepted:
            time.sleep(seconds)
            worker.send_signal(signal.SIGHUP)
            time.sleep(0.1)
            with asked(listener, b"left") as left:
                assert accepted.recv(100) == b"accepted"
                assert worker.communicate(timeout=5)[0] == "atexit\n"
                other, address = listener.accept()
                other.close()
                assert address == left.getsockname()
    assert worker.returncode == QUIET
