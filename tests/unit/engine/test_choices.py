"""Several choices of one prompt, and beams: alone, split over two engines, preempted, migrated."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.beam_search import BeamParams
from engine.block_tables import BlockTables
from engine.choices import fan_out, select_blocks, share_blocks
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.sampler import Sample
from kernels import ops
from runtime.errors import InvalidRequest


def run(engine, *requests):
    """Submit and run to the end; output tokens by key and choice."""
    for request in requests:
        engine.submit(request)
    return finish(engine)


def finish(engine):
    tokens = {}
    while engine.has_work():
        for output in engine.step().outputs:
            known = tokens.setdefault((output.request.key, output.choice), [])
            assert output.error is None
            known += output.token_ids
    assert engine.load().blocks_used == 0
    assert not engine._scheduler.live
    return tokens


def spy(owner, name):
    """The arguments of all calls from now on."""
    calls, method = [], getattr(owner, name)
    setattr(owner, name, lambda argument: (calls.append(argument), method(argument)))
    return calls


def with_choices(request, *choices, emitted=None):
    fan_out(request, {choice: (emitted or {}).get(choice, ()) for choice in choices})
    return request


def lone(make_engine, make_request, prompt_len, choices, **sampling):
    """Each choice as a request of its own, on an engine of its own."""
    return {
        (prompt_len, choice): make_engine().run(make_request(prompt_len, choice=choice, **sampling))[0]
        for choice in choices
    }


@pytest.mark.parametrize("prompt_len", [1, 4, 7, 18])
def test_choices_draw_what_they_draw_alone(make_engine, make_request, prompt_len):
    want = lone(make_engine, make_request, prompt_len, range(4))
    assert len(set(map(tuple, want.values()))) == 4
    engine = make_engine()
    assert run(engine, with_choices(make_request(prompt_len), 0, 1, 2, 3)) == want


def test_greedy_choices_are_equal(make_engine, make_request):
    tokens = run(make_engine(), with_choices(make_request(9, temperature=0), 0, 1, 2))
    assert len(tokens) == 3
    assert len(set(map(tuple, tokens.values()))) == 1


def test_a_prompt_is_computed_and_held_once(make_engine, make_request):
    engine = make_engine()
    request = with_choices(make_request(18), 0, 1, 2, 3)
    engine.submit(request)
    assert [output.choice for output in engine.step().outputs] == [0, 1, 2, 3]
    assert request.state is RequestState.FORKED
    assert engine.load().blocks_used == 5
    engine.step()
    # Four full blocks are shared; the partial one was copied for all but its last writer.
    assert engine.load().blocks_used == 4 + 4
    assert engine.load().requests_running == 4


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preempted_choices_draw_the_same(make_engine, make_request, mode):
    sampling = {"max_tokens": 28}
    want = lone(make_engine, make_request, 9, range(3), **sampling) | lone(
        make_engine, make_request, 14, range(2), **sampling
    )
    requests = [
        with_choices(make_request(9, **sampling), 0, 1, 2),
        with_choices(make_request(14, **sampling), 0, 1),
    ]
    engine = make_engine(num_blocks=24, preemption_mode=mode)
    preempted = spy(engine._scheduler, "_displace")
    assert run(engine, *requests) == want
    assert preempted
    assert all(fork.leader in requests for fork in preempted)


@pytest.mark.parametrize("num_blocks", [64, 24])
def test_migrated_choices_go_on_behind_what_they_have(make_engine, make_request, num_blocks):
    sampling = {"max_tokens": 30}
    want = lone(make_engine, make_request, 9, range(4), **sampling)
    emitted = {0: want[9, 0][:1], 2: want[9, 2][:17], 3: ()}
    engine = make_engine(num_blocks=num_blocks)
    others = make_request(30, max_tokens=20)
    engine.submit(others)
    tokens = run(engine, with_choices(make_request(9, **sampling), 0, 2, 3, emitted=emitted))
    del tokens[30, 0]
    assert {choice: [*emitted[choice], *new] for (_, choice), new in tokens.items()} == {
        choice: want[9, choice] for choice in (0, 2, 3)
    }


def test_a_choice_that_ends_leaves_the_others(make_engine, make_request):
    want = lone(make_engine, make_request, 9, range(3))
    stop = want[9, 1][2]
    request = with_choices(make_request(9, stop_token_ids=(stop,)), 0, 1, 2)
    tokens = run(make_engine(), request)

    def cut(choice):
        whole = want[9, choice]
        return whole[: whole.index(stop) + 1] if stop in whole else whole

    assert tokens == {(9, choice): cut(choice) for choice in range(3)}


def test_one_choice_is_ended_from_outside(make_engine, make_request):
    want = lone(make_engine, make_request, 9, range(3))
    engine = make_engine()
    engine.submit(with_choices(make_request(9), 0, 1, 2))
    engine.abort_choice(9, 1)
    outputs = engine.step().outputs
    engine.abort_choice(9, 1)
    engine.abort_choice(9, 1)
    engine.check()
    tokens = {output.choice: list(output.token_ids) for output in outputs}
    for (_, choice), more in finish(engine).items():
        tokens[choice] += more
    assert tokens == {0: want[9, 0], 1: want[9, 1][:1], 2: want[9, 2]}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_abort_ends_all_choices(make_engine, make_request, steps):
    engine = make_engine()
    engine.submit(with_choices(make_request(9), 0, 1, 2))
    for _ in range(steps):
        engine.step()
    assert engine.abort(9)
    assert engine.load().blocks_used == 0
    assert not engine.has_work()
    assert not engine.abort(9)


def transfer(source, target, request, reserved):
    slab = torch.empty(1 << 16, dtype=torch.uint8)
    (ours,), (theirs,) = request.block_tables, reserved.block_tables
    for layer in range(2):
        ops.gather_blocks(source.kv_cache.groups[0], ours, layer, 1, slab)
        ops.scatter_blocks(target.kv_cache.groups[0], theirs, layer, 1, slab)


def hand_over(make_engine, make_leader):
    """What two workers do with one request; all tokens by key and choice, and the decode engine."""
    prefill, decode = make_engine(), make_engine()
    request, reserved = make_leader(), make_leader()
    request.prefill_only = True
    prefill.submit(request)
    assert decode.reserve(reserved)
    outputs = prefill.step().outputs
    transfer(prefill, decode, request, reserved)
    prefill.release(request.key)
    assert prefill.load().blocks_used == 0
    firsts = {
        output.choice: Sample(output.token_ids[0], output.logprobs[0] if output.logprobs else None)
        for output in outputs
    }
    tokens = {}
    for output in decode.commit_choices(reserved, firsts):
        tokens[output.request.key, output.choice] = list(output.token_ids)
    for key, new in finish(decode).items():
        tokens[key] = tokens.get(key, []) + new
    return tokens


def test_split_choices_are_those_of_one_engine(make_engine, make_request):
    want = lone(make_engine, make_request, 18, range(3))
    assert hand_over(make_engine, lambda: with_choices(make_request(18), 0, 1, 2)) == want


def test_split_migrated_choices_go_on(make_engine, make_request):
    want = lone(make_engine, make_request, 18, range(3))
    for num_emitted in (0, 7):
        emitted = {1: want[18, 1][:5], 2: want[18, 2][:num_emitted]}

        def leader(emitted=emitted):
            return with_choices(make_request(18), 1, 2, emitted=emitted)

        tokens = hand_over(make_engine, leader)
        assert {choice: emitted[choice] + new for (_, choice), new in tokens.items()} == {
            1: want[18, 1],
            2: want[18, 2],
        }


def test_choices_that_never_fit_into_a_batch_are_refused(make_engine, make_request):
    engine = make_engine(max_num_seqs=3)
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(with_choices(make_request(5), *range(4)))
    assert caught.value.field == "n"
    run(engine, with_choices(make_request(5), *range(3)), with_choices(make_request(6), *range(2)))


def beams(engine, *requests):
    """Submit and run to the end; the returned beams of each request as (score, tokens), best first."""
    for request in requests:
        engine.submit(request)
    return finish_beams(engine)


def finish_beams(engine):
    found = {}
    while engine.has_work():
        for output in engine.step().outputs:
            found.setdefault(output.request.key, []).append(output)
    assert engine.load().blocks_used == 0
    found = {key: outputs for key, outputs in found.items() if outputs[0].score is not None}
    for outputs in found.values():
        assert [output.choice for output in outputs] == list(range(len(outputs)))
    return {key: [(output.score, output.token_ids) for output in outputs] for key, outputs in found.items()}


BEAMS = {"beams": BeamParams(width=4, num_returned=3), "temperature": 0}


def test_beams_hold_their_common_blocks_once(make_engine, make_request):
    engine = make_engine()
    engine.submit(make_request(17, **BEAMS))
    engine.step()
    for _ in range(10):
        engine.step()
    # 27 or 28 tokens each; without sharing 28 blocks.
    assert engine.load().blocks_used < 4 + 4 * 3


def test_beams_are_the_same_after_preemption(make_engine, make_request):
    sampling = BEAMS | {"max_tokens": 30}
    lens = (9, 14)
    alone = {key: beams(make_engine(), make_request(key, **sampling))[key] for key in lens}
    assert all(len(found) == 3 and found == sorted(found, reverse=True) for found in alone.values())
    engine = make_engine(num_blocks=36)
    starts = spy(engine._scheduler, "start_over")
    found = beams(engine, make_request(30, max_tokens=50), *(make_request(key, **sampling) for key in lens))
    assert found == alone
    assert starts


def test_split_beams_are_those_of_one_engine(make_engine, make_request):
    alone = run(make_engine(), make_request(9, **BEAMS))
    assert len(alone) == 3
    assert hand_over(make_engine, lambda: make_request(9, **BEAMS)) == {
        key: list(tokens) for key, tokens in alone.items()
    }


def test_beams_report_logprobs_that_sum_to_their_score(make_engine, make_request):
    engine = make_engine()
    engine.submit(make_request(9, logprobs=2, **BEAMS))
    outputs = []
    while engine.has_work():
        outputs += engine.step().outputs
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH] * 3
    for output in outputs:
        assert [len(each.top) for each in output.logprobs] == [2] * 12
        assert output.score == pytest.approx(sum(each.logprob for each in output.logprobs) / 12, rel=1e-5)


def test_beams_that_never_fit_into_the_pool_are_refused(make_engine, make_request):
    with pytest.raises(InvalidRequest) as caught:
        make_engine(num_blocks=24).submit(make_request(9, **BEAMS, max_tokens=60))
    assert caught.value.field == "max_tokens"


def test_an_abort_ends_all_beams(make_engine, make_request):
    for steps in range(4):
        engine = make_engine()
        engine.submit(make_request(9, **BEAMS))
        for _ in range(steps):
            engine.step()
        assert engine.abort(9)
        assert engine.load().blocks_used == 0
        assert not engine.has_work()


class SharedBlocks(RuleBasedStateMachine):
    """Requests fork, take over each other's blocks, write and go. Memory is two dicts of tokens by slot."""

    def __init__(self):
        super().__init__()
        self.memory = [{}, {}]
        self.tables = BlockTables(num_groups=2, num_blocks=24, block_size=4, copy_blocks=self.copy)
        self.requests = []
        self.number = 0

    def copy(self, group, sources, targets):
        assert len({*sources, *targets}) >= len(targets)
        for source, target in zip(sources, targets, strict=True):
            for offset in range(4):
                self.memory[group][target, offset] = self.memory[group].get((source, offset))

    def new(self):
        params = SamplingParams(max_tokens=100)
        return Request(key=len(self.requests), prompt_token_ids=[], sampling=params)

    def can_grow(self, request, num_tokens):
        return self.tables.missing(request, num_tokens) <= self.tables.num_free

    @rule(num_tokens=st.integers(1, 9))
    def begin(self, num_tokens):
        request = self.new()
        if self.can_grow(request, num_tokens):
            self.requests.append(request)
            self.write_to(request, num_tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fork(self, data):
        source, target = data.draw(st.sampled_from(self.requests)), self.new()
        share_blocks(self.tables, source, target)
        target.prompt_token_ids = list(source.prompt_token_ids)
        self.requests.append(target)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num_tokens=st.integers(1, 6))
    def write(self, data, num_tokens):
        writers = data.draw(st.lists(st.sampled_from(self.requests), min_size=1, max_size=4, unique_by=id))
        grown = []
        for request in writers:
            if self.can_grow(request, request.num_tokens + num_tokens):
                self.tables.grow(request, request.num_tokens + num_tokens)
                grown.append(request)
        self.tables.run_copies()
        for request in grown:
            self.write_slots(request, num_tokens)

    def write_to(self, request, num_tokens):
        self.tables.grow(request, num_tokens)
        self.write_slots(request, num_tokens)

    def write_slots(self, request, num_tokens):
        for position in range(request.num_tokens, request.num_tokens + num_tokens):
            self.number += 1
            request.prompt_token_ids.append(self.number)
            for pool, memory, table in zip(self.tables.pools, self.memory, request.block_tables, strict=True):
                assert pool.ref_count(table[position // 4]) == 1, "a shared block is written"
                memory[table[position // 4], position % 4] = self.number
        request.num_computed_tokens = request.num_tokens

    @precondition(lambda self: len(self.requests) > 1)
    @rule(data=st.data())
    def reselect(self, data):
        beams = data.draw(st.lists(st.sampled_from(self.requests), min_size=2, max_size=4, unique_by=id))
        equal = [beam for beam in beams if beam.num_tokens == beams[0].num_tokens]
        sources = data.draw(
            st.lists(st.integers(0, len(equal) - 1), min_size=len(equal), max_size=len(equal))
        )
        select_blocks(self.tables, equal, sources)
        contents = [list(equal[source].prompt_token_ids) for source in sources]
        for beam, content in zip(equal, contents, strict=True):
            beam.prompt_token_ids = content

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def free(self, data):
        index = data.draw(st.integers(0, len(self.requests) - 1))
        self.tables.free(self.requests.pop(index))

    @invariant()
    def everyone_reads_what_they_wrote(self):
        self.tables.check(self.requests)
        for request in self.requests:
            for memory, table in zip(self.memory, request.block_tables, strict=True):
                read = [memory[table[i // 4], i % 4] for i in range(request.num_tokens)]
                assert read == request.prompt_token_ids


TestSharedBlocks = SharedBlocks.TestCase
TestSharedBlocks.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
