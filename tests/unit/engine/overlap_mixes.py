"""Requests of all kinds that come, go and are displaced while steps overlap."""

import random

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.choices import fan_out
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, RequestState, SamplingParams

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


class Alone:
    """The tokens of a request, by choice, from an engine that runs it alone and in order."""

    def __init__(self, model):
        self._engine = Engine(EngineConfig(**SIZE), model)
        self._known = {}

    def tokens(self, *spec, num_choices):
        if (spec, num_choices) not in self._known:
            request = build("alone", *spec, num_choices=num_choices)
            self._engine.submit(request)
            while self._engine.has_work():
                self._engine.step()
            outputs = [each.output_token_ids for each in request.forks or [request]]
            self._known[spec, num_choices] = outputs
        return self._known[spec, num_choices]


def machine_of(model, alone):
    """A state machine; `alone`: whose tokens are right."""

    class Overlapping(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.engine = Engine(
                EngineConfig(**SIZE, overlap="on", scheduling_policy="priority", swap_space_bytes=1 << 20),
                model,
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
                was_known = self.engine.abort(key)
                assert was_known

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
            expected = alone.tokens(*spec, num_choices=max(len(request.forks), 1))
            assert [self.told[key, choice] for choice in range(len(expected))] == expected

        @invariant()
        def blocks_are_accounted_for(self):
            self.engine.check()

        def teardown(self):
            while self.engine.has_work():
                self.take(self.engine.step())
                self.engine.check()
            assert not self.live
            load = self.engine.load()
            assert load.blocks_used == 0

    return Overlapping


def run_busily(machine, seed, num_rounds=60):
    """Such that the batch is full while requests come, go and are displaced."""
    rng = random.Random(seed)
    for _ in range(num_rounds):
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
