"""A bounded HTTP client that asks every request for a value of its own and checks every answer.

Each of N keep-alive connections sends its next request when the last one is answered (closed loop). A request asks for
``URL/echo/VALUE`` and expects status 200 and a JSON object ``{"value", "pid", "worker", "session", "release"}`` with
the value it asked for. Every request ends as exactly one of

* ``right``: the value asked for,
* ``wrong``: another value, so somebody else's row,
* ``error``: another status, not JSON, a connection refused, reset or closed early,
* ``hung``: no whole answer within the limit per request; its connection is closed and replaced,
* ``cut``: still unanswered when the time limit of the whole run came.

A fixed number of requests, from a program or from a shell::

    report = asyncio.run(Client("http://127.0.0.1:8080").run(2000))
    python -m testkit.client http://127.0.0.1:8080 --requests 2000 --connections 64

Continuous traffic while something else happens, in a background thread (``async with Client(...)`` does it in a task)::

    with Traffic("http://127.0.0.1:8080", connections=16) as traffic:
        traffic.mark("deploy")
        ...
    report = traffic.report()
    assert report.ok, report.summary()
    assert set(report.phase("deploy").releases) == {"v1", "v2"}

Every run is bounded in time, count and connections, and goes to loopback and private addresses only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from ipaddress import ip_address, ip_network
from itertools import count as count_from
from itertools import groupby, pairwise
from typing import Any, Literal, Self, get_args
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

Kind = Literal["right", "wrong", "error", "hung", "cut"]
Ended = Literal["running", "all sent", "stopped", "next mark", "time limit", "count limit", "values used up", "fault"]

KINDS: tuple[Kind, ...] = get_args(Kind)
SAMPLES = 20  # bad requests that a report shows; its records hold all of them
MAX_BODY = 64 * 1024  # bytes read of one answer, so that an endless one costs no more
ERROR_PAUSE = 0.02  # seconds after an error: a refused connection fails at once, and the loop would only burn CPU
# Loopback (RFC 1122, RFC 4291), private (RFC 1918) and unique local (RFC 4193) addresses.
ALLOWED = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")


class RefusedTarget(ValueError):
    """The target is not, or not only, a loopback or private address."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request; `start` (from the beginning of the run) and `duration` are in seconds."""

    ordinal: int
    asked: str
    start: float
    duration: float
    kind: Kind
    text: str = ""
    pid: int | None = None
    worker: int | None = None
    session: str | None = None
    release: str | None = None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of values in ascending order: always one that was measured; 0.0 of none."""
    return ordered[max(math.ceil(percent * len(ordered) / 100), 1) - 1] if ordered else 0.0


@dataclass
class Report:
    """What a run, or one phase of it, saw; the attributes counted from `records` are described where they are made."""

    records: tuple[Record, ...] = field(repr=False)  # in the order of sending
    seconds: float
    ended: Ended
    connections: int
    planned: int | None = None  # requests; None: until stopped
    marks: tuple[tuple[str, float], ...] = ()  # name of a phase, seconds from the beginning of the run

    def __post_init__(self) -> None:
        records, kinds = self.records, Counter(record.kind for record in self.records)
        self.counts: dict[Kind, int] = {kind: kinds[kind] for kind in KINDS}
        self.sent = len(records)
        self.never_sent = max((self.planned or 0) - self.sent, 0)
        # Something was sent, all of it was answered rightly, and no limit ended the run before its time.
        self.ok = self.counts["right"] == self.sent > 0 and self.ended in ("all sent", "stopped", "next mark")
        self.rate = self.sent / self.seconds if self.seconds else 0.0  # requests per second
        # From sending to the end, whatever the outcome: a hung request counts with the time it was given.
        durations = sorted(record.duration * 1000 for record in records)
        self.median_ms, self.p99_ms, self.longest_ms = (percentile(durations, percent) for percent in (50, 99, 100))
        self.bad = tuple(record for record in records if record.kind != "right")
        self.first_bad = self.bad[0] if self.bad else None
        # Answers of each process, and of each worker number, which outlives a recycled process.
        self.pids = dict(Counter(record.pid for record in records if record.pid is not None))
        self.workers = dict(Counter(record.worker for record in records if record.worker is not None))
        # Database sessions of each process, and those that more than one process answered from.
        self.sessions: dict[int, set[str]] = {pid: set() for pid in self.pids}
        # Releases of each process: a worker that loads the application itself serves one for life.
        served: dict[int, set[str]] = {pid: set() for pid in self.pids}
        for record in records:
            if record.pid is not None and record.session is not None:
                self.sessions[record.pid].add(record.session)
            if record.pid is not None and record.release is not None:
                served[record.pid].add(record.release)
        users = Counter(session for sessions in self.sessions.values() for session in sessions)
        self.shared_sessions = {session for session, processes in users.items() if processes > 1}
        self.mixed_pids = {pid for pid, releases in served.items() if len(releases) > 1}
        # Releases as their answers arrived, with how many came in a row; answers of each, first come first.
        arrived = sorted(records, key=lambda record: record.start + record.duration)
        releases = [record.release for record in arrived if record.release is not None]
        self.release_runs = [(release, len(list(run))) for release, run in groupby(releases)]
        self.releases = dict(Counter(releases))

    def phase(self, name: str) -> Report:
        """Return the report of what was *sent* between the mark `name` and the next one; all such spans, if several.

        Raises KeyError for a mark that was never set.
        """
        edges = pairwise([*(start for _, start in self.marks), math.inf])
        spans = [span for span, (mark, _) in zip(edges, self.marks, strict=True) if mark == name]
        if not spans:
            raise KeyError(f"no mark {name!r}; there are: {', '.join(mark for mark, _ in self.marks) or 'none'}")
        records = tuple(record for record in self.records if any(start <= record.start < end for start, end in spans))
        seconds = sum(max(min(end, self.seconds) - start, 0) for start, end in spans)
        ended: Ended = self.ended if spans[-1][1] == math.inf else "next mark"
        return Report(records, seconds, ended, self.connections)

    def to_dict(self, *, records: bool = False) -> dict[str, Any]:
        """Return attributes and phases as plain data, with the first bad requests, and all requests if `records`."""
        data = {key: sorted(value) if isinstance(value, set) else value for key, value in vars(self).items()}
        data["sessions"] = {pid: sorted(sessions) for pid, sessions in self.sessions.items()}
        data["bad"] = [asdict(record) for record in self.bad[:SAMPLES]]
        data["first_bad"] = data["bad"][0] if self.bad else None
        data["records"] = [asdict(record) for record in self.records] if records else []
        data["phases"] = {name: self.phase(name).to_dict() for name, _ in self.marks}
        return data

    def to_json(self, *, records: bool = False) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(records=records))

    def summary(self) -> str:
        """Return a few lines for a person."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count or kind != "cut")
        lines = [
            f"{self.sent} requests, {self.connections} connections, {self.seconds:.2f} s ({self.rate:.0f}/s): {counts}",
            f"time: median {self.median_ms:.1f} ms, p99 {self.p99_ms:.1f} ms, longest {self.longest_ms:.1f} ms",
        ]
        for title, answers in ("process", self.pids), ("release", self.releases):
            if answers:
                lines.append(f"answers per {title}: " + ", ".join(f"{key}: {count}" for key, count in answers.items()))
        if total := len(set().union(*self.sessions.values())):
            shared = ", ".join(sorted(self.shared_sessions)[:SAMPLES]) or "none"
            lines.append(f"database sessions: {total} in {len(self.pids)} processes, shared: {shared}")
        if self.mixed_pids:
            lines.append(f"processes that answered for two releases: {', '.join(map(str, sorted(self.mixed_pids)))}")
        if self.first_bad:
            lines.append(f"first bad: request {self.first_bad.ordinal}, {self.first_bad.kind}: {self.first_bad.text}")
        if self.ended not in ("all sent", "stopped", "next mark"):
            lines.append(f"ended by: {self.ended}" + (f"; {self.never_sent} never sent" if self.never_sent else ""))
        return "\n".join(lines)


def judge(asked: str, status: int, content_type: str, body: bytes) -> tuple[Kind, str, dict[str, Any]]:
    """Return an answer's kind, a short text on what is bad about it, and the object it carries (empty if none)."""
    shown = body[:120].decode(errors="replace").strip()
    if status != 200:
        return "error", f"status {status}: {shown}", {}
    if content_type != "application/json":
        return "error", f"content type {content_type!r}, not JSON: {shown}", {}
    try:
        answer = json.loads(body)
    except ValueError as error:
        return "error", f"not JSON ({error}): {shown}", {}
    if not isinstance(answer, dict) or "value" not in answer:
        return "error", f"JSON without a value: {shown}", {}
    if (got := str(answer["value"])) != asked:
        source = ", ".join(f"{key} {answer[key]}" for key in ("pid", "session", "release") if key in answer)
        return "wrong", f"asked {asked!r}, got {got[:120]!r}" + (f" ({source})" if source else ""), answer
    return "right", "", answer


def resolve(url: str) -> str:
    """Return `url` with its address (IPv4 preferred) in place of the host name, so that nothing can move it later.

    Raises ValueError for a URL that cannot be used, and RefusedTarget unless every address is loopback or private.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not of the form http://HOST[:PORT][/PREFIX]")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{parts.hostname} cannot be resolved: {error}") from error
    addresses = [str(info[4][0]) for info in sorted(found, key=lambda info: info[0] != socket.AF_INET)]
    for address in addresses:
        if not any(ip_address(address) in ip_network(network) for network in ALLOWED):
            raise RefusedTarget(
                f"{parts.hostname} is {address}, which is neither a loopback nor a private address: "
                "this client sends load to test hosts of your own only"
            )
    host = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return f"http://{host}:{parts.port or 80}{parts.path.rstrip('/')}"


def distinct_values() -> Iterator[int]:
    """Return consecutive integers from a random start, so that two runs share none; they fit a signed 32-bit column."""
    return count_from(secrets.randbelow(10**9))


@dataclass
class Client:
    """One run of requests against `url` (``http://HOST[:PORT][/PREFIX]``); make a new one for the next run.

    Parameters
        connections: requests under way at a time, each on a keep-alive connection (1 to 512).
        timeout: seconds that one request may take from connecting to the last byte before it counts as hung.
        limit: seconds that the whole run may take; requests still under way then are cut.
        max_count: requests that the whole run may send.
        path: added to the URL; ``{value}`` stands for the value, quoted.
        host_header: the Host to ask for when one address serves several sites; otherwise the URL's.
        method: of the requests; they have no body.
        values: what to ask for, all different; by default `distinct_values`.
        think: seconds that a connection waits between an answer and its next request (0 to 1).

    Raises ValueError for settings out of range and RefusedTarget for public addresses.
    """

    url: str
    _: KW_ONLY
    connections: int = 64
    timeout: float = 10.0
    limit: float = 300.0
    max_count: int = 500_000
    path: str = "/echo/{value}"
    host_header: str | None = None
    method: str = "GET"
    values: Iterable[object] = field(default_factory=distinct_values)
    think: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "connections": (self.connections, 1, 512),
            "timeout": (self.timeout, 0.001, 3600),
            "limit": (self.limit, 0.001, 24 * 3600),
            "max_count": (self.max_count, 1, 10_000_000),
            "think": (self.think, 0, 1),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be between {low} and {high}")
        if not self.path.startswith("/") or "{value}" not in self.path:
            raise ValueError(f"path is {self.path!r}; it must begin with / and contain {{value}}")
        self._target = resolve(self.url) + self.path
        self._headers = {"Host": self.host_header or urlsplit(self.url).netloc, "Accept": "application/json"}
        self._values = iter(self.values)
        self._asked: set[str] = set()
        self._records: list[Record] = []
        self._marks: list[tuple[str, float]] = []
        self._planned: int | None = None
        self._began: float | None = None
        self._seconds: float | None = None
        self._ended: Ended = "running"
        self._fault: Exception | None = None
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def run(self, count: int) -> Report:
        """Send `count` requests and return the report. Raises ValueError if `count` is not within 1 to `max_count`."""
        if not 1 <= count <= self.max_count:
            raise ValueError(f"the count of requests is {count}; it must be between 1 and {self.max_count}")
        self._planned = count
        self._begin()
        await self._drive()
        return self.report()

    async def __aenter__(self) -> Self:
        self._begin()
        self._task = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        if self._task:
            await self._task

    def mark(self, name: str) -> float:
        """Begin the phase `name` (``start`` is the one before), from any thread, and return the second of the run.

        Raises RuntimeError before the run.
        """
        moment = self._now()
        self._marks.append((name, moment))
        return moment

    def report(self) -> Report:
        """Return what was seen, so far or altogether. Raises ValueError if the values repeated themselves."""
        if self._fault:
            raise self._fault
        records = tuple(sorted(self._records.copy(), key=lambda record: record.ordinal))
        seconds = self._now() if self._seconds is None else self._seconds
        ended: Ended = "running" if self._seconds is None else self._ended
        marks = (("start", 0.0), *self._marks) if self._marks else ()
        return Report(records, seconds, ended, self.connections, self._planned, marks)

    def _now(self) -> float:
        if self._began is None:
            raise RuntimeError("the run has not begun")
        return time.perf_counter() - self._began

    def _begin(self) -> None:
        if self._began is not None:
            raise RuntimeError("a client makes one run; make a new one for the next")
        self._began = time.perf_counter()

    async def _drive(self) -> None:
        connector = aiohttp.TCPConnector(limit=self.connections)
        jar, unlimited = aiohttp.DummyCookieJar(), aiohttp.ClientTimeout()
        ended: Ended = "fault"
        try:
            async with aiohttp.ClientSession(connector=connector, cookie_jar=jar, timeout=unlimited) as session:
                # When a kept-alive connection breaks, aiohttp silently sends GET again: lost requests would look right.
                session._retry_connection = False
                async with asyncio.timeout(self.limit), asyncio.TaskGroup() as group:
                    for _ in range(self.connections):
                        group.create_task(self._connection(session))
            ended = self._ended
        except TimeoutError:
            ended = "time limit"
        except ExceptionGroup as group_error:
            self._fault = next(error for error in group_error.exceptions if isinstance(error, Exception))
        finally:
            self._ended, self._seconds = ended, self._now()

    async def _connection(self, session: aiohttp.ClientSession) -> None:
        while (value := self._next()) is not None:
            kind = await self._request(session, len(self._asked), value)
            if pause := max(self.think, ERROR_PAUSE if kind == "error" else 0):
                await asyncio.sleep(pause)

    def _next(self) -> str | None:
        """Return the value of the next request, or None, with the reason kept, when there is to be none."""
        ended: Ended = "running"
        value = None
        if self._stopping:
            ended = "stopped"
        elif len(self._asked) >= (self._planned or self.max_count):
            ended = "all sent" if self._planned else "count limit"
        elif (item := next(self._values, self)) is self:
            ended = "values used up"
        elif (value := str(item)) in self._asked:
            raise ValueError(f"the values repeat: {value!r} came twice, and every request needs a value of its own")
        else:
            self._asked.add(value)
        if self._ended == "running":
            self._ended = ended
        return value

    async def _request(self, session: aiohttp.ClientSession, ordinal: int, asked: str) -> Kind:
        url = URL(self._target.replace("{value}", quote(asked, safe="")), encoded=True)
        kind: Kind = "cut"
        text, answer = "not answered when the time limit of the run came", dict[str, Any]()
        start = self._now()
        try:
            async with (
                asyncio.timeout(self.timeout),
                session.request(self.method, url, headers=self._headers, allow_redirects=False) as response,
            ):
                body = bytearray()
                async for chunk in response.content.iter_chunked(MAX_BODY):
                    body += chunk
                    if len(body) > MAX_BODY:
                        raise ValueError(f"answer longer than {MAX_BODY} bytes")
                kind, text, answer = judge(asked, response.status, response.content_type, bytes(body))
        except TimeoutError:
            kind, text = "hung", f"no answer within {self.timeout:g} s"
        except Exception as error:  # whatever else goes wrong, the request has failed and the traffic goes on
            kind, text = "error", f"{type(error).__name__}: {error}"[:200]
        finally:
            pid, worker = (number if isinstance(number := answer.get(key), int) else None for key in ("pid", "worker"))
            sid, release = (None if (name := answer.get(key)) is None else str(name) for key in ("session", "release"))
            duration = self._now() - start
            self._records.append(Record(ordinal, asked, start, duration, kind, text, pid, worker, sid, release))
        return kind


class Traffic(Client):
    """A Client that sends from a background thread, until it is stopped or reaches its limits.

    A caller that computes in Python meanwhile shares the interpreter lock with it, which shows in the longest times.
    """

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to send. A forgotten thread ends with its limits and does not keep the program from ending."""
        self._begin()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._drive()), name="traffic", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send nothing more, and wait for the requests under way: at most `timeout`, when one of them hangs."""
        self._stopping = True
        self._thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if every answer is right and 1 otherwise; exits with 2 on bad arguments."""
    parser = argparse.ArgumentParser("testkit.client", description="Ask for many values at once, check every answer.")
    parser.add_argument("url", help="http://HOST[:PORT][/PREFIX], loopback or private")
    parser.add_argument("--requests", type=int, default=2000, help="how many to send (%(default)s)")
    parser.add_argument("--connections", type=int, default=64, help="how many at a time (%(default)s)")
    parser.add_argument("--timeout", type=float, default=10, help="seconds after which a request hangs (%(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the whole run (%(default)s)")
    parser.add_argument("--path", default="/echo/{value}", help="what to ask for (%(default)s)")
    parser.add_argument("--host", dest="host_header", help="Host header, when one address serves several sites")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--records", action="store_true", help="with --json: every request too")
    given = vars(parser.parse_args(arguments))
    count, as_json, records = (given.pop(name) for name in ("requests", "json", "records"))
    try:
        report = asyncio.run(Client(**given).run(count))
    except ValueError as error:
        parser.error(str(error))
    print(report.to_json(records=records) if as_json else report.summary())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
