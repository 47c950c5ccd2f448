"""Slabs against a plain model: a credit for each slab, in the order of the frames."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.actions import IncomingFrame
from kvtransfer.slab_ring import SlabRing
from tests.unit.kvtransfer.harness import ONE_CELL

NUM_SLABS = 3


class Slabs(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.ring = SlabRing(NUM_SLABS)
        self.credits = NUM_SLABS
        self.owned = []
        self.finished = set()
        self.num_taken = 0

    @precondition(lambda self: self.credits)
    @rule()
    def take(self):
        frame = IncomingFrame(
            number=self.ring.next_number,
            transfer_id=b"t",
            header=ONE_CELL,
            slab=self.ring.next_slab,
            payload_bytes=0,
            size_bytes=0,
        )
        # The sender, who counts its frames, knows the slab without being told; nobody else has it.
        assert frame.slab == self.num_taken % NUM_SLABS
        assert frame.slab not in {other.slab for other in self.owned}
        self.ring.take(frame)
        self.owned.append(frame)
        self.credits -= 1
        self.num_taken += 1

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data):
        frame = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        assert self.ring.owns(frame)
        self.credits += self.ring.release(frame)
        assert not self.ring.owns(frame)

    @invariant()
    def check(self):
        self.ring.check()
        assert self.ring.num_free == self.credits
        oldest = min((frame.number for frame in self.owned), default=self.num_taken)
        assert self.credits == NUM_SLABS - (self.num_taken - oldest)


TestSlabs = Slabs.TestCase
TestSlabs.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
