"""A batch whose lengths and block tables lie in device memory and may change between two runs over it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.attention import AttentionBatch, DecodeRows, PrefillSpan
from kernels.paged_batch import PagedBatch


@dataclass(frozen=True, kw_only=True)
class BufferedBatch(AttentionBatch):
    """Each request has a few queries, which are computed like decode rows: the same bits.

    On a GPU nothing is read on the host: its kernels take `buffers` as they are when they run. On a CPU the
    buffers are read once; a new object sees new content.
    """

    buffers: PagedBatch

    @classmethod
    def of(cls, buffers: PagedBatch, block_size: int) -> "BufferedBatch":
        """`query_lens` and `context_lens` are bounds; there are no block tables on the host."""
        return cls(
            query_lens=[buffers.max_query_len] * buffers.num_seqs,
            context_lens=[buffers.max_context_len] * buffers.num_seqs,
            block_tables=[],
            block_size=block_size,
            device=buffers.context_lens.device,
            buffers=buffers,
        )

    @cached_property
    def paged(self) -> PagedBatch:
        """See AttentionBatch."""
        return self.buffers

    @cached_property
    def num_tokens(self) -> int:
        """See AttentionBatch."""
        return int(self.buffers.cu_query_lens[-1])

    @cached_property
    def prefill_spans(self) -> list[PrefillSpan]:
        """There are none."""
        return []

    @cached_property
    def decode_rows(self) -> DecodeRows:
        """One for each query."""
        starts = self.buffers.cu_query_lens.long()
        query_lens = starts.diff()
        seqs = torch.repeat_interleave(query_lens)
        rows = torch.arange(len(seqs))
        ends = self.buffers.context_lens.long() - query_lens + 1
        context_lens = ends.index_select(0, seqs) + rows - starts.index_select(0, seqs)
        block_ids, first_blocks = self._block_ids(seqs, context_lens)
        return DecodeRows(
            rows=rows,
            context_lens=context_lens,
            block_ids=block_ids,
            first_blocks=first_blocks,
            longest=max(context_lens.tolist(), default=0),
        )

    def _block_ids(self, seqs: Tensor, context_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(blocks of all contexts, where those of each row begin)."""
        num_blocks = (context_lens + self.block_size - 1) // self.block_size
        ends = num_blocks.cumsum(0)
        tables = self.buffers.block_tables.index_select(0, seqs)
        used = torch.arange(tables.shape[1]) < num_blocks.unsqueeze(1)
        return tables[used].long(), ends - num_blocks
