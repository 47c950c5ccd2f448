"""Stand-ins for CUDA graphs on a CPU."""

import threading
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
    """Triton's operators, in its interpreter, in the places of a CPU's; tapes hold their launches."""
    operators = {name: getattr(module, name) for module, name in TRITON}
    with mock.patch.multiple(ops, **operators), mock.patch.object(triton_launch.Launch, "run", _launch):
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
    """What a CUDA graph holds: operations and launches with the very tensors of their capture, no Python.

    It records what its own thread does, between `operators_of_a_gpu`.
    """

    recording = threading.local()

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

    def play(self, name, run):
        """Run now and in every replay what no operation of torch is, nor made of them: they are not seen."""
        with torch.utils._python_dispatch._disable_current_modes():
            result = run()
        self.played.append((name, lambda: _into(result, run())))
        return result

    def record(self, run):
        self.recording.tape = self
        with self:
            result = run()
        del self.recording.tape
        played, self.played = self.played, []
        self.names = [name for name, _ in played]

        def replay():
            for _, play in played:
                play()
            return result

        return replay


class TapedGroup:
    """A group whose operations are on the tape of this thread, if there is one."""

    def __init__(self, group):
        self._group = group

    def all_reduce(self, x):
        return self._play("all_reduce", x)

    def gather(self, x):
        return self._play("gather", x)

    def broadcast(self, x):
        return self._play("broadcast", x)

    def __getattr__(self, name):
        return getattr(self._group, name)

    def _play(self, name, x):
        return _play(name, lambda: getattr(self._group, name)(x))


_run = triton_launch.Launch.run
_interpreter = threading.Lock()
"""Triton's knows one kernel at a time."""


def _launch(launch):
    """Stands in for `Launch.run`."""
    _play(launch.kernel.fn.__name__, lambda: _run_alone(launch))


def _play(name, run):
    tape = getattr(Tape.recording, "tape", None)
    return run() if tape is None else tape.play(name, run)


def _run_alone(launch):
    with _interpreter:
        _run(launch)


def _again(func, args, kwargs, result):
    """The operation into the memory of its first result."""
    _into(result, func(*args, **kwargs))


def _into(result, again):
    """What is done in place is there already."""
    if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
        result.copy_(again)
