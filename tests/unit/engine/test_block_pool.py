import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.block_pool import BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """Against a model: a list of block lists, one per user."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(8)
        self.users: list[list[int]] = []

    @rule(num_blocks=st.integers(0, 8))
    def allocate(self, num_blocks):
        if num_blocks <= self.pool.num_free:
            taken = self.pool.allocate(num_blocks)
            assert len(set(taken)) == num_blocks
            assert not set(taken) & {block_id for user in self.users for block_id in user}
            self.users.append(taken)

    @rule(data=st.data())
    def share(self, data):
        if self.users:
            user = data.draw(st.sampled_from(self.users))
            self.pool.share(user)
            self.users.append(list(user))

    @rule(data=st.data())
    def free(self, data):
        if self.users:
            self.pool.free(self.users.pop(data.draw(st.integers(0, len(self.users) - 1))))

    @invariant()
    def agrees_with_the_model(self):
        self.pool.check()
        held = [block_id for user in self.users for block_id in user]
        assert self.pool.num_used == len(set(held))
        assert all(self.pool.ref_count(block_id) == held.count(block_id) for block_id in range(8))


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(
    max_examples=15, stateful_step_count=12, derandomize=True, deadline=None, database=None
)


@pytest.mark.skipif(not __debug__, reason="our asserts are off")
def test_misuse_is_caught():
    pool = BlockPool(2)
    taken = pool.allocate(2)
    with pytest.raises(AssertionError, match="free blocks"):
        pool.allocate(1)
    pool.free(taken)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(taken)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(taken)
