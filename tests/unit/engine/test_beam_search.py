"""The search policy alone: tables of log-probabilities instead of a model."""

import itertools
import math

import pytest

from engine.beam_search import BeamParams, BeamSearch, EarlyStopping

VOCAB = 3
END = 2


def logprobs(prefix):
    """Log-probabilities of the next token behind a prefix: an arbitrary fixed model."""
    weights = [
        1 + (7 * sum((i + 2) * t for i, t in enumerate(prefix)) + 5 * t * t) % 11 for t in range(VOCAB)
    ]
    return [math.log(weight / sum(weights)) for weight in weights]


def alternatives(prefix):
    return sorted(enumerate(logprobs(prefix)), key=lambda item: -item[1])


def search(width, max_tokens, stop=(), **params):
    found = BeamSearch(
        params=BeamParams(width=width, num_returned=width, **params),
        max_tokens=max_tokens,
        stop_token_ids=stop,
    )
    num_steps = 0
    while not found.done:
        before = [beam.token_ids for beam in found.running]
        parents = found.advance([alternatives(prefix) for prefix in before])
        for beam, parent in zip(found.running, parents, strict=True):
            assert beam.token_ids[:-1] == before[parent]
        num_steps += 1
    return found.best(), num_steps


def score(token_ids, penalty):
    total = sum(logprobs(token_ids[:i])[token] for i, token in enumerate(token_ids))
    return total / len(token_ids) ** penalty


def complete(max_tokens):
    """All sequences that can end."""
    for length in range(1, max_tokens + 1):
        for token_ids in itertools.product(range(VOCAB), repeat=length):
            if END not in token_ids[:-1] and (length == max_tokens or token_ids[-1] == END):
                yield list(token_ids)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5, 2.0])
def test_a_search_as_wide_as_the_tree_finds_the_best_sequences(penalty):
    width = VOCAB**4
    found, _ = search(width, 4, (END,), length_penalty=penalty, early_stopping=EarlyStopping.NEVER)
    want = sorted(complete(4), key=lambda each: -score(each, penalty))
    assert [beam.score for beam in found] == pytest.approx([score(each, penalty) for each in want])
    assert sorted(beam.token_ids for beam in found) == sorted(want)


def test_a_beam_of_one_is_greedy():
    (beam,), num_steps = search(1, 6)
    greedy = []
    for _ in range(6):
        greedy.append(alternatives(greedy)[0][0])
    assert beam.token_ids == greedy
    assert num_steps == 6


def test_stopping_earlier_takes_no_more_steps():
    steps = {
        rule: search(2, 12, (END,), early_stopping=rule)[1]
        for rule in (EarlyStopping.WHEN_ENOUGH, EarlyStopping.LIKELY, EarlyStopping.NEVER)
    }
    assert steps[EarlyStopping.WHEN_ENOUGH] <= steps[EarlyStopping.LIKELY] <= steps[EarlyStopping.NEVER]
    assert steps[EarlyStopping.WHEN_ENOUGH] < 12
