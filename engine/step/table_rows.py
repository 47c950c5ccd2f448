"""Block tables in device memory that are told what has changed, and nothing else.

A row is one request's table. As long as it stays that request's, a step that adds no block costs nothing, and
one that does costs the new entry; a row that changes hands is written as far as the context reaches.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from engine.block_table import BlockTable


class TableChanges(NamedTuple):
    """Entries of the tables to write."""

    places: list[int]
    """Row times number of columns, plus column; each at most once."""
    block_ids: list[int]


class TableRows:
    """What the rows hold once every change that was told is made."""

    def __init__(self, max_num_rows: int, num_columns: int) -> None:
        self._num_columns = num_columns
        self._tables: list[BlockTable | None] = [None] * max_num_rows
        self._num_exchanges = [0] * max_num_rows
        self._num_blocks = [0] * max_num_rows
        """Leading entries of each row that are the table's."""

    def changes(self, tables: Iterable[tuple[BlockTable, int]]) -> TableChanges:
        """What makes the first rows hold the first so many entries of these tables."""
        changes = TableChanges([], [])
        for row, (table, num_blocks) in enumerate(tables):
            if table is not self._tables[row] or table.num_exchanges != self._num_exchanges[row]:
                self._tables[row], self._num_exchanges[row] = table, table.num_exchanges
                self._num_blocks[row] = 0
            first = self._num_blocks[row]
            if first < num_blocks:
                start = row * self._num_columns
                changes.places.extend(range(start + first, start + num_blocks))
                changes.block_ids.extend(table[first:num_blocks])
                self._num_blocks[row] = num_blocks
        return changes

    def check(self, rows: Sequence[Sequence[int]]) -> None:
        """Assert that these are the rows, but for entries that were exchanged since they were told of."""
        each = zip(rows, self._tables, self._num_exchanges, self._num_blocks, strict=True)
        for row, table, num_exchanges, num_blocks in each:
            if table is not None and table.num_exchanges == num_exchanges:
                assert row[:num_blocks] == table[:num_blocks], "a row holds other blocks than its table"


class DeviceTables(NamedTuple):
    """The tables themselves, with the changes of a step beside them in device memory."""

    entries: Tensor
    """int32 [max_num_seqs * num_columns + 1]; the last one belongs to no row."""
    places: Tensor
    """int64 [number of changes that a step can take]; those that it does not need name the last entry."""
    block_ids: Tensor
    """int32, as many."""

    def update(self) -> None:
        """Make the changes; to do it again changes nothing."""
        self.entries.scatter_(0, self.places, self.block_ids)
