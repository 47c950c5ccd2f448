"""Reference attention over a packed batch whose keys and values lie in blocks of a KV pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BUCKET_BLOCKS = 4
"""Decode contexts are padded to a power of two of blocks, and to this many."""


@dataclass(frozen=True, kw_only=True)
class DecodeBucket:
    """Single queries whose contexts are padded to one length of `num_blocks` blocks.

    The length depends on the request's own context alone, so neither its cost nor a bit of its result
    depends on the rest of the batch.
    """

    rows: Tensor
    """int64 [num_seqs]: row of the packed batch of each query."""
    num_blocks: int
    block_ids: Tensor
    """int64 [num_seqs * num_blocks]; padding repeats the request's own first block."""
    hidden: Tensor
    """bool [num_seqs, 1, 1, num_blocks * block_size]: beyond the context."""
    hidden_rows: Tensor
    """int64: indices of the hidden slots among all num_seqs * num_blocks * block_size."""


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
    def prefill_spans(self) -> list[PrefillSpan]:
        """Requests with more than one query."""
        return [self._span(seq, row) for seq, row in self._starts() if self.query_lens[seq] > 1]

    @cached_property
    def decode_buckets(self) -> list[DecodeBucket]:
        """Requests with one query, by padded length of their context."""
        buckets: dict[int, list[tuple[int, int]]] = {}
        for seq, row in self._starts():
            if self.query_lens[seq] == 1:
                num_blocks = max(self._num_blocks(seq), MIN_BUCKET_BLOCKS)
                buckets.setdefault(1 << (num_blocks - 1).bit_length(), []).append((seq, row))
        return [self._bucket(num_blocks, members) for num_blocks, members in buckets.items()]

    def _starts(self) -> list[tuple[int, int]]:
        starts, row = [], 0
        for seq, query_len in enumerate(self.query_lens):
            starts.append((seq, row))
            row += query_len
        return starts

    def _num_blocks(self, seq: int) -> int:
        return -(-self.context_lens[seq] // self.block_size)

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
            block_ids=self._tensor(self.block_tables[seq][: self._num_blocks(seq)]),
            visible=visible,
        )

    def _bucket(self, num_blocks: int, members: list[tuple[int, int]]) -> DecodeBucket:
        block_ids: list[int] = []
        for seq, _ in members:
            table = self.block_tables[seq][: self._num_blocks(seq)]
            block_ids += table
            block_ids += [table[0]] * (num_blocks - len(table))
        context_lens = self._tensor([self.context_lens[seq] for seq, _ in members])
        hidden = self._arange(0, num_blocks * self.block_size) >= context_lens.unsqueeze(1)
        return DecodeBucket(
            rows=self._tensor([row for _, row in members]),
            num_blocks=num_blocks,
            block_ids=self._tensor(block_ids),
            hidden=hidden[:, None, None, :],
            hidden_rows=hidden.flatten().nonzero().squeeze(1),
        )

    def _arange(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.device)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def paged_attention(q: Tensor, kv_layer: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """Causal attention of packed queries over their requests' blocks; the new keys are stored already.

    q: [num_rows, num_q_heads, head_dim], kv_layer: [2, num_blocks, block_size, num_kv_heads, head_dim];
    query head h reads KV head h // (num_q_heads / num_kv_heads). Rows of no request come out as zeros.
    The cost depends on the contexts, not on the pool.
    """
    out = torch.zeros_like(q)
    for bucket in batch.decode_buckets:
        out.index_copy_(0, bucket.rows, _decode(q, kv_layer, bucket, scale))
    for span in batch.prefill_spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        out[rows] = _prefill(q[rows], kv_layer, span, scale)
    return out


def _decode(q: Tensor, kv_layer: Tensor, bucket: DecodeBucket, scale: float) -> Tensor:
    """One query per request: the q heads that share a KV head are the rows of one small matrix product."""
    num_kv_heads, head_dim = kv_layer.shape[3:]
    num_seqs = len(bucket.rows)
    keys = _contexts(kv_layer[0].index_select(0, bucket.block_ids), num_seqs)
    values = kv_layer[1].index_select(0, bucket.block_ids)
    # Whoever wrote the slots beyond the context last may have left NaN, which a weight of 0 lets through.
    values.flatten(0, 1).index_fill_(0, bucket.hidden_rows, 0)
    queries = q.index_select(0, bucket.rows).view(num_seqs * num_kv_heads, -1, head_dim)
    scores = torch.bmm(queries, keys.transpose(1, 2)).float() * scale
    scores = scores.view(num_seqs, num_kv_heads, -1, keys.shape[1]).masked_fill_(bucket.hidden, -torch.inf)
    probs = scores.softmax(-1).to(q.dtype).flatten(0, 1)
    return torch.bmm(probs, _contexts(values, num_seqs)).view(num_seqs, -1, head_dim)


def _contexts(blocks: Tensor, num_seqs: int) -> Tensor:
    """[num_seqs * num_blocks, block_size, num_kv_heads, head_dim] -> [num_seqs * num_kv_heads, len, dim]."""
    _, _, num_kv_heads, head_dim = blocks.shape
    by_head = blocks.view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
    return by_head.reshape(num_seqs * num_kv_heads, -1, head_dim)


def _prefill(q: Tensor, kv_layer: Tensor, span: PrefillSpan, scale: float) -> Tensor:
    keys, values = (
        _per_query_head(side.index_select(0, span.block_ids).flatten(0, 1)[: span.context_len], q.shape[1])
        for side in kv_layer
    )
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        keys,
        values,
        attn_mask=span.visible,
        is_causal=span.visible is None,
        scale=scale,
    )
    return attended[0].transpose(0, 1)


def _per_query_head(side: Tensor, num_q_heads: int) -> Tensor:
    """[context_len, num_kv_heads, head_dim] -> [1, num_q_heads, context_len, head_dim]."""
    repeats = num_q_heads // side.shape[1]
    return side.transpose(0, 1).repeat_interleave(repeats, dim=0).unsqueeze(0)
