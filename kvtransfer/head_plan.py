"""Pure: which KV heads go from which rank of a sender to which rank of a receiver, where both send directly.

Tensor parallel sizes may differ. A rank stores an equal run of the heads; with fewer heads than ranks,
consecutive ranks store the same one. A receiving rank gets each of its heads once; receivers that want the
same head are dealt out in turn among the senders that store it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class HeadRange:
    """Heads [first_head, +num_heads) of the whole model, from one rank to another."""

    sender_rank: int
    receiver_rank: int
    first_head: int
    num_heads: int

    def offset(self, stored: range) -> int:
        """Where the heads begin among those that a rank stores."""
        assert stored.start <= self.first_head
        assert self.first_head + self.num_heads <= stored.stop
        return self.first_head - stored.start


def stored_heads(num_kv_heads: int, rank: int, size: int) -> range:
    """What a rank of `size` stores; one of `num_kv_heads` and `size` is a multiple of the other."""
    assert max(num_kv_heads, size) % min(num_kv_heads, size) == 0
    first = rank * num_kv_heads // size
    return range(first, first + max(num_kv_heads // size, 1))


def head_ranges(num_kv_heads: int, sender_size: int, receiver_size: int) -> list[HeadRange]:
    """Every range that must move, by receiver, then by head; one link per pair of ranks that is named."""
    found: list[HeadRange] = []
    for receiver in range(receiver_size):
        wanted = stored_heads(num_kv_heads, receiver, receiver_size)
        senders = [_sender(head, num_kv_heads, sender_size, receiver, receiver_size) for head in wanted]
        found += _runs(wanted, senders, receiver)
    return found


def _sender(head: int, num_kv_heads: int, sender_size: int, receiver: int, receiver_size: int) -> int:
    """The rank that sends this head to this receiver."""
    replicas = max(sender_size // num_kv_heads, 1)
    first = head * sender_size // num_kv_heads
    takers = max(receiver_size // num_kv_heads, 1)
    return first + receiver % takers % replicas


def _runs(heads: range, senders: Sequence[int], receiver: int) -> list[HeadRange]:
    """Consecutive heads of one sender as one range."""
    runs = groupby(zip(heads, senders, strict=True), key=lambda pair: pair[1])
    found = []
    for sender, pairs in runs:
        run = [head for head, _ in pairs]
        found.append(HeadRange(sender, receiver, run[0], len(run)))
    return found
