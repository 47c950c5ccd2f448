"""Norms, SwiGLU and rotary embedding in Triton against plain torch; `-m gpu` runs the same tests compiled."""

import pytest
import torch

from kernels import layers, rope_store, triton_layers, triton_rope
from kernels.rope_store import HeadNorms
from tests.unit.kernels.exactness import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(device, *shape, dtype=torch.float32):
    return torch.randn(shape).to(device, dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "hidden"), [(1, 1), (1, 49), (3, 64), (2, 1000), (1, 4097)])
def test_norms(device, num_rows, hidden, dtype):
    x, residual = randn(device, 2, num_rows, hidden, dtype=dtype)
    weight = randn(device, hidden, dtype=dtype)
    exact = layers.rms_norm(x.double(), weight.double(), 1e-5)
    plain = layers.rms_norm(x, weight, 1e-5)
    assert_as_exact_as_torch(triton_layers.rms_norm(x, weight, 1e-5), plain, exact)

    total = residual.double() + x
    exact = layers.rms_norm(total, weight.double(), 1e-5)
    plain_total = residual.clone()
    plain = layers.add_rms_norm(x, plain_total, weight, 1e-5)
    out = triton_layers.add_rms_norm(x, residual, weight, 1e-5)
    assert_as_exact_as_torch(out, plain, exact)
    assert_as_exact_as_torch(residual, plain_total, total)


def test_norm_of_rows_of_a_wider_tensor(device):
    x, weight = randn(device, 3, 100)[:, 20:69], randn(device, 49)
    out = triton_layers.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out, layers.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (3, 49), (2, 1000), (1, 1025)])
def test_silu_mul(device, num_rows, width, dtype):
    gate_up = 4 * randn(device, num_rows, 2 * width, dtype=dtype)
    out, plain = triton_layers.silu_mul(gate_up), layers.silu_mul(gate_up)
    assert_as_exact_as_torch(out, plain, layers.silu_mul(gate_up.double()))


def test_silu_of_large_numbers(device):
    gate_up = torch.tensor([[-100.0, 100.0, 0.0, 3.0, 4.0, torch.nan]], device=device)
    out = triton_layers.silu_mul(gate_up)
    torch.testing.assert_close(out, layers.silu_mul(gate_up), equal_nan=True)


HEADS = [(4, 2, 64), (7, 1, 80), (1, 1, 2), (3, 3, 96)]


def batch(device, heads, dtype):
    """(heads [5, …], positions, cos and sin, one layer of a pool of NaN, slots of the first three rows)."""
    num_q_heads, num_kv_heads, head_dim = heads
    angles = randn(device, 20, head_dim // 2)
    pool = torch.full((3, 2, 4, 8, num_kv_heads, head_dim), torch.nan, dtype=dtype, device=device)
    return (
        randn(device, 5, num_q_heads + 2 * num_kv_heads, head_dim, dtype=dtype),
        torch.tensor([3, 19, 0, 7, 1], device=device),
        angles.cos(),
        angles.sin(),
        pool[1],
        torch.tensor([9, 0, 31], device=device),
    )


def rope_store_of(kernel, arguments, norms):
    """(q heads, what the pool became)."""
    packed, positions, cos, sin, kv_layer, slots = arguments
    packed, kv_layer = packed.clone(), kv_layer.clone()
    kernel(packed, positions, cos, sin, kv_layer, slots, norms)
    return packed[:, : -2 * kv_layer.shape[3]], kv_layer


def doubled(arguments):
    return [each.double() if each.is_floating_point() else each for each in arguments]


def plain_rope_store(packed, positions, cos, sin, kv_layer, slots, norms):
    """In any dtype, fp64 included."""
    num_kv_heads = kv_layer.shape[3]
    q, k, v = packed.tensor_split((-2 * num_kv_heads, -num_kv_heads), 1)
    for part, weight in ((q, norms and norms.q_weight), (k, norms and norms.k_weight)):
        if norms:
            part.copy_(layers.rms_norm(part, weight.to(part.dtype), norms.eps))
        first, second = part.to(cos.dtype).chunk(2, -1)
        c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        part.copy_(torch.cat((first * c - second * s, second * c + first * s), -1))
    slot_rows = kv_layer.flatten(1, 2)
    slot_rows[0, slots], slot_rows[1, slots] = k[: len(slots)], v[: len(slots)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_store(device, heads, dtype, normed):
    arguments = batch(device, heads, dtype)
    weights = randn(device, 2, heads[2], dtype=dtype)
    norms = HeadNorms(weights[0], weights[1], 1e-6) if normed else None
    ours = rope_store_of(triton_rope.rope_store_kv, arguments, norms)
    plain = rope_store_of(rope_store.rope_store_kv, arguments, norms)
    exact = rope_store_of(plain_rope_store, doubled(arguments), norms)
    written = ~plain[1].isnan()
    assert torch.equal(~ours[1].isnan(), written)
    assert torch.equal(ours[1][1][written[1]], plain[1][1][written[1]])
    assert_as_exact_as_torch(ours[0], plain[0], exact[0])
    assert_as_exact_as_torch(*(result[1][written] for result in (ours, plain, exact)))


def test_slots_lie_at_64_bit_addresses(device, far_apart):
    packed, positions, cos, sin, _, _ = batch(device, (2, 1, 64), torch.float16)
    num_blocks = 2**31 // 64 + 2
    pool = far_apart((num_blocks + 1) * 64, torch.float16).view(-1, 1, 1, 64)
    # The sides overlap but for a block, to save memory on a GPU.
    kv_layer = pool.as_strided((2, num_blocks, 1, 1, 64), (64, 64, 64, 64, 1))
    slots = torch.tensor([num_blocks - 1], device=device)
    triton_rope.rope_store_kv(packed, positions, cos, sin, kv_layer, slots)
    assert torch.equal(pool[-1, 0, 0], packed[0, 3])
    assert pool[-2].count_nonzero() > 0
    assert not pool[:1000].any()


def test_negative_slots_are_no_slots(device):
    *arguments, kv_layer, _ = batch(device, HEADS[0], torch.float32)
    arguments[0][1:3] = torch.nan
    triton_rope.rope_store_kv(*arguments, kv_layer, torch.tensor([5, -1, -1], device=device))
    slots = kv_layer.flatten(1, 2)
    assert slots[:, 5].isfinite().all()
    assert slots.isfinite().sum() == slots[:, 5].numel()
