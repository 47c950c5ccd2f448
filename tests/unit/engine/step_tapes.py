"""Stand-ins for CUDA graphs on a CPU."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import (
    ops,
    triton_launch,
    triton_layers,
    triton_paged_attention,
    triton_rope,
    triton_sampling,
)

TRITON = (
    (triton_layers, "add_rms_norm"),
    (triton_layers, "silu_mul"),
    (triton_rope, "rope_store_kv"),
    (triton_paged_attention, "paged_attention"),
    (triton_sampling, "draw"),
)
"""Operators of a decode step and the modules that they come from on a GPU."""

NO_KERNEL = (
    "empty", "new_empty", "view", "_unsafe_view", "reshape", "slice", "select", "split", "t.", "transpose",
    "unsqueeze", "squeeze", "expand", "as_strided", "alias", "detach",
)  # fmt: skip
"""Operations of torch that start nothing on a device."""


@contextmanager
def operators_of_a_gpu():
    """Triton's operators, in its interpreter, in the places of a CPU's."""
    with mock.patch.multiple(ops, **{name: getattr(module, name) for module, name in TRITON}):
        yield


class Reruns:
    """Runs the recorded function again, into the tensors of its first run, as a graph would."""

    def __init__(self):
        self.num_replays = 0

    def record(self, run):
        kept = run()

        def replay():
            self.num_replays += 1
            for old, new in zip(kept, run(), strict=True):
                old.copy_(new)
            return kept

        return replay


class Tape(TorchDispatchMode):
    """What a CUDA graph holds: operations and launches with the very tensors of their capture, no Python."""

    def __init__(self):
        super().__init__()
        self.played = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        assert name != "_local_scalar_dense", "the host reads a number of the device"
        if not name.startswith(NO_KERNEL):
            self.played.append((name, lambda: _again(func, args, kwargs or {}, result)))
        return result

    def launch(self, launch):
        """Stands in for `Launch.run`: Triton's interpreter must not see this mode."""
        with torch.utils._python_dispatch._disable_current_modes():
            _run(launch)
        self.played.append((launch.kernel.fn.__name__, lambda: _run(launch)))

    def record(self, run):
        with mock.patch.object(triton_launch.Launch, "run", lambda launch: self.launch(launch)), self:
            result = run()
        played, self.played = self.played, []
        self.names = [name for name, _ in played]

        def replay():
            for _, play in played:
                play()
            return result

        return replay


_run = triton_launch.Launch.run


def _again(func, args, kwargs, result):
    """The operation into the memory of its first result; one in place writes there by itself."""
    again = func(*args, **kwargs)
    if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
        result.copy_(again)
