"""KV that leaves by layer groups while prompts are computed: the tokens of the co-located engine."""

import asyncio
import random
from collections.abc import Iterator

import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.test_identity import ask, random_request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def by_layers() -> Iterator[Up]:
    """Every chunk is told of, and prompts have several."""
    up = Up("--layer-stream-threshold=1", "--max-num-batched-tokens=64")
    yield up
    up.stop()


def test_requests_at_once_equal_co_located_runs(by_layers: Up, colocated: Up) -> None:
    rng = random.Random(4)
    bodies = [random_request(rng) | {"model": by_layers.model} for _ in range(24)]
    together = asyncio.run(ask(by_layers, bodies, 24))
    alone = asyncio.run(ask(colocated, bodies, 4))
    different = [index for index, pair in enumerate(zip(together, alone, strict=True)) if pair[0] != pair[1]]
    assert not different, [bodies[index] for index in different[:3]]
    eventually(by_layers.is_quiet, 10, "quiet")
