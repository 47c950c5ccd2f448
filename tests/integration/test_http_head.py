"""A request's head is short and comes soon, or its connection is closed; nobody else notices."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from runtime import http_head
from tests.fakes.cluster import Cluster, cluster, http

HEAD = b"GET /version HTTP/1.1\r\nhost: x\r\n"


@asynccontextmanager
async def connected(made: Cluster) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", made.gateway.http_port)
    try:
        async with asyncio.timeout(10):
            yield reader, writer
    finally:
        writer.close()


async def test_an_unfinished_head_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_head, "HEAD_TIMEOUT_S", 0.2)
    async with cluster() as made, connected(made) as (reader, writer), http(made) as client:
        writer.write(HEAD)
        assert (await client.get("/version")).status_code == 200
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_head, "FIRST_BYTE_TIMEOUT_S", 0.1)
    async with cluster() as made, connected(made) as (reader, _):
        assert await reader.read() == b""


async def test_an_endless_head_is_refused() -> None:
    async with cluster() as made, connected(made) as (reader, writer):
        writer.write(HEAD)
        answer = asyncio.ensure_future(reader.readline())
        while not answer.done():
            writer.write(b"x: " + b"y" * 8000 + b"\r\n")
            await asyncio.wait({answer}, timeout=0.001)
        assert answer.result().startswith(b"HTTP/1.1 431 ")


async def test_heads_in_pieces_and_in_a_row_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_head, "HEAD_TIMEOUT_S", 5.0)
    async with cluster() as made, connected(made) as (reader, writer):
        for _ in range(3):
            for piece in (HEAD[:5], HEAD[5:20], HEAD[20:], b"\r\n"):
                writer.write(piece)
                await asyncio.sleep(0)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
