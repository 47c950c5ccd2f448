"""A GPU in host memory: tensors that say they are on `cuda:0`, hold their data on the CPU and break the rules
that a GPU has, so that the code for GPUs runs whole, with its kernels in Triton's interpreter.

What it finds: operations over host and device memory at once; host code that reads the device where it must
not (within a capture) or where nobody expects it (`Device.waits` has every place); fresh device memory that
is read before it is written (it holds NaN); copies that are still on their way while their host memory is
written or read; kernels that would be compiled while requests wait (`Device.variants`).

Streams have no order of their own here: everything runs at once. A copy that nobody waits for is the one
exception (`Device.in_flight`).
"""

import ctypes
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda:0")
ROOT = Path(__file__).resolve().parent.parent.parent
COPIES = {"copy_", "to", "_to_copy", "cpu"}
READS = {"_local_scalar_dense", "item"}
SHAPES = {
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "repeat_interleave",
    "bincount",
    "equal",
    "is_nonzero",
}
"""The host waits for them: the size of a result, or a verdict, depends on data."""
MIXABLE = {"index", "index_put_", "_index_put_impl_"}
"""Indices on the host are sent by torch itself."""
NOT_FOR_FLOAT8 = {"index_select", "index_copy_", "index_put_"}
"""Of torch 2.11 on a GPU."""
WITHOUT_DEVICE = {"lift_fresh", "detach_", "detach", "alias"}


class MixedDevices(RuntimeError):
    """What torch raises for a kernel over host and device memory."""


class IllegalInCapture(RuntimeError):
    """What CUDA answers when a stream that is captured must not do this."""


class DeviceTensor(torch.Tensor):
    """On the device; `host` holds the data."""

    @staticmethod
    def __new__(cls, host):
        with torch.inference_mode(False):  # or views of older tensors could not be made
            made = torch.Tensor._make_wrapper_subclass(
                cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(),
                dtype=host.dtype, device=DEVICE,
            )  # fmt: skip
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert Device.active is not None, "the device is gone"
        return Device.active.run(func, args, kwargs or {})

    def data_ptr(self):
        return self.host.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"cuda({self.host})"


@dataclass(eq=False)
class Copy:
    """On its way between pinned memory and the device."""

    source: torch.Tensor
    target: torch.Tensor
    content: torch.Tensor
    to_host: bool

    def land(self):
        if self.to_host:
            self.target.copy_(self.content)
        else:
            same = torch.equal(_bits(self.source), _bits(self.content))
            assert same, "host memory was written too early"


class Device(TorchDispatchMode):
    """The machine: as a context, everything in it runs on this GPU."""

    active = None

    def __init__(self, *, dry=False):
        """`dry`: no kernel of Triton's runs, what it would have written holds zeros."""
        super().__init__()
        self.dry = dry
        self.waits = Counter()
        """(kind, "file:function") of everything that the host waits for: `upload` of pageable memory,
        `download`, `read` of a number, `shape`."""
        self.launches = Counter()
        """Of Triton's kernels, by name."""
        self.variants = set()
        """What each launch would be compiled for."""
        self.in_flight = []
        self.capture = None
        self._pinned = {}
        """Storages by their places, which they keep for themselves."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func.name().removeprefix("aten::").partition(".")[0]
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        on_device = [each for each in given if isinstance(each, DeviceTensor)]
        target = kwargs.get("device")
        goes_there = target is not None and torch.device(target).type == "cuda"
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
            if not goes_there:
                return self._pin(_plain(func, args, kwargs))
        if name in COPIES and (on_device or _device_of(name, args, kwargs) == "cuda"):
            return self._copy(func, name, args, kwargs)
        if not on_device and not goes_there:
            return func(*args, **kwargs)
        if name not in WITHOUT_DEVICE and target is None:
            self._check(name, given, on_device)
        if target is not None and not goes_there:  # torch.empty_like(x, device="cpu")
            return _plain(func, args, kwargs)
        if goes_there:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return self._compute(func, name, args, kwargs)

    def _check(self, name, given, on_device):
        elsewhere = [each for each in given if not isinstance(each, DeviceTensor)]
        if [each for each in elsewhere if each.ndim > 0]:
            if name not in MIXABLE:
                raise MixedDevices(f"{name}: expected all tensors to be on the same device")
            self.wait("upload")
        if name in NOT_FOR_FLOAT8 and any(map(_is_float8, given)):
            raise NotImplementedError(f"{name} of float8")
        if name in READS:
            self.wait("read")
        masks = [each for each in on_device[1:] if each.dtype == torch.bool] if name in MIXABLE else []
        if name in SHAPES or masks:
            self.wait("shape")

    def _compute(self, func, name, args, kwargs):
        result = _plain(func, args, kwargs)
        if name in READS or name in ("equal", "is_nonzero"):
            return result
        if name.startswith(("empty", "new_empty")):
            with _disable_current_modes():
                result.zero_() if self.dry else poison(result)
        elif self.capture is not None and not _is_view(func):
            self.capture.operation(func, *_hosts((args, kwargs)), result)
        known = {
            id(each.host): each for each in tree_flatten((args, kwargs))[0] if isinstance(each, DeviceTensor)
        }
        return tree_map_only(
            torch.Tensor, lambda each: known[id(each)] if id(each) in known else DeviceTensor(each), result
        )

    def _copy(self, func, name, args, kwargs):
        source = args[1] if name == "copy_" else args[0]
        target = args[0] if name == "copy_" else None
        to_device = (
            isinstance(target, DeviceTensor) if name == "copy_" else _device_of(name, args, kwargs) == "cuda"
        )
        from_device = isinstance(source, DeviceTensor)
        if to_device == from_device:
            return self._compute(func, name, args, _on_host(kwargs))
        pinned = source if to_device else target
        is_async = (
            bool(kwargs.get("non_blocking") or args[2:3] == (True,)) and _place_of(pinned) in self._pinned
        )
        if not is_async:
            self.wait("upload" if to_device else "download")
        elif self.capture is not None:
            raise IllegalInCapture("a copy of host memory would be replayed from the same place")
        result = _plain(func, args, _on_host(kwargs))
        if is_async:
            self._send(source, target, to_device)
        return target if name == "copy_" else DeviceTensor(result) if to_device else result

    def _send(self, source, target, to_device):
        if to_device:
            self.in_flight.append(Copy(source, target.host, source.clone(), False))
        else:
            content = target.clone()
            poison(target)
            self.in_flight.append(Copy(source.host, target, content, True))

    def _pin(self, tensor):
        self._pinned[_place_of(tensor)] = tensor.untyped_storage()
        return tensor

    def wait(self, kind):
        """The host waits for the device's current stream."""
        if self.capture is not None:
            raise IllegalInCapture(f"{kind} within a capture, at {_place()}")
        self.waits[kind, _place()] += 1
        self.land(len(self.in_flight))

    def land(self, count):
        """The first so many copies have arrived."""
        arrived, self.in_flight = self.in_flight[:count], self.in_flight[count:]
        with _disable_current_modes():
            for copy in arrived:
                copy.land()

    def __enter__(self):
        Device.active = self
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        Device.active = None


def poison(result):
    """Fresh memory holds anything."""

    def fill(tensor):
        if tensor.dtype != torch.bool and tensor.dtype.itemsize + tensor.dtype.is_floating_point > 1:
            tensor.fill_(torch.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max // 3)

    with _disable_current_modes():
        tree_map_only(torch.Tensor, fill, result)


def device_guard():
    """Lets torch's own device guards pass in a build without CUDA: a CPU's guard, which does nothing.

    It does not know the current device either: devices are named with their number, "cuda:0".
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")


def _plain(func, args, kwargs):
    with _disable_current_modes():
        args, kwargs = _hosts((args, kwargs))
        return func(*args, **kwargs)


def _hosts(tree):
    return tree_map_only(DeviceTensor, lambda each: each.host, tree)


def _on_host(kwargs):
    return {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs


def _device_of(name, args, kwargs):
    if name == "cpu":
        return "cpu"
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type
    named = [each for each in args[1:] if isinstance(each, (torch.device, torch.Tensor))]
    if named:
        return (named[0].device if isinstance(named[0], torch.Tensor) else named[0]).type
    return args[0].device.type


def _place_of(tensor):
    return tensor.untyped_storage().data_ptr()


def _is_float8(tensor):
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1


def _is_view(func):
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def _place():
    """Who of ours asked."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parts[len(ROOT.parts)] not in ("tests", ".venv"):
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
