"""A client that does not read slows nobody down, and is given up in the end."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio
import pytest

from gateway import exchange, patience
from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.fakes.cluster import cluster

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


async def events() -> AsyncGenerator[bytes, None]:
    for _ in range(3):
        yield b"data: {}\n\n"


async def test_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SEND_TIMEOUT_S", 0.06)
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if len(sent) == 3:
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    stream = exchange.EventStream(events())
    await stream({exchange.INNERMOST_SEND: send}, receive, send)
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]
