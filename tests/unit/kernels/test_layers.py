import torch

from kernels import ops


def test_add_rms_norm_is_the_sum_and_its_norm():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x + residual, (16,), weight, 1e-5))
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))


def test_rope_rotates_pairs_as_complex_numbers():
    torch.manual_seed(0)
    angles = torch.randn(10, 4)
    q, k, positions = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.tensor([9, 0, 4])
    turn = torch.polar(torch.ones(10, 4), angles)[positions].unsqueeze(1)
    for x, rotated in zip((q, k), ops.rope(q, k, positions, angles.cos(), angles.sin()), strict=True):
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn
        torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), -1))


def test_silu_mul_gates_the_second_half():
    x = torch.randn(5, 12)
    torch.testing.assert_close(ops.silu_mul(x), x[:, :6] * x[:, :6].sigmoid() * x[:, 6:])
