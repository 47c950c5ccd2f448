"""How long the device is at work within a stretch of time, from torch's profiler."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_rows.bench import Bench


class Busy(NamedTuple):
    """What the device did."""

    seconds: float
    """In which at least one kernel or copy ran."""
    num_kernels: int


def busy(bench: Bench, run: Callable[[], object]) -> Busy:
    """Of one run. The profiler slows the host down but not the kernels: only their own time is used."""
    on_gpu = bench.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as record:
        run()
        bench.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in record.events()
        if event.device_type == wanted
    ]
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    return Busy(covered(spans) * 1e-6, len(spans))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
