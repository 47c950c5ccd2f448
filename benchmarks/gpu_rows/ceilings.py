"""What the GPU gives at best: bytes read, bytes copied, products, and the gap between two kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_rows.bench import COPY, GAP, MATRIX, READ, Bench, RowFunctions
from benchmarks.gpu_rows.row import Measured
from benchmarks.gpu_rows.timing import time_device

MODEL_PRODUCTS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
"""In and out features of the 8B shape's layers."""


def rows(bench: Bench) -> RowFunctions:
    """See catalogue.ceilings."""
    return {
        READ: lambda: read_bandwidth(bench),
        COPY: lambda: copy_bandwidth(bench),
        MATRIX: lambda: matrix_product(bench),
        GAP: lambda: empty_kernel(bench),
    }


def read_bandwidth(bench: Bench) -> Measured:
    """The best of several ways to read a large tensor once: a ceiling that is too low flatters everything."""
    data = torch.empty(bench.pick(1 << 30, 1 << 17), dtype=torch.float32, device=bench.device).normal_()
    rates = {name: data.nbytes / time_device(bench, [call]).seconds for name, call in _readers(data).items()}
    best = max(rates, key=lambda name: rates[name])
    details = {name: round(rate * 1e-9, 1) for name, rate in rates.items()}
    return Measured(value=rates[best] * 1e-9, details={"bytes": data.nbytes, "GB/s": details})


def _readers(data: Tensor) -> dict[str, Callable[[], object]]:
    readers: dict[str, Callable[[], object]] = {"torch.sum": data.sum, "torch.amax": data.amax}
    if data.is_cuda:
        from benchmarks.gpu_rows.read_kernel import read_launch

        for tile in (4096, 8192):
            readers[f"triton, {tile} at a time"] = read_launch(data, tile).run
    return readers


def copy_bandwidth(bench: Bench) -> Measured:
    """Bytes read plus bytes written."""
    source = torch.empty(bench.pick(1 << 30, 1 << 16), dtype=torch.float32, device=bench.device).normal_()
    target = torch.empty_like(source)
    timing = time_device(bench, [lambda: target.copy_(source)])
    return Measured(value=2 * source.nbytes / timing.seconds * 1e-9, details=timing.details)


def matrix_product(bench: Bench) -> Measured:
    """8192 x 8192 x 8192 on random data; the products of a model's layers beside it."""
    size = bench.pick(8192, 64)
    timing, rate = _product(bench, size, size, size)
    tokens, cut = bench.pick(8192, 64), bench.pick(1, 64)
    beside = {
        name: round(_product(bench, tokens, k // cut, n // cut)[1] * 1e-12, 1)
        for name, (k, n) in MODEL_PRODUCTS.items()
    }
    return Measured(value=rate * 1e-12, details={"seconds": timing, "8B layers, TFLOP/s": beside})


def _product(bench: Bench, m: int, k: int, n: int) -> tuple[float, float]:
    """(seconds, operations per second) of x @ weight.T."""
    x = torch.empty(m, k, dtype=bench.dtype, device=bench.device).normal_()
    weight = torch.empty(n, k, dtype=bench.dtype, device=bench.device).normal_()
    out = torch.empty(m, n, dtype=bench.dtype, device=bench.device)
    seconds = time_device(bench, [lambda: torch.mm(x, weight.T, out=out)], rounds=10).seconds
    return seconds, 2.0 * m * k * n / seconds


def empty_kernel(bench: Bench) -> Measured:
    """One kernel with next to nothing to do, in a chain of a thousand."""
    x = torch.ones(32, device=bench.device)
    timing = time_device(bench, [lambda: x.mul_(1.0)] * bench.pick(1000, 10))
    return Measured(value=timing.seconds * 1e6, details=timing.details)
