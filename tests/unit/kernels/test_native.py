"""The operators in C against their torch references, and how they come into being."""

import os
import subprocess
import weakref

import pytest
import torch

from kernels import attention, checksums, layers, native, native_build, paged_kv, summed_copies
from kernels.attention import AttentionBatch

pytestmark = pytest.mark.skipif(not native.available(), reason="no C compiler on this machine")

BLOCK_SIZE, NUM_BLOCKS = 4, 64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("hidden", [1, 8, 33, 512])
def test_add_rms_norm(hidden):
    x, residual, weight = torch.randn(5, hidden), torch.randn(5, hidden), torch.randn(hidden)
    ours, theirs = residual.clone(), residual.clone()
    want = layers.add_rms_norm(x, theirs, weight, 1e-5)
    torch.testing.assert_close(native.add_rms_norm(x, ours, weight, 1e-5), want, atol=2e-6, rtol=2e-6)
    assert torch.equal(ours, theirs)


def test_silu_mul_from_one_end_of_fp32_to_the_other():
    gate = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor([-3e38, 0.0, 3e38])))
    gate_up = torch.stack((gate, torch.ones_like(gate)), 1).reshape(-1, 2)
    torch.testing.assert_close(native.silu_mul(gate_up), layers.silu_mul(gate_up), atol=1e-36, rtol=1e-6)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rope_of_some_heads_of_wider_rows(head_dim):
    rows, angles = torch.randn(6, 5, head_dim), torch.randn(30, head_dim // 2)
    positions = torch.tensor([29, 0, 3, 3, 11, 7])
    ours, theirs = rows.clone(), rows.clone()
    layers.rope(theirs[:, :4], positions, angles.cos(), angles.sin())
    native.rope(ours[:, :4], positions, angles.cos(), angles.sin())
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_store_of_strided_rows():
    heads, slots = torch.randn(5, 6, 8), torch.tensor([9, 0, 47])
    ours, theirs = torch.zeros(2, 12, 4, 2, 8), torch.zeros(2, 12, 4, 2, 8)
    native.store_kv(heads[:, 2:4], heads[:, 4:], ours, slots)
    paged_kv.store_kv(heads[:, 2:4], heads[:, 4:], theirs, slots)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("block_ids", "first_layer", "num_layers"), [([4], 0, 1), ([7, 0, 3], 1, 3), ([], 0, 4)]
)
def test_summed_copies_of_blocks(dtype, block_ids, first_layer, num_layers):
    group = torch.randint(-100, 100, (4, 2, 9, 4, 2, 8)).to(dtype)
    slabs = [torch.full((1 << 15,), 7, dtype=torch.uint8) for _ in range(2)]
    where = (block_ids, first_layer, num_layers)
    want = summed_copies.gather_blocks_summed(group, *where, slabs[0])
    assert native.gather_blocks_summed(group, *where, slabs[1]) == want
    assert torch.equal(*slabs)
    pools = [torch.zeros_like(group) for _ in range(2)]
    where = ([2, 8, 5][: len(block_ids)], first_layer, num_layers)
    assert summed_copies.scatter_blocks_summed(pools[0], *where, slabs[0]) == want
    assert native.scatter_blocks_summed(pools[1], *where, slabs[1]) == want
    assert torch.equal(*pools)


def test_summed_copies_that_are_no_whole_words_are_the_references():
    group, slab = torch.randn(2, 2, 5, 1, 1, 3), torch.zeros(256, dtype=torch.uint8)
    num_bytes, total = native.gather_blocks_summed(group, [3, 1], 0, 2, slab)
    assert summed_copies.unsigned(total) == checksums.checksum(slab[:num_bytes])
    aside = torch.zeros(260, dtype=torch.uint8)[4:]
    assert native.gather_blocks_summed(group, [3, 1], 0, 2, aside) == (num_bytes, total)


def paged(context_lens, *, num_kv_heads, head_dim, query_lens=None):
    """A poisoned layer with random contexts in scattered blocks, and the batch that reads them."""
    kv_layer = torch.full((2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim), torch.nan)
    free = torch.randperm(NUM_BLOCKS).tolist()
    tables = [[free.pop() for _ in range(-(-length // BLOCK_SIZE))] for length in context_lens]
    for table, length in zip(tables, context_lens, strict=True):
        slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        paged_kv.store_kv(*torch.randn(2, length, num_kv_heads, head_dim), kv_layer, torch.tensor(slots))
    return kv_layer, AttentionBatch(
        query_lens=query_lens or [1] * len(context_lens),
        context_lens=context_lens,
        block_tables=tables,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("head_dim", [8, 40, 64, 128])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(4, 1), (6, 2), (3, 3)])
def test_paged_attention(head_dim, num_q_heads, num_kv_heads):
    kv_layer, batch = paged(
        [1, 7, 64, 13, 40], num_kv_heads=num_kv_heads, head_dim=head_dim, query_lens=[1, 1, 1, 5, 1]
    )
    q = torch.randn(11, num_q_heads + 2, head_dim)[:, :num_q_heads]
    want = attention.paged_attention(q, kv_layer, batch, head_dim**-0.5)
    out = native.paged_attention(q, kv_layer, batch, head_dim**-0.5)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=2e-6)


def test_large_scores_do_not_overflow_and_nan_stays_in_its_request():
    kv_layer, batch = paged([30, 30], num_kv_heads=2, head_dim=8)
    kv_layer *= 1000
    kv_layer[0, batch.block_tables[1][0], 0] = torch.nan
    q = torch.randn(2, 4, 8)
    out = native.paged_attention(q, kv_layer, batch, 1.0)
    want = attention.paged_attention(q[:1], kv_layer, paged_first(batch), 1.0)
    torch.testing.assert_close(out[:1], want)
    assert out[1].isnan().all()


def paged_first(batch):
    return AttentionBatch(
        query_lens=[1], context_lens=batch.context_lens[:1], block_tables=batch.block_tables[:1],
        block_size=BLOCK_SIZE, device=batch.device,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_take_the_reference(dtype):
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((3, 16), (3, 16), (16,)))
    want = layers.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert torch.equal(native.add_rms_norm(x, residual, weight, 1e-5), want)
    assert torch.equal(native.silu_mul(x), layers.silu_mul(x))


def test_without_a_compiler_there_is_no_library(monkeypatch):
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert native_build.load_library({}) is None


def test_a_compiler_that_fails_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build.shutil, "which", lambda name: "/bin/false")
    assert native_build.load_library({}) is None


def test_a_built_library_is_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs = []

    def compile_nothing(command, **_):
        runs.append(command)
        os.close(os.open(command[command.index("-o") + 1], os.O_CREAT))

    monkeypatch.setattr(subprocess, "run", compile_nothing)
    assert native_build._built("/bin/cat") == native_build._built("/bin/cat")
    assert len(runs) == 1
    assert native_build._built("/bin/cat") != native_build._built("/bin/echo")


def test_a_cache_that_others_can_write_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "tandem" / "kernels"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    with pytest.raises(PermissionError, match="written by others"):
        native_build._cache_directory()


def test_a_copy_holds_the_weights_that_it_reads(monkeypatch):
    """The cache may have another table by then: two threads that lack one make one each."""
    made = []

    def fresh(num_words, device):
        table = checksums.weights(num_words, device).clone()
        made.append(weakref.ref(table))
        return table

    class Library:
        @staticmethod
        def copy_blocks(*arguments):
            assert made[-1]() is not None
            library.copy_blocks(*arguments)

    library = native._library
    monkeypatch.setattr(native, "weights", fresh)
    monkeypatch.setattr(native, "_library", Library)
    group, slab = torch.randn(2, 2, 6, BLOCK_SIZE, 1, 4), torch.empty(1 << 12, dtype=torch.uint8)
    num_bytes, total = native.gather_blocks_summed(group, [4, 1], 0, 2, slab)
    assert summed_copies.unsigned(total) == checksums.checksum(slab[:num_bytes])
    assert len(made) == 1
