"""Which queries of a packed batch read which context, in device memory: what attention kernels take, and the
plain reference of what they compute."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

FEW_QUERIES: Final = 8
"""Most queries of a request that the kernels for decoding take. Of a prompt, pieces that are no longer are
computed by those compiled for so many."""


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """A packed batch over block tables. The tensors may be slices of persistent buffers: kernels read them
    when they run, so a captured CUDA graph follows whatever lies in them at its replay.

    Request i owns the query rows cu_query_lens[i] … cu_query_lens[i + 1]; they are the last positions of its
    context, whose keys and values are in the pool. Requests of context length 0 are padding, with any number
    of rows; their rows, and the rows behind the last request, come out as zeros.
    """

    cu_query_lens: Tensor
    """int32 [num_seqs + 1], starts with 0, ascending."""
    context_lens: Tensor
    """int32 [num_seqs]: tokens visible to the last query of each request, itself included."""
    block_tables: Tensor
    """int32 [num_seqs, max_blocks], rows dense: block ids in token order; read as far as contexts reach."""
    max_query_len: int
    """No request has more query rows, whenever the kernels run."""
    max_context_len: int
    """No request has a longer context, whenever the kernels run."""

    @property
    def num_seqs(self) -> int:
        """Requests, padding included."""
        return self.context_lens.shape[0]

    def check(self) -> None:
        """Shapes and types, at no cost on the device."""
        tensors = (self.cu_query_lens, self.context_lens, self.block_tables)
        assert all(tensor.dtype == torch.int32 and tensor.stride(-1) == 1 for tensor in tensors)
        assert self.cu_query_lens.shape == (self.num_seqs + 1,)
        assert self.block_tables.shape[0] == self.num_seqs
        assert self.max_query_len >= 1
        assert self.max_context_len >= 1


@dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """What a model's layer computes, apart from sizes: fixed for the life of the model."""

    scale: float
    """Factor of q·k, positive."""
    window: int | None = None
    """A query at position p sees the keys of positions p - window + 1 … p; None: all from 0 on."""
    soft_cap: float | None = None
    """Scores become soft_cap * tanh(score / soft_cap) (Gemma 2)."""
    k_scale: float = 1.0
    """Stored keys times this, which is positive, are the keys; for quantized pools."""
    v_scale: float = 1.0
    """Stored values times this are the values."""


def paged_attention(q: Tensor, kv_layer: Tensor, batch: PagedBatch, kind: AttentionKind) -> Tensor:
    """Reference of the attention kernels, in the dtype of q, which may be float64.

    q: [num_rows, num_q_heads, head_dim]; kv_layer: [2, num_blocks, block_size, num_kv_heads, head_dim];
    query head h reads KV head h // (num_q_heads / num_kv_heads). Returns [num_rows, num_q_heads, head_dim].
    """
    out = torch.zeros_like(q)
    starts = batch.cu_query_lens.tolist()
    for seq, context_len in enumerate(batch.context_lens.tolist()):
        rows = slice(starts[seq], starts[seq + 1])
        if context_len > 0 and rows.start < rows.stop:
            num_blocks = -(-context_len // kv_layer.shape[2])
            block_ids = batch.block_tables[seq, :num_blocks].long()
            context = _gather(kv_layer, block_ids)[:, :context_len].to(q.dtype)
            out[rows] = _attend(q[rows], context[0] * kind.k_scale, context[1] * kind.v_scale, kind)
    return out


def _gather(kv_layer: Tensor, block_ids: Tensor) -> Tensor:
    """[2, tokens, num_kv_heads, head_dim], also of types that index_select does not know."""
    raw = kv_layer.view(torch.uint8) if kv_layer.dtype == torch.float8_e4m3fn else kv_layer
    return raw.index_select(1, block_ids).flatten(1, 2).view(kv_layer.dtype)


def _attend(q: Tensor, keys: Tensor, values: Tensor, kind: AttentionKind) -> Tensor:
    """q: [num_queries, num_q_heads, head_dim], keys, values: [context_len, num_kv_heads, head_dim]."""
    group_size = q.shape[1] // keys.shape[1]
    keys, values = (side.repeat_interleave(group_size, dim=1) for side in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * kind.scale
    if kind.soft_cap is not None:
        scores = kind.soft_cap * torch.tanh(scores / kind.soft_cap)
    age = _positions(len(q), len(keys), q.device).unsqueeze(1) - torch.arange(len(keys), device=q.device)
    hidden = age < 0 if kind.window is None else (age < 0) | (age >= kind.window)
    probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, values)


def _positions(num_queries: int, context_len: int, device: torch.device) -> Tensor:
    return torch.arange(context_len - num_queries, context_len, device=device)
