"""Clients that do not send or read in time, against a server with a short patience."""

import asyncio
import contextlib
import resource
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from armd_scale.serving import connections

PATIENCE = 0.4
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"


async def echo(request):
    try:
        return PlainTextResponse(await request.body() + b"ok")
    except ClientDisconnect:
        return PlainTextResponse("nobody is there")


async def large(_):
    return PlainTextResponse(b"x" * (64 << 20))


@contextlib.asynccontextmanager
async def listening(patience=PATIENCE, most=1000):
    """A server in this event loop; its port and its protocols."""
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"]), Route("/large", large)])
    http = connections.protocol(patience, most)
    config = uvicorn.Config(app, port=0, http=http, ws="none", log_level="error", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server.server_state.connections
    finally:
        server.should_exit = True
        await running


async def ended(reader):
    """What the server sends until it closes the connection."""
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        pytest.param([b""], 0, id="nothing"),
        pytest.param([b"GET / HTTP/1.1\r\nHost: loc"], 0, id="half-a-head"),
        pytest.param([GET], 1, id="nothing-after-an-answer"),
        pytest.param([GET + b"GET / HT"], 1, id="half-a-head-after-an-answer"),
        pytest.param([POST + b"12345" + POST + b"12345"], 2, id="two-requests"),
        pytest.param([bytes([byte]) for byte in GET * 9], 0, id="a-byte-at-a-time"),
    ],
)
def test_a_late_head_ends_the_connection(sent, answers):
    async def client():
        async with listening() as (port, open_):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            closed = asyncio.create_task(ended(reader))
            for part in sent:
                writer.write(part)
                if len(sent) > 1:
                    await asyncio.sleep(PATIENCE / 20)
                if closed.done():
                    break
            received = await closed
            writer.close()
            await asyncio.sleep(0.05)
            return received.count(b"200 OK"), len(open_)

    assert asyncio.run(client()) == (answers, 0)


def test_a_late_body_ends_the_connection(monkeypatch):
    monkeypatch.setattr(connections, "_ANSWER", 0.1)

    async def client():
        async with listening() as (port, open_):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(POST + b"1")
            start = time.monotonic()
            await ended(reader)
            writer.close()
            return time.monotonic() - start, len(open_)

    seconds, open_ = asyncio.run(client())
    assert seconds >= PATIENCE
    assert open_ == 0


def test_a_client_that_does_not_read_is_given_up():
    async def client():
        async with listening() as (port, open_):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.transport.pause_reading()
            writer.write(GET.replace(b" / ", b" /large "))
            while not open_:
                await asyncio.sleep(0.01)
            while open_:
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(client())


def test_slow_clients_are_not_disturbed():
    """Requests with pauses below the limit, one after the other on a connection, which together last longer."""

    async def client():
        async with listening(2) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(4):
                await asyncio.sleep(0.3)
                writer.write(POST + b"12")
                await asyncio.sleep(0.3)
                writer.write(b"345")
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"200 OK" in head
                assert await reader.readexactly(7) == b"12345ok"
            writer.close()

    asyncio.run(client())


@pytest.mark.parametrize(
    ("sent", "count"),
    [
        pytest.param(b"", 2000, id="nothing"),
        pytest.param(b"GET / HTTP", 2000, id="half-a-head"),
        pytest.param(POST + b"1", 600, id="half-a-body"),
    ],
)
def test_waiting_connections_keep_nobody_out(sent, count):
    async def crowd():
        async with listening(60, count // 4) as (port, open_):
            writers = []
            for _ in range(count):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                writers.append(writer)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            answer = await reader.readuntil(b"ok")
            number = len(open_)
            for each in [*writers, writer]:
                each.close()
            return answer, number

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 5000:
        pytest.skip("this system does not allow 2,000 connections in a process")
    connections.raise_limit()
    answer, number = asyncio.run(crowd())
    assert b"200 OK" in answer
    assert number <= count // 4 + 2
