import torch

from kernels import ops


def test_add_rms_norm_is_the_norm_of_the_sum_which_stays_in_the_residual():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    total = x + residual
    normed = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (16,), weight, 1e-5))


def test_rope_rotates_pairs_as_complex_numbers_in_place():
    torch.manual_seed(0)
    angles = torch.randn(10, 4)
    rows, positions = torch.randn(3, 4, 8), torch.tensor([9, 0, 4])
    heads, before = rows[:, :3], rows.clone()
    ops.rope(heads, positions, angles.cos(), angles.sin())
    turn = torch.polar(torch.ones(10, 4), angles)[positions].unsqueeze(1)
    turned = torch.complex(before[:, :3, :4], before[:, :3, 4:]) * turn
    torch.testing.assert_close(heads, torch.cat((turned.real, turned.imag), -1))
    assert torch.equal(rows[:, 3], before[:, 3])


def test_silu_mul_gates_the_second_half():
    x = torch.randn(5, 12)
    torch.testing.assert_close(ops.silu_mul(x), x[:, :6] * x[:, :6].sigmoid() * x[:, 6:])
