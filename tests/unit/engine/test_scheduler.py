import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from engine.block_keys import content_keys, no_keys
from engine.block_tables import BlockTables
from engine.policy import make_policy
from engine.request import Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from engine.swap_space import SwapSpace
from runtime.clock import ManualClock

BLOCK_SIZE = 4


class FakeMover:
    """Checks that every table has a block for each slot."""

    def store(self, block_tables, slots):
        assert [len(table) for table in block_tables] == [len(slots)] * 2

    def load(self, slots, block_tables):
        self.store(block_tables, slots)


def make_scheduler(
    num_blocks=16,
    max_num_seqs=8,
    budget=10,
    *,
    keys=no_keys,
    num_slots=0,
    policy=None,
    mode="auto",
    longest=0,
):
    tables = BlockTables(num_groups=2, num_blocks=num_blocks, block_size=BLOCK_SIZE, keys=keys)
    return Scheduler(
        tables,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        policy=policy,
        preemption=mode,
        swap_space=SwapSpace(tables, FakeMover(), num_slots=num_slots),
        longest=longest,
    )


def make_request(key, prompt_len, *, max_tokens=8, prefill_only=False, priority=0, granted=True):
    return Request(
        key=key,
        prompt_token_ids=[0] * prompt_len,
        sampling=SamplingParams(max_tokens=max_tokens),
        prefill_only=prefill_only,
        priority=priority,
        granted=granted,
    )


def step(scheduler, clock=None, seconds=0.0):
    """What the engine does, with token 0 for a model that takes so long."""
    plan = scheduler.schedule()
    if clock:
        clock.advance(seconds)
    scheduler.charge(plan)
    scheduler.take_preempted()
    for item in plan:
        request, samples = item.request, item.samples
        request.num_computed_tokens += item.query_len
        scheduler.tables.publish(request)
        if samples:
            if request.state is RequestState.PREFILLING and request.prefill_only:
                scheduler.hold(request)
            elif request.state is RequestState.PREFILLING:
                scheduler.start_decoding(request)
            request.output_token_ids.append(0)
            done = len(request.output_token_ids) >= request.sampling.max_tokens
            if done and request.state is RequestState.RUNNING:
                scheduler.finish(request)
    scheduler.check()
    return [(item.request.key, item.query_len) for item in plan]


def start(scheduler, request):
    """A running request with one output token, past the admission rule."""
    scheduler.submit(request)
    scheduler.prefill.remove(request)
    scheduler.tables.grow(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    request.move(RequestState.PREFILLING)
    scheduler.decode.start(request)
    request.output_token_ids.append(0)
    scheduler.check()


def test_decodes_go_first_and_chunks_share_the_rest_of_the_budget():
    scheduler = make_scheduler(budget=10)
    scheduler.submit(make_request("a", 6))
    scheduler.submit(make_request("b", 13))
    scheduler.submit(make_request("c", 2))
    assert step(scheduler) == [("a", 6), ("b", 4)]
    assert step(scheduler) == [("a", 1), ("b", 9)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 2)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_full_batch_of_decodes_leaves_a_token_for_prefill():
    scheduler = make_scheduler(max_num_seqs=8, budget=3, num_blocks=64)
    for key in range(5):
        scheduler.submit(make_request(key, 5, max_tokens=50))
    for _ in range(20):
        plan = step(scheduler)
        assert sum(query_len for _, query_len in plan) <= 3
    assert len(scheduler.decode.running) == 3
    assert len(scheduler.prefill.waiting) == 2


def test_growth_preempts_the_youngest_which_restarts_before_newer_ones():
    scheduler = make_scheduler(num_blocks=4, budget=100)
    for key, prompt_len in (("old", 4), ("mid", 2), ("young", 1)):
        start(scheduler, make_request(key, prompt_len))
    young = scheduler.live["young"]
    scheduler.submit(make_request("new", 16))
    assert step(scheduler) == [("old", 1), ("mid", 1), ("young", 1)]
    assert step(scheduler) == [("old", 1), ("mid", 1), ("young", 1)]
    # All blocks are in use and the middle one is full: the youngest makes room for it.
    assert step(scheduler) == [("old", 1), ("mid", 1)]
    assert [request.key for request in scheduler.prefill.waiting] == ["young", "new"]
    assert (young.num_computed_tokens, young.num_tokens) == (0, 4)
    while "young" not in dict(plan := step(scheduler)):
        assert plan
    # The middle one had to go too, for the old one; it is older, so it is back first. "new" still waits.
    assert plan == [("mid", 7), ("young", 4)]


def test_the_oldest_takes_the_block_of_the_youngest_not_of_the_next():
    scheduler = make_scheduler(num_blocks=3)
    for key, prompt_len in (("old", 3), ("mid", 1), ("young", 1)):
        start(scheduler, make_request(key, prompt_len))
    assert step(scheduler) == [("old", 1), ("mid", 1), ("young", 1)]
    assert step(scheduler) == [("old", 1), ("mid", 1)]
    assert [request.key for request in scheduler.prefill.waiting] == ["young"]


def test_reservations_are_never_preempted():
    scheduler = make_scheduler(num_blocks=4, budget=100)
    scheduler.submit(make_request("runs", 4))
    step(scheduler)
    reserved = make_request("reserved", 7)
    assert scheduler.reserve(reserved)
    table = [list(blocks) for blocks in reserved.block_tables]
    plans = [step(scheduler) for _ in range(6)]
    assert plans[-1] == []
    assert scheduler.live["runs"].state is RequestState.WAITING
    assert reserved.block_tables == table
    assert not scheduler.has_work()
    scheduler.finish(reserved)
    assert scheduler.has_work()


def test_admission_needs_a_growth_block_for_each_running_request():
    scheduler = make_scheduler(num_blocks=4, budget=100)
    scheduler.submit(make_request("runs", 3))
    step(scheduler)
    assert not scheduler.reserve(make_request("three", 12))
    assert scheduler.reserve(make_request("two", 8))
    assert not scheduler.reserve(make_request("one", 1))


def test_a_reservation_does_not_overtake_the_head_of_the_queue():
    scheduler = make_scheduler(num_blocks=4, budget=100)
    first = make_request("first", 8)
    assert scheduler.reserve(first)
    scheduler.submit(make_request("head", 12))
    assert step(scheduler) == []
    assert not scheduler.reserve(make_request("late", 1))
    scheduler.finish(first)
    assert step(scheduler) == [("head", 12)]


def test_seats_are_limited_over_all_active_states():
    scheduler = make_scheduler(max_num_seqs=2, num_blocks=64)
    assert scheduler.reserve(make_request("a", 1))
    scheduler.submit(make_request("b", 1))
    scheduler.submit(make_request("c", 1))
    assert step(scheduler) == [("b", 1)]
    assert not scheduler.reserve(make_request("d", 1))
    assert step(scheduler) == [("b", 1)]


@pytest.mark.skipif(not __debug__, reason="our asserts are off")
def test_a_key_is_live_once():
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", 1))
    with pytest.raises(AssertionError, match="live already"):
        scheduler.submit(make_request("a", 1))


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of operations keeps the invariants, and everything drains in the end."""

    BUDGET, SEATS = 6, 4
    keys = staticmethod(no_keys)

    @initialize(
        policy=st.sampled_from(["fcfs", "priority", "mlfq"]),
        mode=st.sampled_from(["auto", "swap", "recompute"]),
        num_slots=st.sampled_from([0, 3, 20]),
    )
    def start(self, policy, mode, num_slots):
        self.clock = ManualClock()
        self.scheduler = make_scheduler(
            num_blocks=8,
            max_num_seqs=self.SEATS,
            budget=self.BUDGET,
            keys=self.keys,
            num_slots=0 if mode == "recompute" else num_slots,
            policy=make_policy(policy, self.clock),
            mode=mode,
        )
        self.num_requests = 0

    def _request(self, prompt_len, max_tokens, prefill_only=False, priority=0):
        self.num_requests += 1
        return make_request(
            self.num_requests,
            prompt_len,
            max_tokens=min(max_tokens, 32 - prompt_len),
            prefill_only=prefill_only,
            priority=priority,
        )

    def _in_state(self, *states):
        return [request for request in self.scheduler.live.values() if request.state in states]

    def _step(self, seconds):
        running = set(self.scheduler.decode.running)
        plan = step(self.scheduler, self.clock, seconds)
        assert sum(query_len for _, query_len in plan) <= self.BUDGET
        assert len(plan) <= self.SEATS
        assert len({key for key, _ in plan}) == len(plan)
        if not self.scheduler.policy.pauses:
            still = {request.key for request in self.scheduler.decode.running if request in running}
            assert still <= {key for key, _ in plan}, "every decode goes before any prompt"
        return plan

    @rule(
        prompt_len=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        prefill_only=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def submit(self, prompt_len, max_tokens, prefill_only, priority):
        self.scheduler.submit(self._request(prompt_len, max_tokens, prefill_only, priority))

    @rule(prompt_len=st.integers(1, 30), max_tokens=st.integers(2, 20), priority=st.integers(-1, 1))
    def reserve(self, prompt_len, max_tokens, priority):
        self.scheduler.reserve(self._request(prompt_len, max_tokens, priority=priority))

    @rule(data=st.data(), commit=st.booleans())
    def end_transfer(self, data, commit):
        reserved = self._in_state(RequestState.RESERVED)
        if reserved:
            request = data.draw(st.sampled_from(reserved))
            if commit:
                self.scheduler.commit(request)
                request.output_token_ids.append(0)
            if not commit or len(request.output_token_ids) >= request.sampling.max_tokens:
                self.scheduler.finish(request)

    @rule(data=st.data())
    def abort(self, data):
        live = list(self.scheduler.live.values())
        if live:
            self.scheduler.finish(data.draw(st.sampled_from(live)))

    @rule(num_steps=st.integers(1, 4), seconds=st.sampled_from([0.0, 0.004, 0.03, 4.0]))
    def steps(self, num_steps, seconds):
        for _ in range(num_steps):
            has_work = self.scheduler.has_work()
            assert not self._step(seconds) or has_work

    @invariant()
    def holds(self):
        self.scheduler.check()

    def teardown(self):
        """Transfers end; then every request gets to its end within its own number of steps."""
        if not hasattr(self, "scheduler"):
            return
        for request in self._in_state(RequestState.RESERVED, RequestState.HELD):
            self.scheduler.finish(request)
        for _ in range(200 * self.num_requests):
            for request in self._in_state(RequestState.HELD):
                self.scheduler.finish(request)
            if not self.scheduler.live:
                break
            assert self._step(0.004), "deadlock"
        assert not self.scheduler.live
        assert self.scheduler.tables.num_used == 0
        assert self.scheduler.swap_space.num_used == 0


class CachingMachine(SchedulerMachine):
    """Every prompt starts like every other one, so that all blocks are shared that can be."""

    keys = staticmethod(content_keys(BLOCK_SIZE))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=40, stateful_step_count=20, derandomize=True, deadline=None, database=None
)


TestCachingScheduler = CachingMachine.TestCase
TestCachingScheduler.settings = TestScheduler.settings


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("machine", [SchedulerMachine, CachingMachine])
def test_long_random_schedules(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=2000, stateful_step_count=50, deadline=None, database=None),
    )
