"""Steps that start before the one before them has landed: the tokens of steps in order, nobody's blocks."""

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from engine.choices import fan_out
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import FinishReason, Request, RequestState, SamplingParams

PROMPT = list(range(3, 60)) * 2
SIZE = {"num_blocks": 40, "block_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": 12}
KINDS = (
    {},
    {"temperature": 0},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.9},
    {"temperature": 2.0, "stop_token_ids": tuple(range(3, 20))},
    {"temperature": 2.0, "ignore_eos": False, "min_p": 0.01},
    {"presence_penalty": 0.8},
    {"logprobs": 1},
    {"typical_p": 0.7},
)
"""The last three make a batch wait for every step."""


def build(key, prompt_len, max_tokens, kind, *, num_choices=1, priority=0):
    sampling = SamplingParams(
        **{"max_tokens": max_tokens, "seed": prompt_len, "ignore_eos": True, **KINDS[kind]}
    )
    request = Request(key=key, prompt_token_ids=PROMPT[:prompt_len], sampling=sampling, priority=priority)
    if num_choices > 1:
        fan_out(request, dict.fromkeys(range(num_choices), ()))
    return request


@pytest.fixture(scope="module")
def alone(tiny_model):
    """The tokens of a request, by choice, from an engine that runs it alone and in order."""
    engine, known = Engine(EngineConfig(**SIZE), tiny_model), {}

    def tokens(*spec, num_choices):
        if (spec, num_choices) not in known:
            request = build("alone", *spec, num_choices=num_choices)
            engine.submit(request)
            while engine.has_work():
                engine.step()
            known[spec, num_choices] = [each.output_token_ids for each in request.forks or [request]]
        return known[spec, num_choices]

    return tokens


def machine_of(tiny_model, alone):
    class Overlapping(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.engine = Engine(
                EngineConfig(**SIZE, overlap="on", scheduling_policy="priority", swap_space_bytes=1 << 20),
                tiny_model,
            )
            for group in self.engine.kv_cache.groups:
                group.fill_(torch.nan)
            self.live, self.told, self.num_keys = {}, {}, 0

        @rule(
            prompt_len=st.integers(1, 30), max_tokens=st.integers(1, 14),
            kind=st.sampled_from([*range(5)] * 5 + [5, 6, 7]), num_choices=st.sampled_from([1, 1, 1, 3]),
            priority=st.integers(0, 1),
        )  # fmt: skip
        def submit(self, prompt_len, max_tokens, kind, num_choices, priority):
            self.num_keys += 1
            spec = (prompt_len, max_tokens, kind)
            request = build(self.num_keys, *spec, num_choices=num_choices, priority=priority)
            self.engine.submit(request)
            self.live[self.num_keys] = (spec, request)

        @rule(prompt_len=st.integers(20, 60), num_steps=st.integers(0, 3))
        def reserve_over_others(self, prompt_len, num_steps):
            """Displaces running requests, of which some are in flight, and goes away."""
            self.step(num_steps)
            request = build("reserved", prompt_len, 3, 0, priority=2)
            if self.engine.reserve(request):
                self.engine.check()
                self.engine.abort("reserved")

        @rule(which=st.integers(0, 9), num_steps=st.integers(0, 3))
        def abort(self, which, num_steps):
            self.step(num_steps)
            if self.live:
                key = list(self.live)[which % len(self.live)]
                del self.live[key]
                assert self.engine.abort(key)

        @rule(num_steps=st.integers(1, 6))
        def step(self, num_steps):
            for _ in range(num_steps):
                if self.engine.has_work():
                    self.take(self.engine.step())
                self.engine.check()

        def take(self, result):
            for output in result.outputs:
                request = output.request.leader or output.request
                told = self.told.setdefault((request.key, output.choice), [])
                assert output.start_index == len(told)
                assert request.key in self.live, "nothing is told of whom nobody wants"
                told += output.token_ids
            for key in [
                key for key, (_, request) in self.live.items() if request.state is RequestState.FINISHED
            ]:
                self.judge(key)

        def judge(self, key):
            spec, request = self.live.pop(key)
            expected = alone(*spec, num_choices=max(len(request.forks), 1))
            assert [self.told[key, choice] for choice in range(len(expected))] == expected

        @invariant()
        def blocks_are_accounted_for(self):
            self.engine.check()

        def teardown(self):
            while self.engine.has_work():
                self.take(self.engine.step())
                self.engine.check()
            assert not self.live
            assert self.engine.load().blocks_used == 0

    return Overlapping


def test_any_mix_gives_the_tokens_of_steps_in_order(tiny_model, alone):
    run_state_machine_as_test(
        machine_of(tiny_model, alone),
        settings=settings(max_examples=20, stateful_step_count=30, deadline=None, phases=(Phase.generate,)),
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_busy_engine_gives_the_tokens_of_steps_in_order(tiny_model, alone, seed):
    """The same operations, such that the batch is full while requests come, go and are displaced."""
    rng, machine = random.Random(seed), machine_of(tiny_model, alone)()
    for _ in range(60):
        if len(machine.live) < 6:
            kind = rng.choice([*range(5)] * 8 + [5, 6, 7])
            num_choices = rng.choice([1, 1, 1, 1, 1, 3])
            machine.submit(rng.randint(1, 20), rng.randint(1, 14), kind, num_choices, rng.randint(0, 1))
        machine.step(rng.randint(0, 4))
        if rng.random() < 0.25:
            machine.abort(rng.randint(0, 9), 0)
        if rng.random() < 0.1:
            machine.reserve_over_others(rng.randint(20, 60), 0)
    machine.teardown()


@pytest.fixture
def overlapping(make_engine):
    engine = make_engine(overlap="on", num_blocks=40, max_num_seqs=6)
    engine.num_computed = 0
    run = engine._runner.flights._graphs.run

    def counted(*args):
        engine.num_computed += 1
        return run(*args)

    engine._runner.flights._graphs.run = counted
    return engine


def test_no_step_is_computed_for_a_token_that_is_known_to_be_the_last(overlapping, make_request):
    overlapping.submit(make_request(9, max_tokens=12))
    overlapping.step()
    in_flight = [overlapping._pipeline.in_flight for _ in range(11) if overlapping.step()]
    assert in_flight == [True] * 10 + [False]
    assert overlapping.num_computed == 11
    assert not overlapping.has_work()


def test_a_late_stop_costs_one_step_whose_token_nobody_sees(overlapping, make_engine, make_request):
    (whole,) = make_engine().run(make_request(9))
    request = make_request(9, stop_token_ids=(whole[5],))
    overlapping.submit(request)
    outputs = []
    while overlapping.has_work():
        outputs += overlapping.step().outputs
    stop = whole.index(whole[5])
    assert request.output_token_ids == whole[: stop + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert overlapping.num_computed == stop + 1


def test_blocks_that_a_step_in_flight_writes_are_free_when_it_has_landed(overlapping, make_request):
    leaving, staying = make_request(9), make_request(10)
    for request in (leaving, staying):
        overlapping.submit(request)
    overlapping.step()
    overlapping.step()
    assert overlapping._pipeline.in_flight
    used, held = overlapping.load().blocks_used, len(leaving.block_tables[0])
    assert overlapping.abort(leaving.key)
    assert overlapping.load().blocks_used == used
    result = overlapping.step()
    assert [item.request for item in result.batch] == [staying]
    assert overlapping.load().blocks_used <= used - held + 1
    overlapping.abort(staying.key)
    assert overlapping.has_work()
    overlapping.step()
    assert overlapping.load().blocks_used == 0
    assert not overlapping.has_work()


def test_a_block_that_is_exchanged_for_a_known_one_is_kept_for_the_step_that_reads_it(
    overlapping, make_request
):
    """Two requests alike fill a block with the same tokens in the same step: one takes over the other's."""
    one, other = make_request(9, key=1), make_request(9, key=2)
    overlapping.submit(one)
    overlapping.step()
    overlapping.submit(other)
    pool = overlapping.kv_cache.tables.pools[0]
    kept = 0
    while overlapping.has_work():
        before = {block for request in (one, other) for table in request.block_tables for block in table}
        overlapping.step()
        if one.state is other.state is RequestState.RUNNING and overlapping._pipeline.in_flight:
            given_up = before.difference(one.block_tables[0], other.block_tables[0])
            assert all(pool.ref_count(block) == 1 for block in given_up)
            kept += len(given_up)
    assert kept
    assert overlapping.load().blocks_used == 0


def test_a_prompt_waits_for_no_more_than_the_step_in_flight(overlapping, make_request):
    overlapping.submit(make_request(9))
    overlapping.step()
    overlapping.step()
    newcomer = make_request(4)
    overlapping.submit(newcomer)
    overlapping.step()
    overlapping.step()
    assert len(newcomer.output_token_ids) == 1


def test_a_fault_in_one_request_ends_it_alone(overlapping, make_engine, make_request):
    good, bad = make_request(9), make_request(10)
    for request in (good, bad):
        overlapping.submit(request)
    overlapping.step()
    overlapping.step()
    overlapping.kv_cache.groups[0][:, :, bad.block_tables[0][0]] = torch.nan
    errors = []
    while overlapping.has_work():
        errors += [output for output in overlapping.step().outputs if output.error]
    assert [(output.request, output.finish_reason) for output in errors] == [(bad, FinishReason.ERROR)]
    assert [good.output_token_ids] == make_engine().run(make_request(9))


@pytest.mark.parametrize(
    "config", [{}, {"overlap": "on", "speculative": "ngram"}, {"overlap": "off", "cuda_graphs": "auto"}]
)
def test_steps_go_in_order_where_they_must(make_engine, config):
    assert make_engine(**config)._runner.flights is None
