"""Schedules by hand: who goes first, who makes room, who is promoted."""

import pytest

from engine.block_tables import BlockTables
from engine.outputs import PreemptionMode
from engine.plan import Scheduled
from engine.policy import ByPriority, Fcfs, Mlfq
from engine.request import Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from engine.swap_space import SwapSpace
from runtime.clock import ManualClock


class NoCopies:
    def store(self, block_tables, slots):
        pass

    def load(self, slots, block_tables):
        pass


class Bench:
    """A scheduler over blocks of 4 tokens whose steps take as long as they are told to."""

    def __init__(self, policy, clock, *, num_blocks=64, max_num_seqs=8, budget=100, num_slots=100):
        tables = BlockTables(num_groups=1, num_blocks=num_blocks, block_size=4)
        self.clock = clock
        self.scheduler = Scheduler(
            tables,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            policy=policy,
            preemption="auto",
            swap_space=SwapSpace(tables, NoCopies(), num_slots=num_slots),
        )
        self.modes = []

    def submit(self, key, prompt_len, *, max_tokens=50, priority=0):
        request = Request(
            key=key,
            prompt_token_ids=[0] * prompt_len,
            sampling=SamplingParams(max_tokens=max_tokens),
            priority=priority,
        )
        self.scheduler.submit(request)
        return request

    def step(self, seconds=0.001):
        """Names of those that took part, in plan order, with their numbers of tokens."""
        plan = self.scheduler.schedule()
        self.clock.advance(seconds)
        self.scheduler.charge(plan)
        self.modes += [(item.request.key, item.mode) for item in self.scheduler.take_preempted()]
        for item in plan:
            request, samples = item.request, item.samples
            request.num_computed_tokens += item.query_len
            if samples and request.state is RequestState.PREFILLING:
                self.scheduler.start_decoding(request)
            if samples:
                request.output_token_ids.append(0)
                if len(request.output_token_ids) == request.sampling.max_tokens:
                    self.scheduler.finish(request)
        self.scheduler.check()
        return [(item.request.key, item.query_len) for item in plan]


@pytest.fixture
def clock():
    return ManualClock()


def test_larger_priority_goes_first_and_equals_in_order_of_arrival(clock):
    bench = Bench(ByPriority(), clock, max_num_seqs=1)
    for key, priority in (("a", 0), ("b", -1), ("c", 5), ("d", 0), ("e", 5)):
        bench.submit(key, 4, max_tokens=1, priority=priority)
    # With one output token each is gone after its prefill: the order is that of admission.
    for key in "ceadb":
        assert bench.step() == [(key, 4)]


def test_growth_preempts_the_lowest_priority_not_the_youngest(clock):
    bench = Bench(ByPriority(), clock, num_blocks=6)
    bench.submit("low", 3, priority=0)
    bench.step()
    bench.submit("high", 7, priority=2)
    bench.step()
    bench.submit("mid", 3, priority=1)
    while not bench.modes:
        bench.step()
    assert bench.modes == [("low", PreemptionMode.SWAP)]


def test_a_larger_priority_takes_the_seat_of_the_smallest(clock):
    bench = Bench(ByPriority(), clock, max_num_seqs=2)
    first, second = bench.submit("first", 3), bench.submit("second", 3)
    assert bench.step() == [("first", 3), ("second", 3)]
    bench.submit("equal", 3)
    assert bench.step() == [("first", 1), ("second", 1)]
    bench.submit("urgent", 3, priority=1)
    assert bench.step() == [("first", 1), ("urgent", 3)]
    assert (first.state, second.state) == (RequestState.RUNNING, RequestState.SWAPPED)
    # The swapped one came before "equal", so it is back first, where it stopped.
    bench.scheduler.finish(bench.scheduler.live["urgent"])
    assert bench.step() == [("first", 1), ("second", 1)]


def test_nobody_is_displaced_for_one_who_would_not_fit_anyway(clock):
    bench = Bench(ByPriority(), clock, num_blocks=8)
    bench.submit("low", 3)
    bench.step()
    reserved = Request(key="r", prompt_token_ids=[0] * 20, sampling=SamplingParams(max_tokens=5))
    assert bench.scheduler.reserve(reserved)
    bench.submit("high", 16, priority=1)
    assert bench.step() == [("low", 1)]
    assert not bench.modes


def test_under_fcfs_priority_is_nothing(clock):
    bench = Bench(Fcfs(), clock, max_num_seqs=1)
    bench.submit("a", 3)
    bench.step()
    bench.submit("b", 3, priority=9)
    assert bench.step() == [("a", 1)]


def mlfq_request(policy, key, num_prefill_tokens=0):
    request = Request(key=key, prompt_token_ids=[0], sampling=SamplingParams(max_tokens=99))
    policy.arrive(request, num_prefill_tokens)
    return request


def charge(policy, clock, seconds, *requests, query_len=1):
    policy.begin()
    clock.advance(seconds)
    return policy.charge([Scheduled(request, query_len) for request in requests], requests)


def test_a_prompt_skips_the_levels_that_it_would_use_up(clock):
    """Quanta are 10, 20, 40, 80 ms; the profile says 1 ms per token."""
    policy = Mlfq(clock)
    assert mlfq_request(policy, "unknown", 1000).rank[0] == 0
    charge(policy, clock, 0.05, mlfq_request(policy, "profile"), query_len=50)
    for num_tokens, level in ((0, 0), (9, 0), (11, 1), (20, 1), (39, 2), (79, 3), (81, 4)):
        assert mlfq_request(policy, num_tokens, num_tokens).rank[0] == level, num_tokens


def test_a_used_quantum_leads_to_the_front_of_the_next_level(clock):
    policy = Mlfq(clock)
    a, b = mlfq_request(policy, "a"), mlfq_request(policy, "b")
    assert not charge(policy, clock, 0.009, a, b), "the quantum of level 0 is 10 ms"
    assert a.rank < b.rank
    assert charge(policy, clock, 0.002, a)
    assert (a.rank[0], b.rank[0]) == (1, 0)
    assert charge(policy, clock, 0.002, b)
    assert b.rank < a.rank, "the later one goes before those that were there"
    assert not charge(policy, clock, 0.015, a)
    assert charge(policy, clock, 0.006, a), "20 ms on level 1, counted from its start"
    assert a.rank[0] == 2


def test_the_starving_are_promoted_the_longest_first(clock):
    policy = Mlfq(clock)
    busy, late, early = (mlfq_request(policy, key) for key in ("busy", "late", "early"))
    charge(policy, clock, 0.1, late, early)
    charge(policy, clock, 0.5, late)
    for _ in range(997):
        charge(policy, clock, 0.004, busy)
    assert late.rank[0] > 0
    assert early.rank[0] > 0
    policy.begin()
    assert policy.charge([], [busy, late, early])
    assert early.rank < late.rank < busy.rank
    assert (early.rank[0], late.rank[0]) == (0, 0)


def test_a_newcomer_pauses_the_most_served_when_seats_are_full(clock):
    bench = Bench(Mlfq(clock), clock, max_num_seqs=2)
    bench.submit("a", 3)
    bench.submit("b", 3)
    bench.step(0.001)
    bench.step(0.03)
    assert [request.rank[0] for request in bench.scheduler.decode.running] == [1, 1]
    bench.submit("new", 3)
    assert bench.step(0.001) == [("a", 1), ("new", 3)]
    assert bench.scheduler.live["b"].state is RequestState.RUNNING, "paused, with its blocks"
    assert bench.step(0.001) == [("new", 1), ("a", 1)]
    bench.scheduler.finish(bench.scheduler.live["new"])
    assert bench.step(0.001) == [("a", 1), ("b", 1)]
    assert not bench.modes


def test_paused_requests_are_swapped_before_growth_needs_their_blocks(clock):
    bench = Bench(Mlfq(clock), clock, max_num_seqs=1, num_blocks=6)
    paused = bench.submit("paused", 7)
    bench.step(0.001)
    bench.step(0.03)
    bench.submit("new", 7)
    while paused.state is RequestState.RUNNING:
        bench.step(0.0)
    assert bench.modes == [("paused", PreemptionMode.SWAP)]
    assert bench.scheduler.tables.num_free >= 1, "a block was free still: nobody had to wait for the copy"


def test_prompts_wait_while_host_memory_is_crowded(clock):
    """Two of the two slots are in use: whoever starts now could not be swapped."""
    bench = Bench(Mlfq(clock), clock, num_blocks=8, num_slots=2)
    bench.submit("a", 6)
    bench.step(0.0)
    bench.step(0.03)
    bench.submit("b", 24)
    bench.step(0.0)
    assert bench.modes == [("a", PreemptionMode.SWAP)]
    bench.submit("c", 1)
    assert bench.step(0.0) == [("b", 1)]
    bench.scheduler.finish(bench.scheduler.live["b"])
    assert bench.step(0.0)[0] == ("a", 1)
