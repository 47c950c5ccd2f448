import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.plan import Scheduled
from engine.request import Request, SamplingParams
from engine.speculative.costs import CostTable
from engine.speculative.factory import longest_draft
from engine.speculative.lengths import (
    FIRST_PROBE_STEPS,
    MIN_PLAIN_STEPS,
    REFRESH_STEPS,
    AcceptanceRate,
    AdaptiveLengths,
    expected_tokens,
)
from engine.speculative.ngram import LENGTHS, NgramProposer
from engine.step.factory import step_shapes


def request(prompt, key=0):
    return Request(key=key, prompt_token_ids=list(prompt), sampling=SamplingParams(max_tokens=99))


def looked_up(tokens, num_draft_tokens):
    """The definition: what followed the latest earlier occurrence of the longest run at the end."""
    for length in LENGTHS:
        run = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(run) == length and tokens[end - length : end] == run:
                followed = tokens[end : end + num_draft_tokens]
                return tuple((followed * num_draft_tokens)[:num_draft_tokens])
    return ()


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=6),
)
def test_ngrams_are_looked_up_by_definition_while_the_sequence_grows(prompt, growth):
    proposer, asked = NgramProposer(), request(prompt)
    for new in [[], *growth]:
        asked.output_token_ids += new
        (draft,) = proposer.propose([Scheduled(asked, 1, num_draft_tokens=3)])
        assert draft.token_ids == looked_up(asked.tokens(0, asked.num_tokens), 3)
        assert draft.logits is None


def test_costs_are_running_means_and_an_outlier_counts_little():
    costs = CostTable()
    assert costs.estimate(8) == 0.0
    costs.observe(8, 1.0)
    assert costs.estimate(8) == 1.0
    assert costs.estimate(32) == pytest.approx(2.0)
    assert costs.estimate(4) == 0.0
    costs.observe(8, 1000.0)
    assert costs.estimate(8) == pytest.approx(1.1)
    costs.observe(8, 0.1)
    assert costs.estimate(8) == pytest.approx(0.6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_an_acceptance_rate_is_found_from_drafts_of_any_length(rate):
    import random

    draws = random.Random(3)
    found = AcceptanceRate(0.7)
    values = []
    for _ in range(3000):
        length = draws.randrange(1, 6)
        accepted = next((i for i in range(length) if draws.random() >= rate), length)
        found.observe(length, accepted)
        values.append(found.value)
    assert sum(values[200:]) / len(values[200:]) == pytest.approx(rate, abs=0.04)


def test_expected_tokens_is_the_geometric_sum():
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(1.0, 3) == 4.0


def lengths(row_cost, fixed_cost, draft_cost, max_draft_tokens=8):
    """A policy whose costs are measured at every size: fixed_cost + row_cost * rows."""
    target, draft = CostTable(), CostTable()
    for rows in [row for row in range(1, 300) for _ in range(MIN_PLAIN_STEPS)]:
        target.observe(rows, fixed_cost + row_cost * rows)
        draft.observe(rows, draft_cost)
    return AdaptiveLengths(target, draft, max_draft_tokens=max_draft_tokens)


def plan(num_requests):
    return [Scheduled(request([1, 2, 3], key), 1) for key in range(num_requests)]


def accept(policy, items, num_accepted, times=40):
    for _ in range(times):
        for item in items:
            policy.observe(item.request, 4, num_accepted)


def test_drafts_are_long_where_rows_are_free_and_the_draft_is_good():
    policy, items = lengths(0.0, 1.0, 0.02), plan(1)
    accept(policy, items, 4)
    assert policy.choose(items) == [8]


def test_no_draft_where_every_row_costs_as_much_as_a_step():
    policy, items = lengths(1.0, 0.0, 0.1), plan(32)
    accept(policy, items, 2)
    assert policy.choose(items) == [0] * 32


def test_a_bad_draft_is_switched_off_and_probed_now_and_then():
    policy, items = lengths(0.0, 1.0, 0.3), plan(1)
    accept(policy, items, 0)
    chosen = [policy.choose(items)[0] for _ in range(8 * FIRST_PROBE_STEPS)]
    assert set(chosen) == {0, 1}
    assert sum(chosen) == 3  # after 32, 64 and 128 steps
    accept(policy, items, 4)
    assert policy.choose(items)[0] > 1


def test_a_request_with_a_bad_draft_gets_a_shorter_one_than_its_neighbours():
    policy, items = lengths(0.02, 1.0, 0.01), plan(8)
    accept(policy, items[:7], 4)
    accept(policy, items[7:], 0)
    chosen = policy.choose(items)
    assert chosen[7] < min(chosen[:7])


def test_what_a_plain_step_costs_is_never_an_old_story():
    policy, items = lengths(0.0, 1.0, 0.02), plan(3)
    accept(policy, items, 4)
    chosen = [policy.choose(items)[0] for _ in range(2 * REFRESH_STEPS + 2)]
    assert [step for step, length in enumerate(chosen) if length == 0] == [
        REFRESH_STEPS,
        2 * REFRESH_STEPS + 1,
    ]


def test_no_chosen_length_is_beyond_captured_steps():
    for device, cuda_graphs, most in (("cpu", "auto", 8), ("cuda:0", "off", 8), ("cuda:0", "auto", 7)):
        config = EngineConfig(device=device, cuda_graphs=cuda_graphs, speculative="ngram", max_num_seqs=4)
        assert longest_draft(config, NgramProposer()) == most
    assert step_shapes(config).fit(4, 1 + most)
    assert not step_shapes(config).fit(4, 2 + most)


def test_nothing_is_drafted_before_a_plain_step_was_measured():
    policy = AdaptiveLengths(CostTable(), CostTable(), max_draft_tokens=8)
    assert policy.choose(plan(2)) == [0, 0]
    assert policy.choose([]) == []
