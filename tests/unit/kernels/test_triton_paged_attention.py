import pytest
import torch

from kernels import attention, triton_paged_attention
from kernels.attention import AttentionBatch

NUM_BLOCKS, BLOCK_SIZE = 16, 16


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([], []), ([1, 1], [20, 3]), ([2, 1], [17, 33]), ([12, 9], [12, 30]), ([1, 10, 1], [40, 25, 2])],
)
def test_every_mixture_takes_kernels_that_cover_it(device, query_lens, context_lens):
    torch.manual_seed(0)
    free = torch.randperm(NUM_BLOCKS).tolist()
    batch = AttentionBatch(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=[[free.pop() for _ in range(length // BLOCK_SIZE + 1)] for length in context_lens],
        block_size=BLOCK_SIZE,
        device=device,
    )
    kv_layer = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, 1, 64, device=device)
    q = torch.randn(sum(query_lens) + 3, 2, 64, device=device)
    out = triton_paged_attention.paged_attention(q, kv_layer, batch, 0.125)
    want = attention.paged_attention(q, kv_layer, batch, 0.125)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=2e-6)
    assert not out[-3:].any()
