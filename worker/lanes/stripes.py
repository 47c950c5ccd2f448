"""What of a frame is told from rank to rank: whose blocks, and the checksums of its stripes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.parallel.wire import Message
from kernels.checksums import UINT64_MASK, as_int64


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Blocks of one KV group times layers [first_layer, +num_layers)."""

    group: int
    block_ids: Sequence[int]
    first_layer: int
    num_layers: int


def to_arrays(checksums: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Checksums by lane, as arrays of a message."""
    return list(checksums), [as_int64(checksum) for checksum in checksums.values()]


def checksums_in(message: Message) -> dict[int, int]:
    """The reverse of `to_arrays`."""
    numbers, signed = message.lists
    return {number: value & UINT64_MASK for number, value in zip(numbers, signed, strict=True)}
