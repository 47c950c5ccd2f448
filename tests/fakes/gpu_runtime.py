"""What `torch.cuda` and Triton's launches are on the GPU of `tests.fakes.gpu`."""

import contextlib
import importlib
import inspect
import sys
import types
import warnings
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from engine.step import graphs
from kernels import ops, triton_attention, triton_launch
from tests.fakes.gpu import DEVICE, Device, DeviceTensor, IllegalInCapture, device_guard

MEMORY_BYTES = 1 << 26
_run_launch = triton_launch.Launch.run


class Stream:
    """Everything has run already."""

    def __init__(self, device=None, priority=0):
        self.device = torch.device(device) if device is not None else DEVICE

    def wait_stream(self, other):
        assert isinstance(other, Stream)

    def synchronize(self):
        synchronize(self.device)


class Event:
    """Behind the copies that were on their way when it was recorded."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self._behind = []

    def record(self, stream=None):
        if Device.active.capture is not None:
            raise IllegalInCapture("an event of the host")
        self._behind = list(Device.active.in_flight)

    def query(self):
        return True

    def synchronize(self):
        left = [number for number, copy in enumerate(Device.active.in_flight) if copy in self._behind]
        Device.active.land(max(left, default=-1) + 1)


class CUDAGraph:
    """Operations and launches with the very memory of their capture."""

    def __init__(self):
        self._played = []

    def capture_begin(self, pool=None, capture_error_mode="global", **_):
        assert Device.active.capture is None
        Device.active.capture = self

    def capture_end(self):
        Device.active.capture = None

    def replay(self):
        with _disable_current_modes():
            for play in self._played:
                play()

    def operation(self, func, args, kwargs, result):
        self._played.append(partial(_again, func, args, kwargs, result))

    def launch(self, launch):
        self._played.append(partial(_run_launch, launch))


def _again(func, args, kwargs, results):
    for new, old in zip(*(tree_flatten(each)[0] for each in (func(*args, **kwargs), results)), strict=True):
        if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
            old.copy_(new)


def run_launch(launch):
    """Stands in for `Launch.run`."""
    device = Device.active
    tensors = {name: each for name, each in launch.args.items() if isinstance(each, torch.Tensor)}
    for name, each in tensors.items():
        assert isinstance(each, DeviceTensor), f"{launch.kernel.fn.__name__}: {name} is on the host"
    for extent, most in zip(launch.grid, (2**31 - 1, 65535, 65535), strict=False):
        assert 0 <= extent <= most, f"{launch.kernel.fn.__name__}: grid {launch.grid}"
    device.launches[launch.kernel.fn.__name__] += 1
    device.variants.add(variant(launch))
    args = {name: each.host if name in tensors else each for name, each in launch.args.items()}
    on_host = triton_launch.Launch(
        kernel=launch.kernel, grid=launch.grid, args=args, constexprs=launch.constexprs,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if device.dry:
        if not triton_launch.INTERPRETED:
            compile_launch(on_host)
        return
    with _disable_current_modes(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN in memory that nobody asks for
        _run_launch(on_host)
    if device.capture is not None:
        device.capture.launch(on_host)


class Driver:
    """Triton's, for a GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_launch(launch):
    """All that a launch does, by Triton's own path, but for the launch."""
    with _disable_current_modes():
        launch.kernel.warmup(
            **launch.args, **launch.constexprs, num_warps=launch.num_warps, num_stages=launch.num_stages,
            grid=launch.grid,
        )  # fmt: skip


def variant(launch):
    """What Triton compiles a kernel for: types, and of integers and places whether they are 1 and whether
    they are multiples of 16 (triton.runtime.jit, native_specialize_impl)."""
    fixed = getattr(launch.kernel, "kwargs", {}).get("do_not_specialize") or ()
    return (
        launch.kernel.fn.__name__, launch.num_warps, launch.num_stages,
        tuple((name, _specialized(name, each, fixed)) for name, each in launch.args.items()),
        tuple(launch.constexprs.items()),
    )  # fmt: skip


def _specialized(name, value, fixed):
    if isinstance(value, torch.Tensor):
        return str(value.dtype) if name in fixed else (str(value.dtype), value.data_ptr() % 16 == 0)
    if isinstance(value, float):
        return "fp32"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind if name in fixed else (kind, "1" if value == 1 else value % 16 == 0)


def synchronize(device=None):
    if Device.active.capture is not None:
        raise IllegalInCapture("synchronize")
    Device.active.land(len(Device.active.in_flight))


def mem_get_info(device=None):
    return MEMORY_BYTES, MEMORY_BYTES


@contextlib.contextmanager
def _stream(stream):
    yield


def _to_device(make):
    """torch.tensor and its like build on the host with all modes off."""

    def made(data, *args, device=None, **kwargs):
        tensor = make(data, *args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


PROPERTIES = types.SimpleNamespace(multi_processor_count=132, uuid="GPU-0")
FUNCTIONS = {
    "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "stream": _stream, "synchronize": synchronize,
    "current_stream": Stream, "set_stream": lambda stream: None, "set_device": lambda device: None,
    "graph_pool_handle": lambda: (0, 1), "_lazy_init": lambda: None, "is_available": lambda: True,
    "device_count": lambda: 1, "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": mem_get_info, "memory_allocated": lambda device=None: 0, "empty_cache": lambda: None,
    "max_memory_allocated": lambda device=None: 1 << 20, "reset_peak_memory_stats": lambda device=None: None,
}  # fmt: skip


def operators_of_a_gpu():
    """`kernels.ops` as it is where there is a GPU."""
    names = ("kernels.by_device", "kernels.ops")
    with mock.patch.dict(sys.modules), mock.patch.object(torch.cuda, "is_available", return_value=True):
        for name in names:
            del sys.modules[name]
        fresh = importlib.import_module("kernels.ops")
    return {name: each for name, each in vars(fresh).items() if inspect.isfunction(each)}


@contextlib.contextmanager
def gpu(*, dry=False):
    """A machine with one GPU, which is given; see Device."""
    registry = device_guard()
    with contextlib.ExitStack() as stack:
        if not triton_launch.INTERPRETED:
            driver.set_active(Driver())
        stack.callback(registry.__setitem__, 1, registry[1])
        registry[1] = registry[0]
        stack.enter_context(mock.patch.multiple(ops, **operators_of_a_gpu()))
        stack.enter_context(mock.patch.multiple(torch.cuda, **FUNCTIONS))
        stack.enter_context(mock.patch.object(torch._C, "_host_emptyCache", create=True))
        stack.enter_context(mock.patch.object(graphs, "lent", lambda tensor: tensor))
        stack.enter_context(mock.patch.object(triton_launch.Launch, "run", run_launch))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _to_device(getattr(torch, name))))
        for cached in (triton_attention.compute_capability, triton_attention.num_multiprocessors):
            stack.callback(cached.cache_clear)
        yield stack.enter_context(Device(dry=dry))
