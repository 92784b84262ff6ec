"""The client reports what it meets: every kind of bad answer is served to it here by real servers on loopback."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from testkit import client as client_module
from testkit.client import Client, Record, RefusedTarget, Report, Traffic, percentile

WORKERS = 4


class Server:
    """An aiohttp server in a thread; `fault` may answer in place of the right answer, by returning a response."""

    def __init__(self) -> None:
        self.url = ""
        self.release = "v1"
        self.delay = 0.0
        self.asked: list[str] = []
        self.hosts: set[str] = set()
        self.methods: set[str] = set()
        self.peers: dict[str, list[str]] = {}
        self.fault: Callable[[web.Request, int, str], Awaitable[web.StreamResponse | None]] | None = None

    def answer(self, value: str, number: int, **changed: object) -> web.Response:
        """Return the right answer of worker number 1 to 4, in turn, or one changed in the given fields."""
        worker = number % WORKERS + 1
        source = {"pid": 1000 + worker, "worker": worker, "session": f"s{worker}", "release": self.release}
        return web.json_response({"value": value} | source | changed)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Note the request and answer it."""
        value = request.match_info["value"]
        self.asked.append(value)
        self.hosts.add(request.headers["Host"])
        self.methods.add(request.method)
        assert request.transport is not None
        self.peers.setdefault(str(request.transport.get_extra_info("peername")), []).append(value)
        number = len(self.asked)
        if self.delay:
            await asyncio.sleep(self.delay)
        bad = await self.fault(request, number, value) if self.fault else None
        return self.answer(value, number) if bad is None else bad


@pytest.fixture
def server() -> Iterator[Server]:
    """Return a running server whose faults the test chooses."""
    with serving(Server()) as running:
        yield running


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run the server in a thread for as long as the context lasts."""
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/echo/{value}", server.handle)
        app.router.add_post("/echo/{value}", server.handle)
        app.router.add_get("/prefix/other/{value}/end", server.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        loops.append(asyncio.get_running_loop())
        ready.set()
        await stop.wait()
        for _ in range(5):  # asyncio loses sockets when its server closes between accepting them and attaching them
            await asyncio.sleep(0)
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield server
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(5)


def ask(server: Server, count: int, **settings: Any) -> Report:
    """Run a client against the server."""
    return asyncio.run(Client(server.url, **{"connections": 4, "limit": 5.0, **settings}).run(count))


def closed_port() -> int:
    """Return a port on loopback where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- right answers


def test_all_right_over_kept_alive_connections_and_every_worker_counted(server: Server) -> None:
    report = ask(server, 400, connections=8)
    assert report.ok
    assert report.ended == "all sent"
    assert report.counts == {"right": 400, "wrong": 0, "error": 0, "hung": 0, "cut": 0}
    assert report.workers == {1: 100, 2: 100, 3: 100, 4: 100}
    assert report.pids == {1001: 100, 1002: 100, 1003: 100, 1004: 100}
    assert report.sessions == {1001: {"s1"}, 1002: {"s2"}, 1003: {"s3"}, 1004: {"s4"}}
    assert report.shared_sessions == set()
    assert report.mixed_pids == set()
    assert report.releases == {"v1": 400}
    assert report.first_bad is None
    assert [record.ordinal for record in report.records] == list(range(1, 401))
    assert len(server.asked) == len(set(server.asked)) == 400
    assert len(server.peers) == 8


def test_two_runs_ask_for_values_of_their_own(server: Server) -> None:
    ask(server, 50)
    ask(server, 50)
    assert len(set(server.asked)) == 100


def test_values_are_quoted_and_numbers_compared_as_text(server: Server) -> None:
    assert ask(server, 4, values=["a/b c", "ü%?x=1#y", 7, "$v+&;"]).ok
    assert set(server.asked) == {"a/b c", "ü%?x=1#y", "7", "$v+&;"}


def test_method(server: Server) -> None:
    assert ask(server, 10, method="POST").ok
    assert server.methods == {"POST"}


def test_path_prefix_and_host_header(server: Server) -> None:
    url = f"{server.url}/prefix/"
    report = asyncio.run(Client(url, connections=2, path="/other/{value}/end", host_header="shop.test").run(10))
    assert report.ok
    assert server.hosts == {"shop.test"}


def test_the_urls_own_host_is_asked_for_by_default(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    assert asyncio.run(Client(f"http://localhost:{port}", connections=1).run(1)).ok
    assert server.hosts == {f"localhost:{port}"}


# --- bad answers


def test_wrong_rows_are_reported_with_what_was_asked_and_got(server: Server) -> None:
    async def now_and_then(_: web.Request, number: int, __: str) -> web.StreamResponse | None:
        return server.answer("the row of another", number) if number % 10 == 0 else None

    server.fault = now_and_then
    report = ask(server, 300, connections=1)
    assert not report.ok
    assert report.counts["wrong"] == 30
    assert report.counts["right"] == 270
    first = report.first_bad
    assert first is not None
    assert (first.ordinal, first.kind) == (10, "wrong")
    assert first.text == f"asked {server.asked[9]!r}, got 'the row of another' (pid 1003, session s3, release v1)"
    assert len(report.bad) == 30
    assert len(report.to_dict()["bad"]) == 20
    assert f"first bad: request 10, wrong: {first.text}" in report.summary()


async def broken(request: web.Request, how: str) -> web.StreamResponse:
    """Answer badly in the way that `how` names."""
    assert request.transport is not None
    if how == "reset":
        request.transport.abort()
    if how == "truncated":
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "500"})
        await response.prepare(request)
        await response.write(b'{"value": ')
        request.transport.close()
        return response
    return {
        "status": web.Response(status=500, text="Internal Server Error"),
        "redirect": web.Response(status=302, headers={"Location": "http://192.0.2.1/"}),
        "html": web.Response(text="<p>hello</p>", content_type="text/html"),
        "not json": web.Response(text="{'value'", content_type="application/json"),
        "no value": web.json_response({"pid": 1}),
        "no object": web.json_response(["value"]),
        "long": web.json_response({"value": "x" * 200_000}),
    }.get(how, web.Response())


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("status", "status 500: Internal Server Error"),
        ("redirect", "status 302: "),
        ("reset", "Server"),
        ("truncated", "ClientPayloadError: "),
        ("html", "content type 'text/html', not JSON: <p>hello</p>"),
        ("not json", "not JSON (Expecting property name"),
        ("no value", 'JSON without a value: {"pid": 1}'),
        ("no object", 'JSON without a value: ["value"]'),
        ("long", "ValueError: answer longer than 65536 bytes"),
    ],
)
def test_a_broken_answer_on_a_used_connection_is_an_error_and_not_sent_again(
    server: Server, how: str, text: str
) -> None:
    async def fifth(request: web.Request, number: int, _: str) -> web.StreamResponse | None:
        return await broken(request, how) if number == 5 else None

    server.fault = fifth
    report = ask(server, 20, connections=1)
    assert report.counts == {"right": 19, "wrong": 0, "error": 1, "hung": 0, "cut": 0}
    assert report.first_bad is not None
    assert report.first_bad.ordinal == 5
    assert report.first_bad.text.startswith(text)
    assert len(server.asked) == len(set(server.asked)) == 20


def test_refused_connections_are_errors_and_do_not_become_a_busy_loop() -> None:
    client = Client(f"http://127.0.0.1:{closed_port()}", connections=4)
    report = asyncio.run(client.run(40))
    assert report.counts["error"] == report.sent == 40
    assert report.first_bad is not None
    assert "Cannot connect" in report.first_bad.text
    assert report.seconds >= 10 * client_module.ERROR_PAUSE


# --- hangs and limits


async def never(*_: object) -> None:
    """Do not answer."""
    await asyncio.sleep(60)


def test_hangs_are_reported_and_their_connections_replaced(server: Server) -> None:
    async def every_sixth(_: web.Request, number: int, __: str) -> None:
        if number % 6 == 0:
            await never()

    server.fault = every_sixth
    report = ask(server, 20, connections=1, timeout=0.3)
    assert report.counts == {"right": 17, "wrong": 0, "error": 0, "hung": 3, "cut": 0}
    assert not report.ok
    assert [record.ordinal for record in report.bad] == [6, 12, 18]
    assert report.bad[0].text == "no answer within 0.3 s"
    assert report.longest_ms >= 300
    assert [len(values) for values in server.peers.values()] == [6, 6, 6, 2]
    assert len(set(server.asked)) == 20


def test_a_run_where_everything_hangs_stays_within_its_time(server: Server) -> None:
    server.fault = never
    began = time.monotonic()
    report = ask(server, 1000, timeout=0.1, limit=0.45)
    assert time.monotonic() - began < 2
    assert report.ended == "time limit"
    assert not report.ok
    assert report.counts["hung"] >= 4
    assert report.counts["cut"] == 4
    assert report.sent == report.counts["hung"] + 4 == 1000 - report.never_sent
    assert f"ended by: time limit; {report.never_sent} never sent" in report.summary()


def test_a_limit_that_leaves_requests_unsent_is_not_ok_even_if_all_answers_were_right(server: Server) -> None:
    report = ask(server, 10, values=range(6))
    assert report.counts["right"] == 6
    assert report.never_sent == 4
    assert report.ended == "values used up"
    assert not report.ok


def test_repeated_values_are_not_sent(server: Server) -> None:
    with pytest.raises(ValueError, match="'5' came twice"):
        ask(server, 100, connections=1, values=itertools.chain(range(20), itertools.repeat("5")))
    assert server.asked == [str(number) for number in range(20)]


# --- traffic until stopped


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait up to 10 s for the condition."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_traffic_in_the_background_is_cut_into_phases_by_marks(server: Server) -> None:
    with Traffic(server.url, connections=4, think=0.002) as traffic:
        wait_for(lambda: len(server.asked) > 40)
        traffic.mark("deploy")
        server.release = "v2"
        wait_for(lambda: traffic.report().releases.get("v2", 0) > 40)
        traffic.mark("after")
        seen = len(server.asked)
        wait_for(lambda: len(server.asked) > seen + 40)
        assert traffic.report().ended == "running"
    report = traffic.report()
    assert report.ok
    assert report.ended == "stopped"
    assert report.sent == len(server.asked)
    before, deploy, after = (report.phase(name) for name in ("start", "deploy", "after"))
    assert before.ok
    assert deploy.ok
    assert after.ok
    assert before.sent + deploy.sent + after.sent == report.sent
    assert min(before.sent, after.sent) > 30
    assert before.seconds + deploy.seconds + after.seconds == pytest.approx(report.seconds, abs=0.05)
    assert "v2" in deploy.releases
    assert set(after.releases) == {"v2"}
    assert [release for release, _ in report.release_runs] == ["v1", "v2"]
    assert report.mixed_pids == {1001, 1002, 1003, 1004}, "the test's processes live through the switch"
    assert list(report.to_dict()["phases"]) == ["start", "deploy", "after"]
    with pytest.raises(KeyError, match="no mark 'x'; there are: start, deploy, after"):
        report.phase("x")


def test_traffic_stops_promptly_and_sends_nothing_more(server: Server) -> None:
    with Traffic(server.url, connections=8) as traffic:
        wait_for(lambda: len(server.asked) > 20)
        began = time.monotonic()
    assert time.monotonic() - began < 1
    sent = len(server.asked)
    time.sleep(0.1)
    assert len(server.asked) == sent == traffic.report().sent


def test_stopping_waits_for_a_hung_request_no_longer_than_its_limit(server: Server) -> None:
    server.fault = never
    with Traffic(server.url, connections=2, timeout=0.3) as traffic:
        wait_for(lambda: len(server.asked) == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 1
    assert traffic.report().counts["hung"] == 2


@pytest.mark.parametrize(("bound", "ended"), [({"limit": 0.3}, "time limit"), ({"max_count": 30}, "count limit")])
def test_forgotten_traffic_ends_at_its_bounds(server: Server, bound: dict[str, Any], ended: str) -> None:
    traffic = Traffic(server.url, connections=2, think=0.005, **bound)
    traffic.start()
    wait_for(lambda: traffic.report().ended == ended)
    time.sleep(0.1)  # a request that was cut is on its way still
    sent = len(server.asked)
    time.sleep(0.1)
    assert len(server.asked) == sent == traffic.report().sent
    assert not traffic.report().ok
    assert sent == 30 or ended == "time limit"
    traffic.stop()


def test_traffic_from_within_asyncio(server: Server) -> None:
    async def use() -> Client:
        async with Client(server.url, connections=4) as client:
            await asyncio.sleep(0.1)
        return client

    report = asyncio.run(use()).report()
    assert report.ok
    assert report.ended == "stopped"
    assert report.sent == len(server.asked) > 4


def test_a_client_makes_one_run(server: Server) -> None:
    client = Client(server.url, connections=1)
    with pytest.raises(RuntimeError, match="not begun"):
        client.mark("early")
    asyncio.run(client.run(1))
    with pytest.raises(RuntimeError, match="one run"):
        asyncio.run(client.run(1))


# --- targets and settings


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "169.254.169.254", "100.64.0.1", "[2001:4860:4860::8888]", "172.32.0.1"]
)
def test_public_addresses_are_refused(address: str) -> None:
    with pytest.raises(RefusedTarget, match="neither a loopback nor a private address"):
        Client(f"http://{address}:8080")


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.0.9", "[::1]", "[fd00::1]"])
def test_loopback_and_private_addresses_are_taken(address: str) -> None:
    assert client_module.resolve(f"http://{address}:8080/x/") == f"http://{address}:8080/x"


def test_a_name_with_one_public_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, 1, 6, "", (address, 80)) for address in ("10.0.0.1", "93.184.216.34")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(RefusedTarget, match=r"shop\.test is 93\.184\.216\.34"):
        Client("http://shop.test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"connections": 0}, "connections is 0; it must be between 1 and 512"),
        ({"timeout": 0}, "timeout is 0"),
        ({"limit": float("nan")}, "limit is nan"),
        ({"max_count": 0}, "max_count is 0"),
        ({"think": 2}, "think is 2"),
        ({"path": "/echo"}, "must begin with / and contain {value}"),
        ({"url": "https://127.0.0.1"}, "not of the form http://HOST"),
        ({"url": "127.0.0.1:80"}, "not of the form http://HOST"),
        ({"url": "http://nowhere.invalid"}, "cannot be resolved"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "invalid" in settings.get("url", ""):

        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=re.escape(message)):
        Client(**{"url": "http://127.0.0.1", **settings})


# --- reports


def test_percentiles_are_nearest_rank() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert [percentile(hundred, percent) for percent in (50, 99, 100)] == [50.0, 99.0, 100.0]
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile([1.0, 2.0, 3.0], 99) == 3.0
    assert percentile([5.0], 0) == 5.0
    assert percentile([], 50) == 0.0
    records = tuple(Record(n, str(n), 0.0, n / 1000, "right") for n in range(200, 0, -1))
    report = Report(records, 2.0, "all sent", 1, 200)
    assert (report.median_ms, report.p99_ms, report.longest_ms) == pytest.approx((100, 198, 200))
    assert report.rate == 100


def record(ordinal: int, start: float, end: float, *, pid: int, session: str, release: str) -> Record:
    """Return a right answer."""
    return Record(ordinal, str(ordinal), start, end - start, "right", "", pid, pid, session, release)


def test_releases_are_ordered_by_completion_and_shared_sessions_found() -> None:
    records = (
        record(1, 0.0, 0.9, pid=1, session="a", release="v1"),
        record(2, 0.1, 0.2, pid=2, session="b", release="v1"),
        record(3, 0.3, 0.5, pid=3, session="a", release="v2"),
        record(4, 0.6, 1.0, pid=3, session="c", release="v2"),
    )
    report = Report(records, 1.0, "stopped", 2, marks=(("x", 0.0), ("y", 0.3), ("x", 0.6)))
    assert report.release_runs == [("v1", 1), ("v2", 1), ("v1", 1), ("v2", 1)]
    assert report.releases == {"v1": 2, "v2": 2}
    assert report.mixed_pids == set()
    assert report.sessions == {1: {"a"}, 2: {"b"}, 3: {"a", "c"}}
    assert report.shared_sessions == {"a"}
    assert [r.ordinal for r in report.phase("x").records] == [1, 2, 4]
    assert report.phase("x").seconds == pytest.approx(0.7)
    assert report.phase("y").seconds == pytest.approx(0.3)
    assert "database sessions: 3 in 3 processes, shared: a" in report.summary()


def test_json_carries_the_report_and_every_request_only_if_asked(server: Server) -> None:
    report = ask(server, 8)
    plain, full = json.loads(report.to_json()), json.loads(report.to_json(records=True))
    assert plain["records"] == []
    assert len(full["records"]) == 8
    assert plain["counts"]["right"] == plain["sent"] == plain["planned"] == 8
    assert plain["ok"] is True
    assert set(full["records"][0]) >= {"ordinal", "start", "duration", "kind", "pid", "release"}


# --- the command


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and what it printed."""
    try:
        code = client_module.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_exit_codes(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = command(capsys, server.url, "--requests", "20", "--connections", "4")
    assert code == 0
    assert "20 requests, 4 connections" in text
    assert "20 right, 0 wrong, 0 error, 0 hung" in text
    code, text = command(capsys, f"http://127.0.0.1:{closed_port()}", "--requests", "2", "--json")
    assert code == 1
    assert json.loads(text)["counts"]["error"] == 2
    for bad in (["http://8.8.8.8"], [server.url, "--requests", "0"], [server.url, "--timeout", "soon"], []):
        code, text = command(capsys, *bad)
        assert code == 2
        assert "error: " in text


def test_the_module_is_a_command(server: Server) -> None:
    arguments = [sys.executable, "-m", "testkit.client", server.url, "--requests", "5", "--json", "--records"]
    environment = os.environ | {"PYTHONPATH": str(Path(client_module.__file__).parents[1])}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["records"]) == 5
