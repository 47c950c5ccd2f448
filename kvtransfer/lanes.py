"""Pure: the lanes of a link, and what of each frame moves over which.

A worker may be several ranks, each with its own heads of every block. A link then has a lane for each range
of heads that goes from one rank to another (kvtransfer.head_plan): a transport of these two processes alone.
A frame of the first KV group is cut into stripes, one for each lane; other groups lie on the first rank of
either worker and travel whole on the first lane. Frame n lies in slab n modulo their number of every lane.
With one rank on either side there is one lane, and its stripe is the frame.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kernels.checksums import UINT64_MASK
from kvtransfer.head_plan import HeadRange, head_ranges
from kvtransfer.messages import Welcome

STRIPE_ALIGNMENT = 64
"""Slabs of a lane begin at multiples of it, as those of whole frames do."""

SENDER, RECEIVER = 0, 1
"""The ends of a lane."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One range of heads from one rank to another."""

    number: int
    """In the order of the head plan; lane 0 joins the two ranks 0."""
    heads: HeadRange
    stripe_sizes: tuple[int, ...]
    """Bytes on the wire of the first group's frames, by size index."""
    whole_sizes: tuple[int, ...]
    """Of other groups' frames; empty if they do not take this lane."""

    @property
    def slab_bytes(self) -> int:
        """Of the largest frame."""
        return max(self.stripe_sizes + self.whole_sizes)

    def rank(self, end: int) -> int:
        """Which rank of the worker at this end has the lane."""
        return self.heads.receiver_rank if end == RECEIVER else self.heads.sender_rank

    def carries(self, group: int) -> bool:
        """Whether frames of this KV group take the lane."""
        return group == 0 or bool(self.whole_sizes)

    def num_bytes(self, group: int, size_index: int) -> int:
        """On the wire, of a frame that takes the lane."""
        return (self.whole_sizes if group else self.stripe_sizes)[size_index]


def lanes_between(num_kv_heads: int, welcome: Welcome, sender_size: int, receiver_size: int) -> list[Lane]:
    """The lanes of a link between workers of so many ranks; both ends come to the same ones."""
    whole_sizes = welcome.frame_sizes if welcome.num_groups > 1 else ()
    return [
        Lane(
            number,
            heads,
            tuple(_stripe_size(size, heads.num_heads, num_kv_heads) for size in welcome.frame_sizes),
            () if number else whole_sizes,
        )
        for number, heads in enumerate(head_ranges(num_kv_heads, sender_size, receiver_size))
    ]


def _stripe_size(frame_size: int, num_heads: int, num_kv_heads: int) -> int:
    if num_heads == num_kv_heads:
        return frame_size
    size = -(-frame_size * num_heads // num_kv_heads)
    return -(-size // STRIPE_ALIGNMENT) * STRIPE_ALIGNMENT


def fold_stripes(checksums: Mapping[int, int]) -> int:
    """A frame's checksum from those of its stripes, by lane: no stripe can be another one's."""
    return sum((2 * number + 1) * checksum for number, checksum in checksums.items()) & UINT64_MASK
