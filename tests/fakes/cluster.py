"""A gateway with fake workers on free ports, inside the test's event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx

from gateway.main import Gateway
from gateway.model import load_model
from protos.tandem.v1 import registry_pb2
from runtime.checkpoint_dir import bundled_model
from runtime.settings import GatewaySettings
from tests.fakes.worker import EOS, FakeWorker, Faults, Links

MAX_MODEL_LEN = 512


class Cluster:
    """What a test works with."""

    def __init__(self, gateway: Gateway, model: Any, secret: str | None = None) -> None:
        self._secret = secret
        self.gateway = gateway
        self.model = model
        self.workers: dict[str, FakeWorker] = {}
        self.links = Links()
        self.url = f"http://127.0.0.1:{gateway.http_port}"
        self.grpc = f"127.0.0.1:{gateway.grpc_port}"
        self.internal = f"127.0.0.1:{gateway.internal_port}"

    def facts(self, **changes: Any) -> registry_pb2.ModelFacts:
        facts = {
            "model_hash": "m",
            "tokenizer_hash": self.model.tokenizer_hash,
            "max_model_len": MAX_MODEL_LEN,
            "vocab_size": 4096,
            "eos_token_ids": [EOS],
            "block_size": 16,
            "dtype": "float32",
        }
        return registry_pb2.ModelFacts(**(facts | changes))

    async def add(self, role: str, worker_id: str, faults: Faults | None = None) -> FakeWorker:
        worker = FakeWorker(role, worker_id, self.internal, self.links, self.facts(), faults, self._secret)
        self.workers[worker_id] = worker
        await worker.start()
        await self.until(lambda: worker_id in self.ready())
        return worker

    def ready(self) -> set[str]:
        return {candidate.worker_id for candidate in self.gateway.fleet.candidates()}

    async def until(self, condition: Any, timeout: float = 3.0) -> None:
        """Wait for a condition on another task's work."""
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.005)

    async def quiet(self) -> None:
        """Nothing is left of any request, here or on workers."""
        await self.until(lambda: self.gateway.flow.num_live == 0)
        await self.until(lambda: not any(worker.live for worker in self.workers.values()))


@contextlib.asynccontextmanager
async def cluster(*workers: tuple[str, str], **settings: Any) -> AsyncIterator[Cluster]:
    """A served gateway with these (role, id) workers ready."""
    model = load_model(bundled_model(), name="demo", chat_template=None)
    given = {"http_port": 0, "grpc_port": 0, "internal_port": 0} | settings
    gateway = Gateway(GatewaySettings(**given), model)
    gateway.bind()
    async with gateway.serving():
        made = Cluster(gateway, model, settings.get("internal_secret"))
        try:
            for role, worker_id in workers:
                await made.add(role, worker_id)
            yield made
        finally:
            for worker in made.workers.values():
                await worker.stop()


@contextlib.asynccontextmanager
async def http(made: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the gateway."""
    async with httpx.AsyncClient(base_url=made.url, timeout=10, trust_env=False) as client:
        yield client
