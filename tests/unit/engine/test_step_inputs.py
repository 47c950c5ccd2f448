"""What a step reads: told bit by bit, it is what it would be written as a whole."""

import random
import weakref
from itertools import count

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from engine.batch import Span
from engine.block_table import BlockTable
from engine.drawing import Draw
from engine.request import Request, SamplingParams
from engine.step.inputs import INTEGERS, NO_SOURCE, StepInputs
from engine.step.row_order import RowOrder
from engine.step.shapes import StepShapes

BLOCK_SIZE, MAX_LEN, MAX_SEQS, WIDTH = 4, 48, 6, 3
SHAPES = StepShapes([1, 3, MAX_SEQS], [1, WIDTH])


def inputs(max_changes):
    return StepInputs(
        max_num_seqs=SHAPES.max_num_seqs,
        max_num_rows=SHAPES.max_num_rows,
        max_model_len=MAX_LEN,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
        max_changes=max_changes,
    )


def read(step_inputs, shape):
    """All that a step of the shape reads, its tables up to date."""
    views = step_inputs.views(shape)
    paged = views.attention().paged
    rows = {name: getattr(views, name).tolist() for name in INTEGERS}
    rows |= {name: values.tolist() for name, values in zip("tkpm", views.truncation, strict=True)}
    return rows, paged.cu_query_lens.tolist(), paged.context_lens.tolist(), paged.block_tables.tolist()


class Inputs(RuleBasedStateMachine):
    """Requests come, go, grow, and have their blocks exchanged or taken and given anew."""

    def __init__(self, max_changes=1000):
        super().__init__()
        self.inputs, self.order = inputs(max_changes), RowOrder()
        self.numbers, self.live = count(1), []

    def blocks(self, num_tokens):
        return [next(self.numbers) for _ in range(-(-num_tokens // BLOCK_SIZE))]

    @precondition(lambda self: len(self.live) < MAX_SEQS)
    @rule(length=st.integers(1, MAX_LEN - 12), seed=st.integers(0, 3), num_choices=st.integers(1, 2))
    def join(self, length, seed, num_choices):
        params = SamplingParams(max_tokens=9, seed=seed, temperature=seed / 2, top_k=seed, top_p=0.5)
        for choice in range(min(num_choices, MAX_SEQS - len(self.live))):
            request = Request(
                key=next(self.numbers), prompt_token_ids=[5] * length, sampling=params, choice=choice
            )
            request.block_tables = [BlockTable(self.blocks(length + WIDTH))]
            self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def end(self, which):
        del self.live[which % len(self.live)]

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9), column=st.integers(0, 99))
    def exchange(self, which, column):
        (table,) = self.live[which % len(self.live)].block_tables
        table.exchange(column % len(table), next(self.numbers))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9))
    def readmit(self, which):
        request = self.live[which % len(self.live)]
        request.block_tables = [BlockTable(self.blocks(request.num_tokens + WIDTH))]

    @precondition(lambda self: self.live)
    @rule(rng=st.randoms(use_true_random=False), ordered=st.booleans(), num_steps=st.integers(1, 5))
    def step(self, rng, ordered, num_steps):
        """Some requests, each in its row or, to make it hard, in any."""
        for _ in range(num_steps):
            chosen = rng.sample(self.live, rng.randint(1, len(self.live)))
            if ordered:
                chosen = [chosen[index] for index in self.order.arrange(chosen)]
            spans = [self.span(request, rng.randint(1, WIDTH)) for request in chosen]
            self.fill(rng, spans, chosen)

    def span(self, request, num_tokens):
        start = request.num_tokens - 1
        (table,) = request.block_tables
        table += self.blocks(start + WIDTH)[len(table) :]
        if request.num_tokens < MAX_LEN - WIDTH:
            request.output_token_ids.append(7)
        return Span(table=table, start=start, token_ids=[start + 3] * num_tokens)

    def fill(self, rng, spans, requests):
        shape = SHAPES.fit(len(spans), max(len(span.token_ids) for span in spans))
        sources = [rng.randint(NO_SOURCE, 3) for _ in range(sum(len(span.token_ids) for span in spans))]
        anew = inputs(1000)
        for each in (self.inputs, anew):
            each.fill(shape, spans, list(map(Draw.of, requests)), sources)
        told, whole = read(self.inputs, shape), read(anew, shape)
        self.inputs.check()
        assert told[1:3] == whole[1:3]
        for name, values in whole[0].items():
            num = len(requests) if name in ("seeds", "choices", *"tkpm") else shape.num_rows
            assert told[0][name][:num] == values[:num], name
        for span, row, wanted in zip(spans, told[3], whole[3], strict=False):
            num_blocks = -(-(span.start + len(span.token_ids)) // BLOCK_SIZE)
            assert row[:num_blocks] == wanted[:num_blocks] == span.table[:num_blocks]


@pytest.mark.parametrize("max_changes", [1, 7, 1000])
def test_any_mix_of_requests_is_read_as_if_it_were_written_as_a_whole(max_changes):
    run_state_machine_as_test(
        lambda: Inputs(max_changes),
        settings=settings(max_examples=25, stateful_step_count=25, deadline=None, phases=(Phase.generate,)),
    )


def test_what_has_not_changed_is_not_sent():
    machine, rng = Inputs(), random.Random(1)
    for _ in range(MAX_SEQS):
        machine.join(20, 1, 1)
    sent = []
    write = machine.inputs._write_changes
    machine.inputs._write_changes = lambda places, ids: (sent.append(len(places)), write(places, ids))
    for _ in range(8):
        machine.fill(rng, [machine.span(request, 1) for request in machine.live], machine.live)
    assert sent == [5 * MAX_SEQS, MAX_SEQS, 0, 0, 0, MAX_SEQS, 0, 0]
    machine.live[2].block_tables[0].exchange(0, 999)
    machine.fill(rng, [machine.span(request, 1) for request in machine.live], machine.live)
    assert sent[-1] == 7


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_dense_and_stay_when_others_go(seed):
    rng, order = random.Random(seed), RowOrder()
    everybody = [Request(key=n, prompt_token_ids=[3], sampling=None) for n in range(12)]
    before = []
    for _ in range(40):
        requests = rng.sample(everybody, rng.randint(0, 12))
        rows = order.arrange(requests)
        assert sorted(rows) == list(range(len(requests)))
        now = [requests[index] for index in rows]
        for row, request in enumerate(before[: len(now)]):
            assert now[row] is request or request not in requests
        before = now


def test_who_has_gone_is_forgotten():
    order, request = RowOrder(), Request(key=1, prompt_token_ids=[3], sampling=None)
    gone = weakref.ref(request)
    order.arrange([request])
    del request
    order.arrange([])
    assert gone() is None
