"""Pure: which pieces of a request's KV travel in which frame, and how large frames and slabs are.

Terms: a *cell* is one block in one layer of one group; a rectangle is a range of blocks times a range of
layers, and fits one slab. Inside a slab a rectangle lies as kernels.ops.gather_blocks packs it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvtransfer.layout import KvFacts, KvGroup, block_bytes, layer_block_bytes

MAX_SLAB_BYTES = {"gloo": 4 << 20, "shm": 4 << 20, "nccl": 32 << 20, "cuda_ipc": 32 << 20}
"""Largest slab by transport. On hosts longer messages gain nothing, and on gloo a killed peer is noticed
later; a GPU moves 4 MiB in less time than a control message takes."""

SLAB_ALIGNMENT = 4096
"""Slabs are whole pages, and a 1/64 slab is still a multiple of 64 bytes."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Blocks [first_block, +num_blocks) of a block table times layers [first_layer, +num_layers)."""

    group: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int

    def clipped(self, first_block: int) -> "Rectangle | None":
        """The part at or behind position `first_block`; None if nothing is left."""
        end = self.first_block + self.num_blocks
        start = max(self.first_block, first_block)
        if start >= end:
            return None
        return Rectangle(self.group, start, end - start, self.first_layer, self.num_layers)


def rectangles(
    facts: KvFacts,
    group: int,
    first_block: int,
    num_blocks: int,
    slab_bytes: int,
    layers: range | None = None,
) -> list[Rectangle]:
    """Cut these layers (all) of blocks [first_block, +num_blocks) into rectangles of at most `slab_bytes`.

    Whole blocks as long as a block of the layers fits a slab; else each block is cut into layer ranges of
    nearly equal length. Positions ascend, so a rectangle depends on no later token.
    """
    shape = facts.groups[group]
    layers = range(shape.num_layers) if layers is None else layers
    layers_per_cut = _layers_per_cut(shape, len(layers), facts.block_size, slab_bytes)
    cut_bytes = layers_per_cut * layer_block_bytes(shape, facts.block_size)
    blocks_per_cut = slab_bytes // cut_bytes
    return [
        Rectangle(
            group,
            block,
            min(blocks_per_cut, first_block + num_blocks - block),
            layer,
            min(layers_per_cut, layers.stop - layer),
        )
        for block in range(first_block, first_block + num_blocks, blocks_per_cut)
        for layer in layers[::layers_per_cut]
    ]


def _layers_per_cut(group: KvGroup, num_layers: int, block_size: int, slab_bytes: int) -> int:
    most = slab_bytes // layer_block_bytes(group, block_size)
    assert most >= 1, "choose_slab_bytes makes a slab hold one block of one layer"
    num_cuts = -(-num_layers // most)
    return -(-num_layers // num_cuts)


def rectangle_bytes(facts: KvFacts, rectangle: Rectangle) -> int:
    """Payload bytes of a rectangle."""
    one = layer_block_bytes(facts.groups[rectangle.group], facts.block_size)
    return rectangle.num_blocks * rectangle.num_layers * one


def choose_slab_bytes(facts: KvFacts, num_pool_blocks: int, max_slab_bytes: int) -> int:
    """Slab size: at most `max_slab_bytes` and the whole pool, at least one block of one layer."""
    pool = max(num_pool_blocks * block_bytes(group, facts.block_size) for group in facts.groups)
    least = max(layer_block_bytes(group, facts.block_size) for group in facts.groups)
    wanted = max(least, min(pool, max_slab_bytes))
    return -(-wanted // SLAB_ALIGNMENT) * SLAB_ALIGNMENT


def frame_sizes(slab_bytes: int) -> tuple[int, ...]:
    """Bytes on the wire by size index, largest first: the slab, 1/4, 1/16 and 1/64 of it."""
    assert slab_bytes % SLAB_ALIGNMENT == 0
    return (slab_bytes, slab_bytes // 4, slab_bytes // 16, slab_bytes // 64)


def size_index(sizes: Sequence[int], payload_bytes: int) -> int:
    """Index of the smallest frame that holds the payload; `sizes` descend."""
    fitting = [index for index, size in enumerate(sizes) if size >= payload_bytes]
    assert fitting, "a rectangle never exceeds a slab"
    return fitting[-1]


class Coverage:
    """Which cells of blocks [first, end) in all groups were sent; each cell at most once."""

    def __init__(self, facts: KvFacts, first: int, end: int) -> None:
        assert 0 <= first <= end
        self._first = first
        self._end = end
        # Per group and block one bit mask over the layers.
        self._cells = [[0] * (end - first) for _ in facts.groups]
        self._full = [(1 << group.num_layers) - 1 for group in facts.groups]

    def fault(self, rectangle: Rectangle) -> str | None:
        """Why the rectangle cannot be added: out of range, empty, or overlapping; None if it can."""
        if not 0 <= rectangle.group < len(self._cells):
            return f"group {rectangle.group} of {len(self._cells)}"
        last_block = rectangle.first_block + rectangle.num_blocks
        if rectangle.num_blocks < 1 or rectangle.first_block < self._first or last_block > self._end:
            return f"blocks [{rectangle.first_block}, {last_block}) outside [{self._first}, {self._end})"
        last_layer = rectangle.first_layer + rectangle.num_layers
        num_layers = self._full[rectangle.group].bit_length()
        if rectangle.num_layers < 1 or rectangle.first_layer < 0 or last_layer > num_layers:
            return f"layers [{rectangle.first_layer}, {last_layer}) of {num_layers}"
        mask, cells = self._mask(rectangle), self._range(rectangle)
        if any(self._cells[rectangle.group][cell] & mask for cell in cells):
            return f"{rectangle} overlaps an earlier frame"
        return None

    def add(self, rectangle: Rectangle) -> None:
        """Mark the rectangle's cells; `fault` must have found nothing."""
        mask, row = self._mask(rectangle), self._cells[rectangle.group]
        for cell in self._range(rectangle):
            assert not row[cell] & mask
            row[cell] |= mask

    @property
    def complete(self) -> bool:
        """Whether every cell of every group was covered."""
        rows: Iterable[tuple[list[int], int]] = zip(self._cells, self._full, strict=True)
        return all(cell == full for row, full in rows for cell in row)

    def _mask(self, rectangle: Rectangle) -> int:
        return ((1 << rectangle.num_layers) - 1) << rectangle.first_layer

    def _range(self, rectangle: Rectangle) -> range:
        start = rectangle.first_block - self._first
        return range(start, start + rectangle.num_blocks)
