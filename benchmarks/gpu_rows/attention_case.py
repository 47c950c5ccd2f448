"""The inputs of one decode attention, ours and a peer's alike."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_rows.bench import Bench
from benchmarks.gpu_rows.floors import BYTES, Shape
from benchmarks.gpu_rows.timing import Call, num_sets
from kernels import ops
from kernels.buffered_batch import BufferedBatch
from kernels.paged_batch import PagedBatch

BLOCK_SIZE = 16
CAPACITY = 8192
"""Longest context that the captured step is made for."""


class AttentionCase:
    """Several pools of one layer, of which each is read in turn, and the batch over them."""

    def __init__(self, bench: Bench, shape: Shape, *, batch: int, context_len: int) -> None:
        self.shape = shape
        self.batch = batch
        self.context_len = context_len
        self.blocks_per_seq = context_len // BLOCK_SIZE
        num_blocks = batch * self.blocks_per_seq
        self.tables = torch.randperm(num_blocks, dtype=torch.int32).view(batch, -1).to(bench.device)
        kv_shape = (2, num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        count = num_sets(bench, 2 * batch * context_len * shape.num_kv_heads * shape.head_dim * BYTES)
        random = partial(torch.randn, dtype=bench.dtype, device=bench.device)
        self.pools: list[Tensor] = [random(kv_shape) for _ in range(count)]
        self.q = random((batch, shape.num_q_heads, shape.head_dim))
        as_int32 = partial(torch.tensor, dtype=torch.int32, device=bench.device)
        self._buffers = PagedBatch(
            cu_query_lens=as_int32(list(range(batch + 1))),
            context_lens=as_int32([context_len] * batch),
            block_tables=self.tables,
            max_query_len=1,
            max_context_len=max(CAPACITY, context_len),
        )

    @property
    def num_bytes(self) -> float:
        """Keys and values, queries, and results."""
        return float(self.pools[0].nbytes + 2 * self.q.nbytes)

    @property
    def scale(self) -> float:
        """Of q·k."""
        return float(self.shape.head_dim**-0.5)

    def calls(self) -> list[Call]:
        """Ours, over each of the pools."""
        batch = BufferedBatch.of(self._buffers, BLOCK_SIZE)
        return [partial(ops.paged_attention, self.q, pool, batch, self.scale) for pool in self.pools]
