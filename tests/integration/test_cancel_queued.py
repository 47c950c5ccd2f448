"""Clients that leave, and deadlines that pass, before a worker has heard of the request; on each face."""

import asyncio
import itertools
from types import SimpleNamespace

import httpx
import pytest

from gateway.flow import Generation
from gateway.tracing import Origin
from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import DeadlineExceeded
from tests.fakes.cluster import Cluster, cluster
from tests.faults.calls import DEADLINE, FACES, Call

PROMPT = [300, 301, 302, 303]
salts = (f"queued {number}" for number in itertools.count())


async def begin(made: Cluster, face: str, timeout_s: float | None = None) -> Call:
    up = SimpleNamespace(http=made.url, grpc=made.grpc, model="demo")
    return await asyncio.to_thread(FACES[face], up, PROMPT, 20, next(salts), timeout_s)


@pytest.mark.parametrize(
    "face",
    [
        pytest.param(face, marks=() if face in ("http-stream", "grpc-unary") else pytest.mark.long)
        for face in FACES
    ],
)
async def test_a_request_in_the_queue_goes_with_its_client_or_its_deadline(face: str) -> None:
    async with cluster(("decode", "d1"), max_concurrent_requests=1) as made:
        made.workers["d1"].faults.ignore_next = 1
        flow = made.gateway.flow
        first = await begin(made, "http-unary")
        await made.until(lambda: made.workers["d1"].submits)
        second = await begin(made, face)
        await made.until(lambda: flow.num_waiting == 1)
        await asyncio.to_thread(second.leave)
        await made.until(lambda: flow.num_waiting == 0)
        third = await begin(made, face, 0.2)
        assert await asyncio.to_thread(third.outcome) == DEADLINE
        await made.until(lambda: flow.num_live == 1)
        await asyncio.to_thread(first.leave)
        await made.quiet()
        assert len(made.workers["d1"].submits) == 1
        assert flow.ledger.held == made.gateway.fleet.attempts.held == 0


async def test_what_has_expired_is_not_started() -> None:
    async with cluster(("prefill", "p1"), ("decode", "d1")) as made:
        origin = Origin(operation="text_completion", method="/", stream=False, traceparent="")
        for timeout_s in (0.0, -1.0):
            asked = Generation(
                request_id="", prompt=PROMPT, sampling=pb.SamplingParams(), timeout_s=timeout_s, origin=origin
            )
            with pytest.raises(DeadlineExceeded):
                [delta async for delta in made.gateway.flow.stream(asked)]
        assert not any(worker.submits for worker in made.workers.values())
        assert made.gateway.flow.ledger.held == 0


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing() -> None:
    async with cluster(("decode", "d1")) as made:
        host, port = made.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await made.until(lambda: writer.transport.get_write_buffer_size() == 0)
        writer.close()
        await writer.wait_closed()
        await made.quiet()
        assert made.gateway.flow.ledger.taken == 0


async def test_a_time_out_that_is_none_is_refused() -> None:
    talk = {"messages": [{"role": "user", "content": "x"}]}
    async with cluster() as made, httpx.AsyncClient(base_url=made.url) as client:
        for given in ("soon", "0", "-1", "inf", "nan"):
            for path, body in (("completions", {"prompt": "x"}), ("chat/completions", talk)):
                answer = await client.post(f"/v1/{path}", json=body, headers={"x-request-timeout": given})
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == "x-request-timeout"
