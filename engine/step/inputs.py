"""The inputs of a decode step, where captured kernels find them.

A batch is padded to its shape: rows behind its own have no slot and belong to no request; requests behind its
own have no context and no rows. So padding reads nothing and writes nowhere.

A token that the step before has drawn need not be known on the host: its row names the row that drew it.

Block tables stay in device memory from step to step; a step is sent what has changed in them and begins with
writing that (`engine.step.table_rows`). So it reads what was sent for it and the tables that the steps before
it have left, and every `fill` is followed by a run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Span, slots
from engine.drawing import Draw
from engine.step import draw_rows
from engine.step.buffers import NUM_STAGES, Layout, StagedBuffers
from engine.step.draw_rows import DrawRows
from engine.step.shapes import StepShape
from engine.step.table_rows import DeviceTables, TableRows
from kernels.buffered_batch import BufferedBatch
from kernels.paged_batch import PagedBatch
from kernels.truncation import Truncation

NO_SLOT = -1
NO_SOURCE = -1

MAX_CHANGES = 2048
"""Table entries that a step writes; a step that changes more writes the others before it begins. 24 KiB."""

INTEGERS = ("token_ids", "positions", "slots", "sources", *draw_rows.INTEGERS)
"""Names of the int64 buffers with one number for each row."""


@dataclass(frozen=True, kw_only=True)
class StepViews:
    """The part of the buffers that a shape uses."""

    token_ids: Tensor
    """int64 [num_rows]."""
    positions: Tensor
    """int64 [num_rows]."""
    slots: Tensor
    """int64 [num_rows]; NO_SLOT: padding."""
    sources: Tensor
    """int64 [num_rows]: the row of the step before that drew this row's token, or NO_SOURCE."""
    seeds: Tensor
    """int64 [num_rows]; of padding, like all that follows of the draw, anything."""
    choices: Tensor
    """int64 [num_rows]."""
    truncation: Truncation
    buffers: PagedBatch
    tables: DeviceTables
    block_size: int

    def attention(self) -> BufferedBatch:
        """Which rows read which blocks; to be asked for in every run, because it updates the block tables."""
        self.tables.update()
        return BufferedBatch.of(self.buffers, self.block_size)


class StepInputs:
    """Buffers for every shape up to a size; `num_stages` may be filled before the first of them was read."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_rows: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        num_stages: int = NUM_STAGES,
        max_changes: int = MAX_CHANGES,
    ) -> None:
        self._max_model_len = max_model_len
        self._block_size = block_size
        rows = (max_num_rows,)
        layout: Layout = {
            **dict.fromkeys(INTEGERS, (torch.int64, rows)),
            **dict.fromkeys(draw_rows.FLOATS, (torch.float32, rows)),
            "top_ks": (torch.int32, rows),
            "cu_query_lens": (torch.int32, (max_num_seqs + 1,)),
            "context_lens": (torch.int32, (max_num_seqs,)),
            "changed_places": (torch.int64, (max_changes,)),
            "changed_blocks": (torch.int32, (max_changes,)),
        }
        self._buffers = StagedBuffers(layout, device, num_stages)
        self._draw_rows = [DrawRows(host) for host in self._buffers.hosts]
        num_columns = -(-max_model_len // block_size)
        self._table_rows = TableRows(max_num_seqs, num_columns)
        num_entries = max_num_seqs * num_columns
        self._tables = DeviceTables(
            torch.zeros(num_entries + 1, dtype=torch.int32, device=device),
            self._buffers.device["changed_places"],
            self._buffers.device["changed_blocks"],
        )
        self._block_tables = self._tables.entries[:num_entries].view(max_num_seqs, num_columns)

    def views(self, shape: StepShape) -> StepViews:
        """What a step of this shape reads; at the same places every time."""
        device, num_seqs = self._buffers.device, shape.num_seqs
        buffers = PagedBatch(
            cu_query_lens=device["cu_query_lens"][: num_seqs + 1],
            context_lens=device["context_lens"][:num_seqs],
            block_tables=self._block_tables[:num_seqs],
            max_query_len=shape.width,
            max_context_len=self._max_model_len,
        )
        rows = {name: tensor[: shape.num_rows] for name, tensor in device.items()}
        return StepViews(
            **{name: rows[name] for name in INTEGERS},
            truncation=Truncation(rows["temperatures"], rows["top_ks"], rows["top_ps"], rows["min_ps"]),
            buffers=buffers,
            tables=self._tables,
            block_size=self._block_size,
        )

    def fill(
        self,
        shape: StepShape,
        spans: Sequence[Span],
        draws: Sequence[Draw] = (),
        sources: Sequence[int] = (),
        changed: Callable[[Tensor], None] = lambda changes: None,
    ) -> Tensor:
        """Write a batch, packed as `engine.batch.pack` packs it, and its padding; no spans: padding alone.

        draws: of each row, if the step draws the tokens behind the spans; sources: of each row, by default
        none. What of the batch can be in the row where it was the last time costs less.

        Returns the bytes that the step reads, for another rank's `take`. `changed` gets, as soon as they are
        sent, bytes for another rank's `take_changes`, which come before. Both lie in a stage: they are valid
        until it is its turn again.
        """
        self._change_tables(spans, changed)
        self._draw_rows[self._buffers.turn].write(draws)
        _write(self._buffers.host["sources"], sources, shape.num_rows, NO_SOURCE)
        self._fill_batch(shape, spans)
        return self._buffers.send()

    def take(self, filled: Tensor) -> None:
        """`fill` of another rank's inputs, made alike."""
        self._buffers.send_raw(filled)

    def take_changes(self, changes: Tensor) -> None:
        """What `fill` of another rank's inputs changes before its step begins."""
        self._buffers.send_raw(changes)
        self._change_now()

    def check(self) -> None:
        """Assert that the tables are what the rows were told to hold; the newest step must have ended."""
        self._table_rows.check(self._block_tables.tolist())

    def _change_tables(self, spans: Sequence[Span], changed: Callable[[Tensor], None]) -> None:
        """Write the changes of a step to the host; those that are too many go to the tables at once."""
        tables = ((span.table, self._num_blocks(span)) for span in spans)
        places, block_ids = self._table_rows.changes(tables)
        most = len(self._tables.places)
        while len(places) > most:
            self._write_changes(places[:most], block_ids[:most])
            changed(self._buffers.send())
            self._change_now()
            del places[:most], block_ids[:most]
        self._write_changes(places, block_ids)

    def _change_now(self) -> None:
        self._tables.update()
        self._buffers.settle()

    def _write_changes(self, places: Sequence[int], block_ids: Sequence[int]) -> None:
        host, most, spare = self._buffers.host, len(self._tables.places), len(self._tables.entries) - 1
        _write(host["changed_places"], places, most, spare)
        _write(host["changed_blocks"], block_ids, most, 0)

    def _num_blocks(self, span: Span) -> int:
        return -(-span.end // self._block_size)

    def _fill_batch(self, shape: StepShape, spans: Sequence[Span]) -> None:
        host = self._buffers.host
        places = [(span.table, position) for span in spans for position in span.positions]
        token_ids = [token_id for span in spans for token_id in span.token_ids]
        ends = list(accumulate([len(span.token_ids) for span in spans], initial=0))
        _write(host["token_ids"], token_ids, shape.num_rows, 0)
        _write(host["positions"], [position for _, position in places], shape.num_rows, 0)
        _write(host["slots"], slots(places, self._block_size), shape.num_rows, NO_SLOT)
        _write(host["cu_query_lens"], ends, shape.num_seqs + 1, ends[-1])
        _write(host["context_lens"], [span.end for span in spans], shape.num_seqs, 0)


def _write(target: NDArray[np.generic], values: Sequence[int], length: int, padding: int) -> None:
    target[: len(values)] = values
    target[len(values) : length] = padding
