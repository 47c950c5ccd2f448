"""Any interleaving of what two services, two control queues, a wire and an engine thread may do.

Hypothesis draws some transfers, each with a program per side, and the order in which the actors take turns;
the links are checked after every turn.
"""

from dataclasses import dataclass

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kvtransfer.layout import num_blocks_of
from kvtransfer.messages import FirstToken
from kvtransfer.states import TransferState
from runtime.errors import Cancelled
from tests.unit.kvtransfer.harness import FACTS, TOKEN, Harness

FINISHED = (FirstToken(choice=0, token_id=7, finish_reason="stop"),)


@dataclass(frozen=True)
class Plan:
    """One transfer: its size, how it is cut, and who disturbs it when (a number of own turns)."""

    num_tokens: int
    cached_blocks: int
    chunks: tuple[int, ...]
    finished: bool
    sender_cancels_at: int | None
    receiver_cancels_at: int | None

    @property
    def num_blocks(self) -> int:
        return num_blocks_of(self.num_tokens, FACTS.block_size)

    @property
    def num_cached_tokens(self) -> int:
        return min(self.cached_blocks, self.num_tokens // FACTS.block_size) * FACTS.block_size

    @property
    def disturbed(self) -> bool:
        return self.sender_cancels_at is not None or self.receiver_cancels_at is not None


PLANS = st.builds(
    Plan,
    num_tokens=st.integers(1, 9),
    cached_blocks=st.integers(0, 3),
    chunks=st.lists(st.integers(1, 3), max_size=4).map(tuple),
    finished=st.sampled_from([False, False, False, True]),
    sender_cancels_at=st.none() | st.none() | st.integers(0, 8),
    receiver_cancels_at=st.none() | st.none() | st.integers(0, 12),
)


class Run:
    """Programs of all transfers around one pair of links."""

    def __init__(self, plans):
        self.harness = Harness()
        self.plans = {bytes([index]): plan for index, plan in enumerate(plans)}
        self.frozen = {}
        programs = [self.sender_program(i, p) for i, p in self.plans.items()]
        programs += [self.receiver_program(i, p) for i, p in self.plans.items()]
        self.actors = [lambda p=p: next(p, "end") != "end" for p in programs]
        self.actors += [lambda name=name: self.harness.step(name) for name in Harness.STEPS]

    def sender_program(self, transfer_id, plan):
        """Offer, enqueue chunk by chunk, commit; a cancel may cut in before any of them."""
        steps = [lambda: self.harness.offer(transfer_id, plan.num_tokens)]
        done = 0
        for size in (*plan.chunks, plan.num_blocks):
            count = min(size, plan.num_blocks - done)
            steps.append(lambda first=done, count=count: self.harness.enqueue(transfer_id, first, count))
            done += count
        if plan.finished:
            steps.pop()
        steps.append(lambda: self.harness.commit(transfer_id, FINISHED if plan.finished else TOKEN))
        if plan.sender_cancels_at is not None:
            cancel = lambda: self.harness.sender_does(self.harness.sender.cancel(transfer_id))  # noqa: E731
            steps.insert(plan.sender_cancels_at, cancel)
        for step in steps:
            try:
                yield step()
            except Cancelled:
                assert self.harness.sender.state_of(transfer_id) is TransferState.ABORTED

    def receiver_program(self, transfer_id, plan):
        """Reserve; a cancel may come before, or any number of turns later."""
        for turn in range(14):
            if turn == plan.receiver_cancels_at:
                yield self.harness.receiver_does(self.harness.receiver.cancel(transfer_id))
            elif turn == 1:
                try:
                    yield self.harness.reserve(transfer_id, plan.num_tokens, plan.num_cached_tokens)
                except Cancelled:
                    assert self.harness.receiver.state_of(transfer_id) is TransferState.ABORTED
            else:
                yield None

    def turn(self, actor):
        moved = actor()
        self.harness.check()
        for transfer_id in self.plans:
            if self.harness.receiver.state_of(transfer_id) is TransferState.ABORTED:
                content = dict(self.harness.pool.get(transfer_id, {}))
                assert self.frozen.setdefault(transfer_id, content) == content
        return moved

    def finish(self):
        while sum(bool(self.turn(actor)) for actor in self.actors):
            pass


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    plans=st.lists(PLANS, min_size=1, max_size=4),
    turns=st.lists(st.integers(0, 13), max_size=120),
    corrupt_at=st.none() | st.integers(0, 120),
)
def test_every_transfer_arrives_whole_or_leaves_the_pool_alone(plans, turns, corrupt_at):
    run = Run(plans)
    for number, turn in enumerate(turns):
        run.harness.corrupt_next |= number == corrupt_at
        run.turn(run.actors[turn % len(run.actors)])
    run.finish()
    harness = run.harness
    harness.require_quiet()
    acknowledged = harness.committed(harness.sender_events)
    damaged = harness.receiver.statistics().checksum_errors
    lost = 0
    for transfer_id, plan in run.plans.items():
        ended = harness.receiver.state_of(transfer_id)
        if ended is TransferState.COMMITTED and not plan.finished:
            harness.require_arrived(transfer_id, plan.num_tokens, plan.num_cached_tokens)
        if transfer_id in acknowledged:
            assert ended is TransferState.COMMITTED
        elif not plan.disturbed:
            lost += 1
    assert lost <= damaged
    assert len(acknowledged) == len(set(acknowledged))
    event(f"arrived {len(acknowledged)}")
    event(f"damaged {damaged}")
    event(f"dropped {bool(harness.receiver.statistics().dropped_frames)}")
