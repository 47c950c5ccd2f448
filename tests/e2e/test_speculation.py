"""Speculation in real processes: the same tokens, the draft's KV over the link, what is counted."""

from collections.abc import Iterator

import pytest

from tests.e2e.harness import Up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPTS = ("def add(a, b):\n", "import os\n\nclass Foo:\n    def __init__(self", "for i in range(")


@pytest.fixture(scope="module")
def plain() -> Iterator[Up]:
    """A split server that emits one token a step."""
    up = Up("--speculative=off")
    yield up
    up.stop()


@pytest.fixture(scope="module")
def one_sided() -> Iterator[Up]:
    """A split server that drafts from the sequence itself: no draft KV travels."""
    up = Up("--speculative=ngram", "--num-draft-tokens=4")
    yield up
    up.stop()


def outputs(up: Up) -> list[list[int]]:
    found = []
    for seed, prompt in enumerate(PROMPTS):
        answer = up.complete(prompt, max_tokens=60, temperature=0.7 * (seed % 2), seed=seed, ignore_eos=True)
        found.append(answer["choices"][0]["token_ids"])
    return found


def test_the_tokens_are_those_of_speculation_off(split: Up, plain: Up, one_sided: Up) -> None:
    undisturbed = outputs(plain)
    assert outputs(split) == undisturbed
    assert outputs(one_sided) == undisturbed


def test_accepted_tokens_are_counted_in_usage_and_metrics(one_sided: Up, plain: Up) -> None:
    # The number of draft tokens is pinned: by itself a worker may find that drafting does not pay here.
    def accepted() -> float:
        name = "tandem_spec_accepted_tokens_total"
        return sum(one_sided.metric(worker["http"], name) for worker in one_sided.workers("decode"))

    before = accepted()
    usage = one_sided.complete(PROMPTS[0], max_tokens=60, temperature=0, ignore_eos=True)["usage"]
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0
    assert accepted() - before >= details["accepted_prediction_tokens"]
    usage = plain.complete(PROMPTS[0], max_tokens=60, temperature=0, ignore_eos=True)["usage"]
    assert "completion_tokens_details" not in usage
