"""Paged prefill attention in Triton against plain torch; `-m gpu` runs the same tests compiled."""

import dataclasses
import itertools

import pytest
import torch

from kernels.paged_batch import AttentionKind
from kernels.triton_prefill_attention import (
    PrefillTiling,
    default_tiling,
    prefill_attention,
    prefill_launch,
)
from tests.unit.kernels.paged_scenario import assert_as_exact_as_torch, int32, poisoned, scenario

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KIND = AttentionKind(scale=0.125)
TILING = PrefillTiling(rows=32, tile=32, num_warps=4)
E4M3 = torch.float8_e4m3fn


def check(q, kv_layer, batch, kind=KIND, tiling=TILING):
    out = prefill_attention(q, kv_layer, batch, kind, tiling=tiling, out=poisoned(q))
    assert_as_exact_as_torch(out, q, kv_layer, batch, kind)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_prompts_that_end_around_a_block(device, block_size, offset):
    length = block_size + offset
    check(*scenario([length], [length], block_size=block_size, device=device))


@pytest.mark.parametrize("past", [1, 31, 32, 33, 80])
def test_chunks_with_a_past(device, past):
    check(*scenario([past + 20], [20], device=device))


@pytest.mark.parametrize("query_len", [1, 15, 16, 17])
def test_chunks_that_end_around_a_tile(device, query_len):
    check(*scenario([query_len + 40], [query_len], device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1, 8), (8, 2, 80), (7, 1, 96), (16, 2, 128), (2, 1, 256)])
def test_heads_and_types(device, heads, dtype):
    check(*scenario([40], [6], heads=heads, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("context_lens", "query_lens", "spare_rows"),
    [
        ([20, 40, 1], [20, 3, 1], 0),
        ([33, 64], [33, 1], 7),
        ([0, 17, 0, 5], [3, 2, 0, 5], 20),
        ([1, 2, 3, 4, 5], [1, 1, 1, 1, 1], 1),
    ],
)
def test_requests_of_all_kinds_side_by_side(device, context_lens, query_lens, spare_rows):
    check(*scenario(context_lens, query_lens, spare_rows=spare_rows, device=device))


def test_nothing_but_padding(device):
    q, kv_layer, batch = scenario([16, 16], [8, 8], spare_rows=5, device=device)
    batch.context_lens.zero_()
    batch.cu_query_lens[1:] = 4
    assert not prefill_attention(q, kv_layer, batch, KIND, tiling=TILING, out=poisoned(q)).any()


def test_requests_of_few_queries_are_left_out(device):
    q, kv_layer, batch = scenario([20, 40, 33], [2, 18, 1], spare_rows=3, device=device)
    out = prefill_attention(q, kv_layer, batch, KIND, tiling=TILING, longer_than=2, out=poisoned(q))
    assert out[[0, 1, 20, 21, 22, 23]].isnan().all()
    whole = prefill_attention(q, kv_layer, batch, KIND, tiling=TILING)
    assert torch.equal(out[2:20], whole[2:20])


@pytest.mark.parametrize("window", [1, 5, 32, 1000])
def test_sliding_windows(device, window):
    check(*scenario([70], [20], device=device), AttentionKind(scale=0.2, window=window))


def test_blocks_behind_the_window_may_be_anyones(device):
    q, kv_layer, batch = scenario([90], [18], device=device)
    kind = AttentionKind(scale=0.125, window=20)
    want = prefill_attention(q, kv_layer, batch, kind, tiling=TILING)
    oldest = 90 - 18 + 1 - 20
    kv_layer[:, batch.block_tables[0, : oldest // 16].long()] = torch.nan
    kv_layer[:, batch.block_tables[0, oldest // 16].long(), : oldest % 16] = torch.nan
    assert torch.equal(prefill_attention(q, kv_layer, batch, kind, tiling=TILING), want)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_caps(device, soft_cap):
    kind = AttentionKind(scale=0.25, soft_cap=soft_cap)
    check(*scenario([40], [10], dtype=torch.float32, device=device), kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_bits", [False, True])
def test_pools_of_fp8(device, dtype, as_bits):
    q, kv_layer, batch = scenario([50], [12], dtype=dtype, pool=E4M3, device=device)
    if not as_bits and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU does not know float8_e4m3fn")
    kind = AttentionKind(scale=0.125, k_scale=1.5, v_scale=0.75)
    stored = kv_layer.view(torch.uint8) if as_bits else kv_layer
    out = prefill_attention(q, stored, batch, kind, tiling=TILING, out=poisoned(q))
    assert_as_exact_as_torch(out, q, kv_layer, batch, kind)


def test_chunks_give_what_the_whole_prompt_gives(device):
    """Cut at multiples of a tile's queries the tiles are the same, and so are the bits."""
    q, kv_layer, batch = scenario([60], [60], device=device)
    whole = prefill_attention(q, kv_layer, batch, KIND, tiling=TILING)
    for start, stop in itertools.pairwise((0, 16, 48, 60)):
        chunk = dataclasses.replace(
            batch,
            cu_query_lens=int32([0, stop - start], device),
            context_lens=int32([stop], device),
        )
        out = prefill_attention(q[start:stop], kv_layer, chunk, KIND, tiling=TILING)
        assert torch.equal(out, whole[start:stop])


def test_a_launch_follows_the_buffers(device):
    q, kv_layer, batch = scenario([40, 5], [20, 2], spare_rows=1, device=device)
    out = poisoned(q)
    launch = prefill_launch(q, kv_layer, batch, KIND, out, TILING)
    batch.context_lens.copy_(int32([5, 38], device))
    batch.cu_query_lens.copy_(int32([0, 5, 17], device))
    batch.block_tables.copy_(batch.block_tables.flip(0))
    launch.run()
    assert_as_exact_as_torch(out, q, kv_layer, batch, KIND)


def test_addresses_beyond_32_bits(device):
    """A block whose elements start behind 2**31; memory that nobody touches is never there."""
    block_stride = 2**30 + 2048
    strides = (1024, block_stride, 64, 64, 1)
    far = torch.empty_strided((2, 3, 16, 1, 64), strides, dtype=torch.uint8, device=device)
    q, kv_layer, batch = scenario([30], [10], pool=E4M3, device=device)
    stored = kv_layer.view(torch.uint8)
    want = prefill_attention(q, stored, batch, KIND, tiling=TILING)
    far[:, [2, 0]] = stored[:, batch.block_tables[0, :2].long()]
    batch.block_tables[0, :2] = int32([2, 0], device)
    assert torch.equal(prefill_attention(q, far, batch, KIND, tiling=TILING), want)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [1, 7, 71])
@pytest.mark.parametrize("query_len", [1, 2, 100])
def test_the_default_tiling_holds_a_group(capability, dtype, group_size, query_len):
    q, kv_layer, batch = scenario([100], [query_len], heads=(group_size, 1, 16), dtype=dtype)
    tiling = default_tiling(q, kv_layer, batch, capability)
    assert tiling.rows >= max(16, group_size)
    assert tiling.rows & (tiling.rows - 1) == 0
    assert query_len > 1 or tiling.rows < 2 * max(16, group_size)


@pytest.mark.long
@pytest.mark.parametrize("heads", [(4, 1, 64), (7, 1, 80)])
@pytest.mark.parametrize("seed", range(40))
def test_many_shapes(device, heads, seed):
    torch.manual_seed(seed)
    num_seqs = int(torch.randint(1, 5, ()))
    context_lens = torch.randint(1, 150, (num_seqs,)).tolist()
    query_lens = [int(torch.randint(1, length + 1, ())) for length in context_lens]
    kind = AttentionKind(scale=0.125, window=(None, 40)[seed % 2], soft_cap=(None, None, 5.0)[seed % 3])
    check(*scenario(context_lens, query_lens, heads=heads, spare_rows=seed % 4, device=device), kind)
