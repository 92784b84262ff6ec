"""A database driver for tests of forks: each connection is a real socket, on which it says what it does.

Its connection says goodbye from its destructor, as mysqlclient's and Oracle's do. The other end is this machine's port
STANDIN_PORT, or else a socket in `servers`.
"""

from __future__ import annotations

import os
import socket

apilevel, threadsafety, paramstyle = "2.0", 1, "format"
version_info = version = __version__ = "26.1.0"
servers: list[socket.socket] = []


class Error(Exception):
    """What every driver has."""


class Connection:
    """A connection to nobody."""

    def __init__(self) -> None:
        if "STANDIN_PORT" in os.environ:
            self.socket = socket.create_connection(("127.0.0.1", int(os.environ["STANDIN_PORT"])))
        else:
            self.socket, server = socket.socketpair()
            servers.append(server)

    def rollback(self) -> None:
        self.socket.send(b"rollback ")

    def close(self) -> None:
        self.socket.send(b"close ")
        self.socket.close()

    def __del__(self) -> None:
        if self.socket.fileno() >= 0:
            self.socket.send(b"goodbye ")


def __getattr__(name: str) -> type:
    """Have the types and functions that a dialect looks for."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda *_, **__: None})


def connect(*arguments: object, **options: object) -> Connection:
    """Connect, whatever the address."""
    return Connection()
