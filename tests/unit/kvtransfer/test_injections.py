"""10,000 faults put between sender and receiver: each is counted by kind, none is an assert or a stale byte.

One injection disturbs one link that carries two transfers, at a random moment. It must show in exactly the
receiver's counters or as a violation, which retires the epoch; whatever commits holds the sender's bytes.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvtransfer.errors import LinkViolation
from kvtransfer.messages import Cancel, Commit, FrameHeader, Offer
from tests.unit.kvtransfer.harness import WELCOME, Harness

NUM_INJECTIONS = 10_000
NUM_TOKENS = {b"a": 5, b"b": 6}
MAX_STEPS = 40

Inject = Callable[["Link", random.Random], bool]


class Link(Harness):
    """A harness that remembers what passed, and whose next payload can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []
        self.change_next: Callable[[bytes], bytes] | None = None
        self.payloads: list[bytes] = []
        for transfer_id, num_tokens in NUM_TOKENS.items():
            self.offer(transfer_id, num_tokens)
            self.reserve(transfer_id, num_tokens)
            self.enqueue(transfer_id, 0, (num_tokens + 1) // 2)
            self.commit(transfer_id)

    def step_to_receiver(self) -> bool:
        if self.to_receiver:
            self.seen.append(self.to_receiver[0])
        return super().step_to_receiver()

    def step_receive(self) -> bool:
        if self.posted and self.wire:
            self.payloads.append(self.wire[0][: self.posted[0].payload_bytes])
            if self.change_next is not None:
                changed = self.change_next(self.wire[0])
                self.wire[0], self.change_next = changed.ljust(len(self.wire[0]), b"\xff"), None
        return super().step_receive()

    def advance(self, rng: random.Random, count: int) -> None:
        """So many random steps."""
        for _ in range(count):
            getattr(self, f"step_{rng.choice(self.STEPS)}")()

    def inject(self, message: object) -> bool:
        """Put a message that the sender never sent here into its stream."""
        self.to_receiver.appendleft(message)
        return True

    def headers(self) -> list[FrameHeader]:
        """Those that the receiver has taken."""
        return [message for message in self.seen if isinstance(message, FrameHeader)]


def _live_frame_next(link: Link) -> bool:
    """Whether the next bytes on the wire will be looked at."""
    if not (link.posted and link.wire):
        return False
    return link.receiver.may_scatter(link.posted[0])


def corrupted(link: Link, rng: random.Random) -> bool:
    if not _live_frame_next(link):
        return False
    at, bit = rng.randrange(link.posted[0].payload_bytes), 1 << rng.randrange(8)
    link.change_next = lambda data: data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    return True


def truncated(link: Link, rng: random.Random) -> bool:
    """The slab keeps what it held: another frame's bytes, all different ones here."""
    if not _live_frame_next(link):
        return False
    at = rng.randrange(link.posted[0].payload_bytes)
    link.change_next = lambda data: data[:at] + bytes(byte ^ 0xFF for byte in data[at:])
    return True


def duplicated(link: Link, rng: random.Random) -> bool:
    """The bytes of an earlier frame come again in place of the next ones."""
    others = [data for data in link.payloads if data not in link.wire[0]] if link.wire else []
    if not _live_frame_next(link) or not others:
        return False
    earlier = rng.choice(others)
    link.change_next = lambda data: earlier[: len(data)]
    return True


def reordered(link: Link, rng: random.Random) -> bool:
    """The bytes of two frames change places."""
    if len(link.wire) < 2 or not _live_frame_next(link) or len(link.wire[0]) != len(link.wire[1]):
        return False
    link.wire[0], link.wire[1] = link.wire[1], link.wire[0]
    return True


def replayed_header(link: Link, rng: random.Random) -> bool:
    headers = link.headers()
    return bool(headers) and link.receiver.num_free_slabs > 0 and link.inject(rng.choice(headers))


def reordered_headers(link: Link, rng: random.Random) -> bool:
    """A header from later in the stream overtakes the next one."""
    waiting = [i for i, message in enumerate(link.to_receiver) if isinstance(message, FrameHeader)]
    if len(waiting) < 2:
        return False
    first, second = link.to_receiver[waiting[0]], link.to_receiver[waiting[1]]
    if first.ticket != second.ticket:
        return False
    link.to_receiver[waiting[0]], link.to_receiver[waiting[1]] = second, first
    return True


def garbled_header(link: Link, rng: random.Random) -> bool:
    at = next((i for i, m in enumerate(link.to_receiver) if isinstance(m, FrameHeader)), None)
    if at is None or link.receiver._tickets.get(link.to_receiver[at].ticket) is None:
        return False
    header = link.to_receiver[at]
    field = rng.choice(("ticket", "sequence", "group", "first_block", "num_blocks", "num_layers", "checksum"))
    value = getattr(header, field) ^ (1 << rng.randrange(3, 31))
    link.to_receiver[at] = replace(header, **{field: value})
    return True


def late_frame(link: Link, rng: random.Random) -> bool:
    """The transfer ends while a frame of it is on its way."""
    wanted = [frame.transfer_id for frame in link.posted if link.receiver.may_scatter(frame)]
    if not wanted:
        return False
    link.receiver_does(link.receiver.cancel(rng.choice(wanted)))
    return True


def stale_message(link: Link, rng: random.Random) -> bool:
    """An Offer or a Commit again, or a Cancel of what nobody knows."""
    again = [m for m in link.seen if isinstance(m, Offer | Commit)]
    unknown = Cancel(transfer_id=rng.randbytes(4), reason="")
    return link.inject(rng.choice([*again, unknown]))


KINDS: tuple[Inject, ...] = (
    corrupted,
    truncated,
    duplicated,
    reordered,
    replayed_header,
    reordered_headers,
    garbled_header,
    late_frame,
    stale_message,
)


def detected(link: Link) -> int:
    """What the receiver has counted as wrong."""
    counts = link.receiver.statistics()
    return counts.checksum_errors + counts.dropped_frames + counts.stale_messages


def disturb(kind: Inject, rng: random.Random) -> str | None:
    """One link, one injection: how it was detected; None if the moment for it did not come."""
    link = Link()
    for _ in range(MAX_STEPS):
        link.advance(rng, rng.randrange(1, 4))
        before = detected(link)
        if kind(link, rng):
            break
    else:
        return None
    how = "counted"
    try:
        while sum(getattr(link, f"step_{name}")() for name in link.STEPS):
            pass
    except LinkViolation:
        how = "violation"
        link.receiver.retire("violation")
    link.receiver.check()
    require_no_stale_bytes(link)
    assert how == "violation" or detected(link) > before, f"{kind.__name__} was not noticed"
    return how


def require_no_stale_bytes(link: Link) -> None:
    """What was committed arrived whole."""
    for transfer_id in link.committed(link.receiver_events):
        link.require_arrived(transfer_id, NUM_TOKENS[transfer_id])


def inject_all(count: int, seed: int) -> dict[str, Counter[str]]:
    """So many injections, all kinds in turn; by kind, how they were detected."""
    found: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in KINDS}
    rng, done = random.Random(seed), 0
    while done < count:
        kind = KINDS[done % len(KINDS)]
        how = disturb(kind, rng)
        if how is not None:
            found[kind.__name__][how] += 1
            done += 1
    return found


def test_of_some_injections_each_is_detected() -> None:
    found = inject_all(270, seed=1)
    assert sum(counts.total() for counts in found.values()) == 270


@pytest.mark.long
@pytest.mark.timeout(300)
def test_of_ten_thousand_injections_each_is_detected() -> None:
    found = inject_all(NUM_INJECTIONS, seed=2)
    assert sum(counts.total() for counts in found.values()) == NUM_INJECTIONS


def test_a_link_that_nobody_disturbs_counts_nothing() -> None:
    link = Link()
    link.run()
    assert detected(link) == 0
    assert sorted(link.committed(link.receiver_events)) == [b"a", b"b"]
    require_no_stale_bytes(link)
    assert link.receiver.num_free_slabs == WELCOME.num_slabs
