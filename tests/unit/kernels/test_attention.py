import math

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.attention import AttentionBatch

BLOCK_SIZE, NUM_BLOCKS, HEAD_DIM = 4, 64, 8


def naive_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of the last len(q) positions, head by head."""
    out = torch.empty_like(q)
    for row in range(len(q)):
        visible = len(keys) - len(q) + row + 1
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // keys.shape[1])
            scores = keys[:visible, kv_head] @ q[row, head] / math.sqrt(HEAD_DIM)
            out[row, head] = scores.softmax(0) @ values[:visible, kv_head]
    return out


def scenario(query_lens: list[int], context_lens: list[int], num_kv_heads: int):
    """A NaN-poisoned layer, filled only where the contexts lie, and the dense keys and values."""
    torch.manual_seed(0)
    kv_layer = torch.full((2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM), torch.nan)
    free = torch.randperm(NUM_BLOCKS).tolist()
    tables, dense = [], []
    for context_len in context_lens:
        table = [free.pop() for _ in range(-(-context_len // BLOCK_SIZE))]
        keys, values = torch.randn(2, context_len, num_kv_heads, HEAD_DIM)
        slots = torch.tensor(
            [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context_len)]
        )
        ops.store_kv(keys, values, kv_layer, slots)
        tables.append([*table, free.pop()])
        dense.append((keys, values))
    batch = AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )
    return kv_layer, batch, dense


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1], [1]),
        ([5], [5]),
        ([3], [11]),
        ([1, 1, 1], [4, 17, 70]),
        ([1, 6, 1, 2, 4], [9, 6, 33, 18, 4]),
    ],
)
def test_matches_the_naive_loop_over_a_poisoned_pool(num_kv_heads, query_lens, context_lens):
    kv_layer, batch, dense = scenario(query_lens, context_lens, num_kv_heads)
    q = torch.randn(sum(query_lens) + 2, 4, HEAD_DIM)
    out = ops.paged_attention(q, kv_layer, batch, HEAD_DIM**-0.5)
    parts = q[:-2].split(query_lens)
    want = torch.cat([naive_attention(part, *kv) for part, kv in zip(parts, dense, strict=True)])
    torch.testing.assert_close(out[:-2], want, atol=2e-6, rtol=2e-6)
    assert not out[-2:].any()


def test_a_decode_has_the_same_bits_in_any_batch():
    query_lens, context_lens = [1] * 7, [3, 20, 21, 64, 17, 1, 40]
    kv_layer, batch, _ = scenario(query_lens, context_lens, 2)
    q = torch.randn(7, 4, HEAD_DIM)
    together = ops.paged_attention(q, kv_layer, batch, 0.3)
    for row in range(7):
        alone = AttentionBatch(
            query_lens=[1],
            context_lens=[context_lens[row]],
            block_tables=[batch.block_tables[row]],
            block_size=BLOCK_SIZE,
            device=torch.device("cpu"),
        )
        out = ops.paged_attention(q[row : row + 1], kv_layer, alone, 0.3)
        assert torch.equal(out[0], together[row])
