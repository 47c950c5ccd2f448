"""256 requests at random settings, all at once over two prefill and two decode workers: each equals its
lone run, token by token."""

import asyncio
import random
from typing import Any

import httpx
import pytest

from tests.e2e.harness import Up, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SHARED = [17 * number % 4000 + 3 for number in range(200)]


def random_request(rng: random.Random) -> dict[str, Any]:
    """One request; a third of them begin with the same prefix."""
    shared = SHARED[: rng.choice([0, 0, 48, 200])]
    body: dict[str, Any] = {
        "prompt": shared + [rng.randrange(3, 4000) for _ in range(rng.choice([1, 7, 16, 33, 150]))],
        "max_tokens": rng.randrange(1, 33),
        "temperature": rng.choice([0, 0.5, 0.8, 1.2]),
        "seed": rng.randrange(1 << 40),
        "return_token_ids": True,
    }
    optional = {
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": {"300": 3.0, "301": -100},
        "min_tokens": 1,
        "ignore_eos": True,
        "stop": ["self", "\n\n"],
        "logprobs": 2,
        "bad_words": ["return"],
    }
    for name in rng.sample(sorted(optional), rng.randrange(0, 5)):
        body[name] = optional[name]
    return body


def outcome(answer: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What a client sees, but for ids and times."""
    return [(c["token_ids"], c["text"], c["finish_reason"], c["stop_reason"]) for c in answer["choices"]]


async def ask(up: Up, bodies: list[dict[str, Any]], concurrency: int) -> list[list[tuple[Any, ...]]]:
    slots = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=up.http, timeout=300) as client:

        async def one(body: dict[str, Any]) -> list[tuple[Any, ...]]:
            async with slots:
                response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            return outcome(response.json())

        return list(await asyncio.gather(*map(one, bodies)))


@pytest.mark.long
def test_256_requests_at_once_equal_their_lone_runs(split: Up) -> None:
    rng = random.Random(20)
    bodies = [random_request(rng) | {"model": split.model} for _ in range(256)]
    together = asyncio.run(ask(split, bodies, 256))
    alone = asyncio.run(ask(split, bodies, 1))
    different = [index for index, pair in enumerate(zip(together, alone, strict=True)) if pair[0] != pair[1]]
    print(f"256 requests, {sum(len(c[0]) for a in alone for c in a)} tokens, {len(different)} differ")
    assert not different, [bodies[index] for index in different[:3]]
    eventually(split.is_quiet, 10, "quiet")
