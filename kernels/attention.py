"""Reference attention over a packed batch whose keys and values lie in blocks of a KV pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.integers import int64s
from kernels.paged_batch import FEW_QUERIES, PagedBatch


@dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """Every request with a single query, as flat integers: all that one kernel launch needs."""

    rows: Tensor
    """int64 [num_seqs]: row of the packed batch of each query."""
    context_lens: Tensor
    """int64 [num_seqs]."""
    block_ids: Tensor
    """int64: the blocks of all contexts, request after request."""
    first_blocks: Tensor
    """int64 [num_seqs]: where each request's blocks start in `block_ids`."""
    longest: int
    """Largest of `context_lens`; 0 if there are no requests."""


@dataclass(frozen=True, kw_only=True)
class PrefillSpan:
    """Consecutive queries of one request: the last `num_rows` positions of its context."""

    first_row: int
    num_rows: int
    context_len: int
    block_ids: Tensor
    """int64 [blocks of the context]."""
    visible: Tensor | None
    """bool [num_rows, context_len]; None: plainly causal, the whole context is queried."""


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """Which rows of a packed batch belong to which context; shared by all layers of one KV group."""

    query_lens: Sequence[int]
    """New tokens of each request, in the order of their rows."""
    context_lens: Sequence[int]
    """Tokens visible to the last query of each request, itself included."""
    block_tables: Sequence[Sequence[int]]
    """Block ids of each request in token order; may be longer than its context."""
    block_size: int
    device: torch.device

    @cached_property
    def num_tokens(self) -> int:
        """Rows of requests; those behind them are padding."""
        return sum(self.query_lens)

    @cached_property
    def prefill_spans(self) -> list[PrefillSpan]:
        """Requests with more than one query."""
        starts = self._starts()
        return [self._span(seq, starts[seq]) for seq, num in enumerate(self.query_lens) if num > 1]

    @cached_property
    def decode_rows(self) -> DecodeRows:
        """Requests with one query."""
        starts = self._starts()
        seqs = [seq for seq, query_len in enumerate(self.query_lens) if query_len == 1]
        context_lens = [self.context_lens[seq] for seq in seqs]
        tables = [self._blocks(seq) for seq in seqs]
        first_blocks = list(accumulate(map(len, tables), initial=0))
        rows = [starts[seq] for seq in seqs]
        tensors = self._tensor([rows, context_lens, first_blocks[:-1]]).unbind()
        return DecodeRows(
            rows=tensors[0],
            context_lens=tensors[1],
            block_ids=self._tensor(list(chain.from_iterable(tables))),
            first_blocks=tensors[2],
            longest=max(context_lens, default=0),
        )

    @cached_property
    def paged(self) -> PagedBatch:
        """The same for kernels on a GPU."""
        num_blocks = max((len(self._blocks(seq)) for seq in range(len(self.query_lens))), default=0)
        tables = [
            [*self._blocks(seq), *[0] * (num_blocks - len(self._blocks(seq)))]
            for seq in range(len(self.query_lens))
        ]
        as_int32 = partial(torch.tensor, dtype=torch.int32, device=self.device)
        return PagedBatch(
            cu_query_lens=as_int32([0, *accumulate(self.query_lens)]),
            context_lens=as_int32(self.context_lens),
            block_tables=as_int32(tables),
            max_query_len=_capacity(max(self.query_lens)),
            max_context_len=max(self.context_lens),
        )

    def _starts(self) -> list[int]:
        """The first row of every request, then their end."""
        return list(accumulate(self.query_lens, initial=0))

    def _blocks(self, seq: int) -> Sequence[int]:
        return self.block_tables[seq][: -(-self.context_lens[seq] // self.block_size)]

    def _span(self, seq: int, first_row: int) -> PrefillSpan:
        num_rows, context_len = self.query_lens[seq], self.context_lens[seq]
        visible = None
        if num_rows < context_len:
            last_visible = self._arange(context_len - num_rows, context_len)
            visible = self._arange(0, context_len) <= last_visible.unsqueeze(1)
        return PrefillSpan(
            first_row=first_row,
            num_rows=num_rows,
            context_len=context_len,
            block_ids=self._tensor(self._blocks(seq)),
            visible=visible,
        )

    def _arange(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.device)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return int64s(values, self.device)


def _capacity(query_len: int) -> int:
    """At least so many."""
    return max(query_len, FEW_QUERIES) if query_len > 1 else 1


def paged_attention(q: Tensor, kv_layer: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """Causal attention of packed queries over their requests' blocks; the new keys are stored already.

    q: [num_rows, num_q_heads, head_dim], kv_layer: [2, num_blocks, block_size, num_kv_heads, head_dim];
    query head h reads KV head h // (num_q_heads / num_kv_heads). Rows of no request come out as zeros.
    The cost depends on the contexts, not on the pool; each request is computed by itself, so that its bits
    do not depend on its batch.
    """
    out = empty_output(q, batch)
    decode(q, kv_layer, batch.decode_rows, scale, out)
    prefill(q, kv_layer, batch, scale, out)
    return out


def empty_output(q: Tensor, batch: AttentionBatch) -> Tensor:
    """The result of `paged_attention` before its requests are computed."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[batch.num_tokens :] = 0
    return out


def decode(q: Tensor, kv_layer: Tensor, rows: DecodeRows, scale: float, out: Tensor) -> None:
    """One query per request: the q heads that share a KV head are the rows of one small matrix product."""
    block_size = kv_layer.shape[2]
    each = zip(rows.rows.tolist(), rows.context_lens.tolist(), rows.first_blocks.tolist(), strict=True)
    for row, context_len, first_block in each:
        block_ids = rows.block_ids[first_block : first_block - (-context_len // block_size)]
        keys, values = _context(kv_layer, block_ids, context_len)
        queries = q[row].view(keys.shape[0], -1, keys.shape[2])
        scores = torch.bmm(queries, keys.transpose(1, 2)) * scale
        probs = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out[row] = torch.bmm(probs, values).view(q.shape[1:])


def prefill(q: Tensor, kv_layer: Tensor, batch: AttentionBatch, scale: float, out: Tensor) -> None:
    """Several queries per request."""
    num_kv_heads, head_dim = kv_layer.shape[3:]
    for span in batch.prefill_spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        keys, values = _context(kv_layer, span.block_ids, span.context_len).unsqueeze(2)
        queries = q[rows].view(span.num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        shape = (num_kv_heads, queries.shape[1], span.context_len, head_dim)
        attended = F.scaled_dot_product_attention(
            queries,
            keys.expand(shape),
            values.expand(shape),
            attn_mask=span.visible,
            is_causal=span.visible is None,
            scale=scale,
        )
        out[rows].view(span.num_rows, num_kv_heads, -1, head_dim).copy_(attended.permute(2, 0, 1, 3))


def _context(kv_layer: Tensor, block_ids: Tensor, context_len: int) -> Tensor:
    """Keys and values of a context, gathered: [2, num_kv_heads, context_len, head_dim]."""
    return kv_layer.index_select(1, block_ids).flatten(1, 2)[:, :context_len].transpose(1, 2)
