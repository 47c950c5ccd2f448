"""A request that kills workers costs two of them, and nobody else anything but time."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import Cluster, cluster, http
from tests.fakes.worker import token_at, tokens_of

POISON = 4000
FOUR = tuple(("decode", f"d{number}") for number in range(1, 5))
BAD = {"prompt": [0, POISON], "max_tokens": 20}


def infect(made: Cluster, role: str, token: int = POISON) -> None:
    for worker in made.workers.values():
        worker.faults.token_delay_s = 0.01
        worker.faults.poison = token if worker.role == role else None


def num_alive(made: Cluster) -> int:
    return len(made.ready())


async def convict(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    response = await client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (500, "internal"), error
    assert "died 2 times" in error["message"]


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_it_costs_two_workers_and_is_not_taken_again(role: str) -> None:
    workers = [*FOUR, *((("prefill", f"p{number}") for number in range(1, 4)) if role == "prefill" else ())]
    async with cluster(*workers) as made, http(made) as client:
        infect(made, role)
        await convict(client, BAD)
        await made.until(lambda: num_alive(made) == len(workers) - 2)
        again = await client.post("/v1/completions", json=BAD | {"seed": 7})
        assert (again.status_code, again.json()["error"]["code"]) == (400, "quarantined")
        good = await client.post(
            "/v1/completions", json={"prompt": [0, 1], "max_tokens": 4, "return_token_ids": True}
        )
        assert good.json()["choices"][0]["token_ids"] == tokens_of([0, 1], 4)
        assert num_alive(made) == len(workers) - 2
        metrics = (await client.get("/metrics")).text
        assert "tandem_requests_quarantined_total 1.0" in metrics
        assert 'tandem_requests_total{outcome="quarantined"} 1.0' in metrics
        await made.quiet()


@pytest.mark.parametrize("fresh", [True, False], ids=["just begun", "long running"])
async def test_those_beside_it_go_on_with_their_tokens(fresh: bool) -> None:
    async with cluster(*FOUR) as made, http(made) as client:
        infect(made, "decode")

        async def innocent(number: int) -> None:
            body = {"prompt": [0, 300 + number], "max_tokens": 60, "return_token_ids": True}
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == tokens_of(body["prompt"], 60)

        async with asyncio.TaskGroup() as tasks:
            for number in range(12):
                tasks.create_task(innocent(number))
            if not fresh:
                await asyncio.sleep(0.2)
            tasks.create_task(convict(client, BAD))
        assert num_alive(made) == 2
        assert "tandem_requests_quarantined_total 1.0" in (await client.get("/metrics")).text
        await made.quiet()


async def test_poison_far_in_the_output_costs_three() -> None:
    prompt = [0, 300]
    async with cluster(*FOUR) as made, http(made) as client:
        infect(made, "decode", token_at(prompt, 30))
        await convict(client, {"prompt": prompt, "max_tokens": 40})
        await made.until(lambda: num_alive(made) == 1)


async def test_two_deaths_of_others_doing_are_no_crime() -> None:
    prompt = [0, 300]
    async with cluster(*FOUR) as made, http(made) as client:
        infect(made, "nobody")
        body = {"prompt": prompt, "max_tokens": 60, "return_token_ids": True}
        request = asyncio.ensure_future(client.post("/v1/completions", json=body))
        for _ in range(2):
            await made.until(lambda: any(worker.live for worker in made.workers.values()))
            await asyncio.sleep(0.2)
            await next(worker for worker in made.workers.values() if worker.live).die()
        answer = await request
        assert answer.json()["choices"][0]["token_ids"] == tokens_of(prompt, 60)


async def test_a_stream_that_breaks_is_no_death() -> None:
    async with cluster(*FOUR[:2]) as made, http(made) as client:
        for worker in made.workers.values():
            worker.faults.break_stream_at = 0
        body = {"prompt": [0, 300], "max_tokens": 5, "return_token_ids": True}
        answer = await client.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["token_ids"] == tokens_of([0, 300], 5)
