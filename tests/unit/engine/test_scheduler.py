import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.block_keys import content_keys, no_keys
from engine.block_tables import BlockTables
from engine.request import Request, RequestState, SamplingParams
from engine.scheduler import Scheduler

BLOCK_SIZE = 4


def make_scheduler(num_blocks=16, max_num_seqs=8, budget=10, keys=no_keys):
    tables = BlockTables(num_groups=2, num_blocks=num_blocks, block_size=BLOCK_SIZE, keys=keys)
    return Scheduler(tables, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


def make_request(key, prompt_len, *, max_tokens=8, prefill_only=False):
    return Request(
        key=key,
        prompt_token_ids=[0] * prompt_len,
        sampling=SamplingParams(max_tokens=max_tokens),
        prefill_only=prefill_only,
    )


def step(scheduler):
    """What the engine does, with token 0 for a model."""
    plan = scheduler.schedule()
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


def test_a_key_is_live_once():
    scheduler = make_scheduler()
    scheduler.submit(make_request("a", 1))
    with pytest.raises(AssertionError, match="live already"):
        scheduler.submit(make_request("a", 1))


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of operations keeps the invariants, and everything drains in the end."""

    keys = staticmethod(no_keys)

    def __init__(self):
        super().__init__()
        self.scheduler = make_scheduler(num_blocks=8, max_num_seqs=4, budget=6, keys=self.keys)
        self.num_requests = 0

    def _request(self, prompt_len, max_tokens, prefill_only=False):
        self.num_requests += 1
        return make_request(
            self.num_requests,
            prompt_len,
            max_tokens=min(max_tokens, 32 - prompt_len),
            prefill_only=prefill_only,
        )

    def _in_state(self, *states):
        return [request for request in self.scheduler.live.values() if request.state in states]

    @rule(prompt_len=st.integers(1, 30), max_tokens=st.integers(1, 20), prefill_only=st.booleans())
    def submit(self, prompt_len, max_tokens, prefill_only):
        self.scheduler.submit(self._request(prompt_len, max_tokens, prefill_only))

    @rule(prompt_len=st.integers(1, 30), max_tokens=st.integers(2, 20))
    def reserve(self, prompt_len, max_tokens):
        self.scheduler.reserve(self._request(prompt_len, max_tokens))

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

    @rule(num_steps=st.integers(1, 4))
    def steps(self, num_steps):
        for _ in range(num_steps):
            has_work = self.scheduler.has_work()
            assert not step(self.scheduler) or has_work

    @invariant()
    def holds(self):
        self.scheduler.check()

    def teardown(self):
        """Transfers end; then every request gets to its end within its own number of steps."""
        for request in self._in_state(RequestState.RESERVED, RequestState.HELD):
            self.scheduler.finish(request)
        for _ in range(200 * self.num_requests):
            for request in self._in_state(RequestState.HELD):
                self.scheduler.finish(request)
            if not self.scheduler.live:
                break
            assert step(self.scheduler), "deadlock"
        assert not self.scheduler.live
        assert self.scheduler.tables.num_used == 0


class CachingMachine(SchedulerMachine):
    """Every prompt starts like every other one, so that all blocks are shared that can be."""

    keys = staticmethod(content_keys(BLOCK_SIZE))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=20, stateful_step_count=20, derandomize=True, deadline=None, database=None
)

TestCachingScheduler = CachingMachine.TestCase
TestCachingScheduler.settings = TestScheduler.settings
