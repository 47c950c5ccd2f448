"""How far the KV of a sequence is written, in blocks and layers, and what a step adds to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Stretch(NamedTuple):
    """Blocks times layers of one KV group."""

    group: int
    blocks: range
    layers: range


@dataclass(frozen=True, slots=True)
class Written:
    """Blocks in the order of the sequence.

    0 .................... blocks .................... ahead ..........
    all layers, all groups         group 0's first `layers`     nothing
    """

    blocks: int
    ahead: int = 0
    """End of the blocks that the running step writes; those up to `blocks` do not count again."""
    layers: int = 0

    def num_layers(self, group: int, block: int, in_all: int) -> int:
        """Of a group with `in_all` layers, how many leading ones are written for the block."""
        if block < self.blocks:
            return in_all
        return self.layers if group == 0 and block < self.ahead else 0


NOTHING = Written(0)


def stretches(before: Written, after: Written, num_layers: Sequence[int]) -> list[Stretch]:
    """What is in `after` and not in `before`, for KV groups with so many layers; it must be no less."""
    return [each for group, in_all in enumerate(num_layers) for each in _of(group, before, after, in_all)]


def _of(group: int, before: Written, after: Written, in_all: int) -> Iterator[Stretch]:
    """Between two neighbouring edges all blocks are alike."""
    for start, end in pairwise(sorted({0, before.blocks, before.ahead, after.blocks, after.ahead})):
        old, new = before.num_layers(group, start, in_all), after.num_layers(group, start, in_all)
        assert old <= new, "what is written was taken back"
        if old < new:
            yield Stretch(group, range(start, end), range(old, new))
