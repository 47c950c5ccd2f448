"""Faults of the network between a gateway and its workers, by a proxy in front of each of them.

The workers are fakes whose tokens can be computed by hand: what is tried is the gateway.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from runtime.limits import HANG_S
from tests.fakes.cluster import Cluster, cluster, http
from tests.fakes.worker import FakeWorker, tokens_of
from tests.faults.proxy import DOWN, UP, Proxy

PROMPT = [300, 301, 302, 303]
NUM_TOKENS = 24
TOKEN_DELAY_S = 0.01
DETECTED_S = HANG_S + 2.0
"""Two seconds of what is promised are for slow machines."""


@contextlib.asynccontextmanager
async def fronted() -> AsyncIterator[tuple[Cluster, dict[str, dict[str, Proxy]], httpx.AsyncClient]]:
    """Two prefill and two decode workers; per worker its proxies `attach` and `heartbeats`."""
    proxies: dict[str, dict[str, Proxy]] = {}
    async with cluster() as made, http(made) as client:
        host, port = made.internal.rsplit(":", 1)
        try:
            for role, worker_id in (("prefill", "p1"), ("prefill", "p2"), ("decode", "d1"), ("decode", "d2")):
                beats = proxies.setdefault(worker_id, {})["heartbeats"] = Proxy((host, int(port)))
                worker = FakeWorker(role, worker_id, beats.address, made.links, made.facts())
                worker.faults.token_delay_s = TOKEN_DELAY_S
                made.workers[worker_id] = worker
                await worker.start(behind=Proxy)
                proxies[worker_id]["attach"] = worker.proxy
                await made.until(lambda worker_id=worker_id: worker_id in made.ready(), 10)
            yield made, proxies, client
        finally:
            for pair in proxies.values():
                for proxy in pair.values():
                    await asyncio.to_thread(proxy.close)


async def run(client: httpx.AsyncClient) -> float:
    """One request, whose tokens must be those of an undisturbed run; seconds."""
    start_s = time.monotonic()
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == tokens_of(PROMPT, NUM_TOKENS)
    return time.monotonic() - start_s


@contextlib.asynccontextmanager
async def streaming(made: Cluster, client: httpx.AsyncClient) -> AsyncIterator[str]:
    """A request under way inside the block, with the id of its decode worker; it must end well."""
    task = asyncio.ensure_future(run(client))
    decodes = [made.workers["d1"], made.workers["d2"]]
    await made.until(lambda: any(worker.live for worker in decodes))
    yield next(worker.worker_id for worker in decodes if worker.live)
    await task
    await made.quiet()


@pytest.mark.parametrize(
    "direction",
    [
        pytest.param((UP,), marks=pytest.mark.long, id="up"),
        pytest.param((DOWN,), marks=pytest.mark.long, id="down"),
        pytest.param((UP, DOWN), id="both"),
    ],
)
async def test_a_partition_moves_the_stream_and_heals(direction: tuple[str, ...]) -> None:
    async with fronted() as (made, proxies, client):
        async with streaming(made, client) as worker_id:
            cut = proxies[worker_id]
            for proxy in cut.values():
                proxy.set(blackhole=direction)
            start_s = time.monotonic()
            await made.until(lambda: worker_id not in made.ready(), 10)
            assert time.monotonic() - start_s < DETECTED_S
        assert cut["attach"].hits["blackhole"]
        for proxy in cut.values():
            proxy.set()
        await made.until(lambda: worker_id in made.ready(), 10)
        await made.quiet()


async def test_only_the_attach_stream_is_cut() -> None:
    """The worker goes on to say that it lives; that it does not answer must count all the same."""
    async with fronted() as (made, proxies, client), streaming(made, client) as worker_id:
        with proxies[worker_id]["attach"].fault(blackhole=(DOWN,)):
            await made.until(lambda: worker_id not in made.ready(), DETECTED_S)


@pytest.mark.parametrize("fault", ["reset", pytest.param("half_close", marks=pytest.mark.long)])
async def test_a_cut_connection_moves_the_stream_at_once(fault: str) -> None:
    async with fronted() as (made, proxies, client):
        async with streaming(made, client) as worker_id:
            start_s = time.monotonic()
            assert getattr(proxies[worker_id]["attach"], fault)() > 0
        assert time.monotonic() - start_s < NUM_TOKENS * TOKEN_DELAY_S + 2.5
        await made.until(lambda: worker_id in made.ready(), 10)


@pytest.mark.parametrize(
    "weather",
    [
        pytest.param({"delay_s": 0.2}, id="delay"),
        pytest.param({"bytes_per_s": 20_000}, marks=pytest.mark.long, id="throttle"),
    ],
)
async def test_a_slow_network_is_no_death(weather: dict[str, float]) -> None:
    async with fronted() as (made, proxies, client):
        for pair in proxies.values():
            for proxy in pair.values():
                proxy.set(**weather)
        await run(client)
        assert all(pair["attach"].hits for name, pair in proxies.items() if made.workers[name].submits)
        assert made.ready() == {"p1", "p2", "d1", "d2"}
        assert sum(len(worker.submits) for worker in made.workers.values()) == 2
        await made.quiet()


async def test_a_stall_of_one_and_a_half_seconds_aborts_nothing() -> None:
    async with fronted() as (made, proxies, client):
        async with streaming(made, client) as worker_id:
            pair = proxies[worker_id].values()
            for proxy in pair:
                proxy.set(blackhole=(UP, DOWN))
            await asyncio.sleep(1.5)
            for proxy in pair:
                proxy.set()
        assert made.gateway.metrics.attempts._value.get() == 1
