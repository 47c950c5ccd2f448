"""Paged decode attention in Triton against plain torch; `-m gpu` runs the same tests compiled."""

import dataclasses

import pytest
import torch

from kernels.paged_batch import AttentionKind, PagedBatch
from kernels.triton_decode_attention import (
    MAX_SPLITS,
    DecodeTiling,
    decode_attention,
    decode_launches,
    default_tiling,
)
from tests.unit.kernels.paged_scenario import assert_as_exact_as_torch, int32, poisoned, scenario

pytestmark = pytest.mark.usefixtures("poisoned_memory")

KIND = AttentionKind(scale=0.125)
TILING = DecodeTiling(num_splits=4, tile=16, min_split_len=16)
E4M3 = torch.float8_e4m3fn


def check(q, kv_layer, batch, kind=KIND, tiling=TILING):
    out = decode_attention(q, kv_layer, batch, kind, tiling=tiling, out=poisoned(q))
    assert_as_exact_as_torch(out, q, kv_layer, batch, kind)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_contexts_that_end_around_a_block(device, block_size, offset):
    check(*scenario([1, block_size + offset], block_size=block_size, device=device))


@pytest.mark.parametrize("context_len", [63, 64, 65, 128, 130])
def test_contexts_that_end_around_a_split(device, context_len):
    check(*scenario([context_len], device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1, 8), (8, 2, 80), (7, 1, 96), (16, 2, 128), (2, 1, 256)])
def test_heads_and_types(device, heads, dtype):
    check(*scenario([40], heads=heads, dtype=dtype, device=device))


@pytest.mark.parametrize("heads", [(4, 1, 64), (7, 1, 80)])
@pytest.mark.parametrize(
    ("context_lens", "query_lens"), [([33], [2]), ([3], [3]), ([17, 16], [1, 8]), ([18, 9], [5, 0])]
)
def test_several_queries_of_a_request(device, heads, context_lens, query_lens):
    check(*scenario(context_lens, query_lens, heads=heads, device=device))


def test_a_batch_with_padding(device):
    """Requests without a context, with and without rows, and rows of no request."""
    check(*scenario([20, 0, 5, 0], [2, 2, 3, 0], spare_rows=17, device=device))


def test_requests_of_more_queries_are_left_out(device):
    q, kv_layer, batch = scenario([20, 40, 33], [1, 3, 1], spare_rows=1, device=device)
    out = poisoned(q)
    decode_attention(q, kv_layer, batch, KIND, tiling=TILING, max_query_len=1, out=out)
    assert out[1:4].isnan().all()
    out[1:4] = decode_attention(q, kv_layer, batch, KIND, tiling=TILING)[1:4]
    assert_as_exact_as_torch(out, q, kv_layer, batch, KIND)


def test_nothing_but_padding(device):
    q, kv_layer, batch = scenario([16, 16], spare_rows=2, device=device)
    batch.context_lens.zero_()
    batch.cu_query_lens.zero_()
    out = decode_attention(
        q, kv_layer, dataclasses.replace(batch, max_query_len=2), KIND, tiling=TILING, out=poisoned(q)
    )
    assert not out.any()


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_sliding_windows(device, window):
    check(*scenario([3, 70], [3, 4], device=device), AttentionKind(scale=0.2, window=window))


def test_blocks_behind_the_window_may_be_anyones(device):
    q, kv_layer, batch = scenario([90], [2], device=device)
    kind = AttentionKind(scale=0.125, window=20)
    want = decode_attention(q, kv_layer, batch, kind, tiling=TILING)
    kv_layer[:, batch.block_tables[0, :4].long()] = torch.nan
    slots = kv_layer[:, batch.block_tables[0, 4].long()]
    slots[:, : 89 - 20 - 64] = torch.nan
    assert torch.equal(decode_attention(q, kv_layer, batch, kind, tiling=TILING), want)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_soft_caps(device, soft_cap, dtype):
    check(*scenario([50], [2], dtype=dtype, device=device), AttentionKind(scale=0.25, soft_cap=soft_cap))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_bits", [False, True])
def test_pools_of_fp8(device, dtype, as_bits):
    q, kv_layer, batch = scenario([37], [2], dtype=dtype, pool=E4M3, device=device)
    if not as_bits and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU does not know float8_e4m3fn")
    kind = AttentionKind(scale=0.125, k_scale=1.5, v_scale=0.75)
    stored = kv_layer.view(torch.uint8) if as_bits else kv_layer
    out = decode_attention(q, stored, batch, kind, tiling=TILING, out=poisoned(q))
    assert_as_exact_as_torch(out, q, kv_layer, batch, kind)


def test_every_number_of_e4m3(device):
    """Values are read as they are: each query sees one key, so the result is its value."""
    values = torch.arange(256, dtype=torch.uint8, device=device).view(4, 1, 1, 64)
    kv_layer = torch.zeros(2, 4, 16, 1, 64, dtype=torch.uint8, device=device)
    kv_layer[1, :, :1] = values
    batch = PagedBatch(
        cu_query_lens=int32(range(5), device),
        context_lens=int32([1] * 4, device),
        block_tables=int32([[0], [1], [2], [3]], device),
        max_query_len=1,
        max_context_len=1,
    )
    q = torch.ones(4, 1, 64, dtype=torch.float32, device=device)
    out = decode_attention(q, kv_layer, batch, KIND, tiling=TILING)
    want = values.view(E4M3).float().view(4, 1, 64)
    torch.testing.assert_close(out, want, atol=0, rtol=0, equal_nan=True)


def test_a_request_has_the_same_bits_in_any_batch(device):
    q, kv_layer, batch = scenario([40, 9, 17], [2, 1, 3], device=device)
    together = decode_attention(q, kv_layer, batch, KIND, tiling=TILING)
    for seq, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        alone = dataclasses.replace(
            batch,
            cu_query_lens=int32([0, rows.stop - rows.start], device),
            context_lens=batch.context_lens[seq : seq + 1],
            block_tables=batch.block_tables[seq : seq + 1],
        )
        out = decode_attention(q[rows], kv_layer, alone, KIND, tiling=TILING)
        assert torch.equal(out, together[rows])


def test_nan_stays_in_its_request(device):
    q, kv_layer, batch = scenario([40, 40], device=device)
    want = decode_attention(q, kv_layer, batch, KIND, tiling=TILING)
    kv_layer[0, batch.block_tables[1, 0].long(), 3] = torch.nan
    out = decode_attention(q, kv_layer, batch, KIND, tiling=TILING)
    assert torch.equal(out[0], want[0])
    assert out[1].isnan().all()


@pytest.mark.parametrize("num_splits", [1, 2, 32])
def test_any_number_of_splits(device, num_splits):
    check(*scenario([50, 5], device=device), tiling=dataclasses.replace(TILING, num_splits=num_splits))


def test_one_split_needs_no_second_kernel(device):
    q, kv_layer, batch = scenario([50], device=device)
    one, more = (dataclasses.replace(TILING, num_splits=count) for count in (1, 2))
    assert len(decode_launches(q, kv_layer, batch, KIND, poisoned(q), one)) == 1
    assert len(decode_launches(q, kv_layer, batch, KIND, poisoned(q), more)) == 2


def test_launches_follow_the_buffers(device):
    """As the replay of a CUDA graph does: other requests, lengths and blocks in the same tensors."""
    q, kv_layer, batch = scenario([50, 5], [3, 2], spare_rows=1, device=device)
    out = poisoned(q)
    launches = decode_launches(q, kv_layer, batch, KIND, out, TILING)
    batch.context_lens.copy_(int32([5, 48], device))
    batch.cu_query_lens.copy_(int32([0, 1, 4], device))
    batch.block_tables.copy_(batch.block_tables.flip(0))
    for launch in launches:
        launch.run()
    assert_as_exact_as_torch(out, q, kv_layer, batch, KIND)


def test_addresses_beyond_32_bits(device):
    """A block whose elements start behind 2**31; memory that nobody touches is never there."""
    block_stride = 2**30 + 2048
    strides = (1024, block_stride, 64, 64, 1)
    far = torch.empty_strided((2, 3, 16, 1, 64), strides, dtype=torch.uint8, device=device)
    q, kv_layer, batch = scenario([30], pool=E4M3, device=device)
    stored = kv_layer.view(torch.uint8)
    want = decode_attention(q, stored, batch, KIND, tiling=TILING)
    far[:, [2, 0]] = stored[:, batch.block_tables[0, :2].long()]
    batch.block_tables[0, :2] = int32([2, 0], device)
    assert torch.equal(decode_attention(q, far, batch, KIND, tiling=TILING), want)


@pytest.mark.parametrize("num_seqs", [1, 8, 32, 256])
@pytest.mark.parametrize("max_context_len", [1, 100, 8192, 131072])
def test_the_default_tiling_fits_its_bounds(num_seqs, max_context_len):
    q = torch.empty(num_seqs, 32, 128, dtype=torch.bfloat16, device="meta")
    kv_layer = torch.empty(2, 8, 16, 8, 128, dtype=torch.bfloat16, device="meta")
    batch = PagedBatch(
        cu_query_lens=torch.empty(num_seqs + 1, dtype=torch.int32, device="meta"),
        context_lens=torch.empty(num_seqs, dtype=torch.int32, device="meta"),
        block_tables=torch.empty(num_seqs, 8, dtype=torch.int32, device="meta"),
        max_query_len=1,
        max_context_len=max_context_len,
    )
    tiling = default_tiling(q, kv_layer, batch)
    assert 1 <= tiling.num_splits <= MAX_SPLITS
    assert tiling.min_split_len % tiling.tile == 0
    if num_seqs == 1 and max_context_len > 10_000:
        assert tiling.num_splits * 8 >= 132
    if max_context_len < 256 or num_seqs == 256:
        assert tiling.num_splits == 1


@pytest.mark.parametrize(("num_q_heads", "tile"), [(4, 64), (8, 32), (16, 32)])
def test_many_query_rows_leave_room_for_smaller_tiles_on_small_gpus(monkeypatch, num_q_heads, tile):
    """By compilation for sm_86, which has 99 KiB: 64 rows beside tiles of 64 keys take 112."""
    q = torch.empty(8, num_q_heads, 128, dtype=torch.bfloat16, device="meta")
    kv_layer = torch.empty(2, 8, 16, 1, 128, dtype=torch.bfloat16, device="meta")
    integers = torch.empty(2, dtype=torch.int32, device="meta")
    batch = PagedBatch(
        cu_query_lens=integers,
        context_lens=integers[:1],
        block_tables=integers.view(1, 2),
        max_query_len=8,
        max_context_len=32,
    )
    assert default_tiling(q, kv_layer, batch).tile == 64
    monkeypatch.setattr("kernels.triton_decode_attention.compute_capability", lambda device: 86)
    assert default_tiling(q, kv_layer, batch).tile == tile
