"""A prefill worker's blocks and those of its receivers: neither waits for the other in a circle."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.policy import make_policy
from engine.request import Request
from engine.scheduler import Scheduler
from tests.unit.engine.test_scheduler import BLOCK_SIZE, make_request, make_scheduler, step

LONGEST = 4 * BLOCK_SIZE


def prompt(key, num_blocks, *, granted=False, priority=0):
    return make_request(
        key, num_blocks * BLOCK_SIZE, max_tokens=1, prefill_only=True, granted=granted, priority=priority
    )


def test_what_is_not_granted_leaves_room_for_a_longest_request():
    scheduler = make_scheduler(num_blocks=10, budget=100, longest=LONGEST)
    for key in range(4):
        scheduler.submit(prompt(key, 2))
    assert [key for key, _ in step(scheduler)] == [0, 1, 2]
    assert not scheduler.has_work()


def test_a_granted_request_passes_those_that_are_not():
    scheduler = make_scheduler(num_blocks=10, budget=100, longest=LONGEST)
    for key in range(3):
        scheduler.submit(prompt(key, 2))
    step(scheduler)
    scheduler.submit(prompt(3, 2))
    scheduler.submit(prompt(4, 4))
    scheduler.live[4].granted = True
    assert scheduler.has_work()
    assert [key for key, _ in step(scheduler)] == [4]
    scheduler.live[0].granted = True
    scheduler.finish(scheduler.live[0])
    assert not scheduler.has_work(), "2 of 10 blocks are free"
    scheduler.live[3].granted = True
    assert [key for key, _ in step(scheduler)] == [3]


def test_a_pool_of_one_longest_request_computes_what_is_granted():
    scheduler = make_scheduler(num_blocks=4, budget=100, longest=LONGEST)
    request = prompt(0, 1)
    scheduler.submit(request)
    assert not scheduler.has_work()
    request.granted = True
    assert [key for key, _ in step(scheduler)] == [0]


@dataclass
class Pair:
    """A prefill worker and a decode worker; requests come to each in an order of its own."""

    sender: Scheduler
    receiver: Scheduler
    reserving: list[Request] = field(default_factory=list)

    def advance(self) -> bool:
        """Reserve, compute, transfer, decode, each as far as it goes; whether anything happened."""
        moved = self._reserve()
        moved |= bool(self.sender.has_work() and step(self.sender))
        moved |= self._transfer()
        return bool(self.receiver.has_work() and step(self.receiver)) or moved

    def _reserve(self) -> bool:
        moved = False
        self.reserving.sort(key=lambda request: request.rank)
        while self.reserving and self.receiver.reserve(self.reserving[0]):
            self.reserving.pop(0)
            moved = True
        for key in self.receiver.live.keys() & self.sender.live.keys():
            self.sender.live[key].granted = True
        return moved

    def _transfer(self) -> bool:
        done = [each for each in self.sender.live.values() if each.granted and each.output_token_ids]
        for request in done:
            self.sender.finish(request)
            self.receiver.commit(self.receiver.live[request.key])
        return bool(done)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3 * BLOCK_SIZE), st.integers(0, 2)), min_size=1, max_size=12),
    rooms=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    policy=st.sampled_from(["fcfs", "priority"]),
    data=st.data(),
)
def test_every_request_ends(sizes, rooms, policy, data):
    pair = Pair(
        *(make_scheduler(num_blocks=room, policy=make_policy(policy), longest=LONGEST) for room in rooms)
    )
    for key in data.draw(st.permutations(range(len(sizes)))):
        request = make_request(key, sizes[key][0], max_tokens=4, priority=sizes[key][1])
        pair.receiver.enter(request, 0)
        pair.reserving.append(request)
    for key in data.draw(st.permutations(range(len(sizes)))):
        request = make_request(
            key, sizes[key][0], max_tokens=1, prefill_only=True, granted=False, priority=sizes[key][1]
        )
        pair.sender.submit(request)
        if data.draw(st.booleans()):
            pair.advance()
    while pair.advance():
        pass
    assert not pair.sender.live
    assert not pair.receiver.live
    assert not pair.reserving
