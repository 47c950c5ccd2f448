"""A client that does not read slows nobody down, and is given up in the end."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
import pytest

from gateway import exchange, patience
from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from runtime.http_parts import PARTS
from tests.fakes.cluster import cluster, http

NO_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]

NUM_TOKENS = 500
"""With 20 alternatives each, several times what gRPC keeps for a client that does not ask."""


def request(num_tokens: int) -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(max_tokens=num_tokens, logprobs=20)
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[0, 300, 301, 302]), sampling=sampling
    )


async def test_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SEND_TIMEOUT_S", 0.6)
    async with (
        cluster(("decode", "d1")) as made,
        grpc.aio.insecure_channel(made.grpc, options=NO_WINDOW) as slow,
        grpc.aio.insecure_channel(made.grpc) as quick,
    ):
        call = inference_pb2_grpc.InferenceServiceStub(slow).Generate(request(NUM_TOKENS))
        await call.read()
        other = inference_pb2_grpc.InferenceServiceStub(quick).Generate(request(20))
        assert sum([len(response.token_ids) async for response in other]) == 20
        assert made.gateway.flow.num_live == 1
        await made.quiet()
        call.cancel()


async def test_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SEND_TIMEOUT_S", 0.6)
    asked = {"prompt": [0, 300, 301, 302], "max_tokens": NUM_TOKENS, "logprobs": 20, "stream": True}
    body = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with cluster(("decode", "d1")) as made, http(made) as quick:
        assert made.gateway._socket is not None
        made.gateway._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", made.gateway.http_port))
            slow.sendall(head + body)
            answer = await quick.post("/v1/completions", json=asked | {"max_tokens": 20, "stream": False})
            assert answer.json()["usage"]["completion_tokens"] == 20
            assert made.gateway.flow.num_live == 1
            await made.quiet()


async def events() -> AsyncGenerator[bytes, None]:
    for _ in range(3):
        yield b"data: {}\n\n"


class FullAfterOne:
    """A connection whose client takes one part."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    @property
    def is_full(self) -> bool:
        return len(self.parts) == 1

    async def drained(self) -> None:
        await asyncio.Event().wait()

    def write(self, part: bytes) -> None:
        self.parts.append(part)


async def test_a_stream_of_events_waits_for_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SEND_TIMEOUT_S", 0.06)
    sent: list[str] = []
    connection = FullAfterOne()

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    stream = exchange.EventStream(events(), bytes, b"last")
    await stream({PARTS: connection}, receive, send)
    assert sent == ["http.response.start"]
    assert connection.parts == [b"data: {}\n\n"]
