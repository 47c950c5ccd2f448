"""A decode worker that runs out of blocks: whatever becomes of its requests, clients see the same tokens."""

import asyncio

import pytest

import tandem
from tests.e2e.harness import Up, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

PROMPTS = [[3 + 7 * i + j for j in range(60 + 10 * i)] for i in range(4)]


async def generate(address: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    async with tandem.Client(address) as client:
        answers = await asyncio.gather(
            *(
                client.complete(prompt, max_tokens=150, seed=5, temperature=0.9, ignore_eos=True)
                for prompt in prompts
            )
        )
    return [answer.token_ids for answer in answers]


@pytest.mark.parametrize(
    ("flags", "mode"),
    [(["--swap-space=64MiB"], "swap"), (["--swap-space=0", "--max-num-batched-tokens=64"], "hand_back")],
)
def test_preempted_streams_have_the_tokens_of_undisturbed_ones(flags: list[str], mode: str) -> None:
    up = Up("--max-model-len=400", "--kv-cache-memory=3MiB", *flags)
    try:
        alone = [asyncio.run(generate(up.grpc, [prompt]))[0] for prompt in PROMPTS]
        assert asyncio.run(generate(up.grpc, PROMPTS)) == alone
        (decode,) = up.workers("decode")
        text = up.client.get(f"{decode['http']}/metrics").text
        assert f'tandem_num_preemptions_total{{mode="{mode}"}}' in text
        eventually(up.is_quiet, 10, "quiet")
    finally:
        up.stop()
