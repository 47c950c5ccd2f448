"""The blocks of one request in one KV group."""

from collections.abc import Iterable


class BlockTable(list[int]):
    """Block ids in token order. It grows at its end; an entry is replaced by `exchange` alone.

    So whoever has copied it needs to look at new entries only, unless `num_exchanges` has changed.
    """

    __slots__ = ("num_exchanges",)

    def __init__(self, block_ids: Iterable[int] = ()) -> None:
        super().__init__(block_ids)
        self.num_exchanges = 0

    def exchange(self, position: int, block_id: int) -> None:
        """Put another block in the place of one."""
        self[position] = block_id
        self.num_exchanges += 1
