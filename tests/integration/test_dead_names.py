"""A name server that never answers: who is called by a name is not there, and everybody else is served."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from protos.tandem.v1 import common_pb2 as pb
from protos.tandem.v1 import registry_pb2
from runtime.version import PROTOCOL_MAJOR
from tests.fakes.cluster import Cluster, cluster, http
from tests.fakes.worker import FakeWorker, tokens_of
from worker.membership import Membership

PROMPT = [300, 301, 302, 303]
NUM_TOKENS = 6


class NameServer:
    """Takes questions and says nothing."""

    def __init__(self, own: socket.socket) -> None:
        self._socket = own
        self.authority = f"127.0.0.1:{own.getsockname()[1]}"

    def num_questions(self) -> int:
        """Since the last time."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(512):
                count += 1
        return count


@pytest.fixture
def names() -> Iterator[NameServer]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        own.setblocking(False)
        yield NameServer(own)


async def run(made: Cluster) -> float:
    """One request with the tokens of an undisturbed run; seconds."""
    start_s = time.monotonic()
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True}
    async with http(made) as client:
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == tokens_of(PROMPT, NUM_TOKENS)
    return time.monotonic() - start_s


async def test_a_worker_behind_a_name_that_nobody_resolves_takes_no_requests(names: NameServer) -> None:
    async with cluster(("prefill", "p1"), ("decode", "d1")) as made:
        worker = FakeWorker("decode", "d2", made.internal, made.links, made.facts())
        await worker.start()
        worker.identity.address = f"dns://{names.authority}/worker.test:{worker.identity.address[10:]}"
        made.workers["d2"] = worker
        await made.until(lambda: made.gateway.fleet.registry.get("d2") is not None)
        asked = 0
        for _ in range(100):
            asked += names.num_questions()
            if asked:
                break
            await asyncio.sleep(0.02)
        assert asked, "nobody asked for the name"
        for _ in range(5):
            assert await run(made) < 5
        assert made.ready() == {"p1", "d1"}
        assert not worker.submits
        listed = {each["id"]: each["attached"] for each in made.gateway.fleet.describe()}
        assert listed == {"p1": True, "d1": True, "d2": False}
        await made.quiet()


async def test_a_worker_registers_with_the_gateways_that_it_finds(names: NameServer) -> None:
    async with cluster() as made:
        info = registry_pb2.WorkerInfo(
            identity=pb.WorkerIdentity(worker_id="w", boot_id="b", address="127.0.0.1:1"),
            role=pb.WORKER_ROLE_DECODE,
            model=made.facts(),
            protocol_major=PROTOCOL_MAJOR,
        )
        membership = Membership(info, [f"dns://{names.authority}/gateway.test:1", made.internal])
        task = asyncio.ensure_future(membership.run())
        try:
            await made.until(lambda: made.gateway.fleet.registry.get("w") is not None)
            asked = 0
            while not asked:
                await asyncio.sleep(0.02)
                asked = names.num_questions()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
