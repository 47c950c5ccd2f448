import inspect
from types import SimpleNamespace

import pytest
import torch

from kernels import (
    layers,
    native,
    paged_kv,
    rope_store,
    sampling,
    summed_copies,
    triton_blocks,
    triton_layers,
    triton_paged_attention,
    triton_rope,
    triton_sampling,
    triton_verification,
    truncation,
    verification,
)
from kernels.by_device import by_device

TWINS = [
    (triton_layers, layers.rms_norm),
    (triton_layers, native.add_rms_norm),
    (triton_layers, native.silu_mul),
    (triton_rope, rope_store.rope_store_kv),
    (triton_blocks, paged_kv.gather_blocks),
    (triton_blocks, paged_kv.scatter_blocks),
    (triton_blocks, summed_copies.gather_blocks_summed),
    (triton_blocks, summed_copies.scatter_blocks_summed),
    (triton_paged_attention, native.paged_attention),
    (triton_sampling, sampling.sample),
    (triton_sampling, truncation.draw),
    (triton_verification, verification.count_accepted),
    (triton_verification, verification.rejection_verify),
]


@pytest.mark.parametrize(("module", "operator"), TWINS)
def test_both_implementations_take_the_same_arguments(module, operator):
    assert inspect.signature(getattr(module, operator.__name__)) == inspect.signature(operator)


def test_the_first_argument_decides(monkeypatch):
    monkeypatch.setattr(triton_layers, "rms_norm", lambda x, weight, eps: "Triton")
    rms_norm = by_device(layers.rms_norm, "triton_layers", has_gpu=True)
    x = torch.randn(2, 3)
    assert torch.equal(rms_norm(x, x[0], 1e-5), layers.rms_norm(x, x[0], 1e-5))
    assert rms_norm(SimpleNamespace(is_cuda=True), x[0], 1e-5) == "Triton"


def test_without_a_gpu_an_operator_is_the_plain_function():
    assert by_device(layers.rms_norm, "triton_layers", has_gpu=False) is layers.rms_norm
