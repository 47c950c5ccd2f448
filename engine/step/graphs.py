"""Decode steps that are captured once and replayed: a replay is one launch, whatever a step consists of.

1. At the start each shape is captured over a batch of padding, the largest first, all in one memory pool.
2. A step fills the inputs and replays its shape; what no shape fits runs kernel by kernel (`engine.runner`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.batch import Span
from engine.drawing import Draw
from engine.step.decode_step import DecodeStep, StepLogits
from engine.step.row_order import RowOrder
from engine.step.shapes import StepShape, StepShapes
from engine.step.step_ranks import Alone, StepRanks

NUM_WARM_UPS = 2
"""Runs before a capture: the first compiles kernels and lets libraries allocate."""


class Recorder(Protocol):
    """Makes a function that does again what `run` does, over the same tensors."""

    def record(self, run: Callable[[], StepLogits]) -> Callable[[], StepLogits]:
        """The function returns the same tensors every time, with new content."""
        ...


class Uncaptured:
    """Runs it again; any device."""

    def record(self, run: Callable[[], StepLogits]) -> Callable[[], StepLogits]:
        """See Recorder."""
        return run


class CudaGraphs:
    """Captures CUDA graphs that share their memory: what one returns is valid until another one runs."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], StepLogits]) -> Callable[[], StepLogits]:
        """See Recorder; the graph is replayed on the current stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may look at events meanwhile; that is an error in the default mode.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            made = run()
        result = StepLogits(*map(lent, made))

        def replay() -> StepLogits:
            graph.replay()
            return result

        return replay


def recorder_for(device: torch.device, *, captured: bool) -> Recorder:
    """A new one."""
    return CudaGraphs(device) if captured else Uncaptured()


def lent(tensor: Tensor) -> Tensor:
    """The same memory, which this tensor does not keep: when `tensor` is gone, another graph of its pool may
    have it. A graph writes there whenever it is replayed, whoever else does in between.

    torch's own graphs (torch._inductor.cudagraph_trees) make such tensors by the same call.
    """
    memory = tensor.untyped_storage()
    place = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), tensor.device, memory.nbytes())
    return tensor.new_empty(0).set_(place, tensor.storage_offset(), tensor.shape, tensor.stride())


class StepGraphs:
    """A decode step in each of its shapes."""

    def __init__(
        self, step: DecodeStep, shapes: StepShapes, recorder: Recorder, ranks: StepRanks | None = None
    ) -> None:
        """`ranks`: whom rank 0 runs its steps with."""
        self.shapes = shapes
        self.rows = RowOrder()
        self._ranks = ranks or Alone(step.module)
        self._inputs = step.inputs
        self._step = step
        self._recorder = recorder
        self._replays: dict[StepShape, Callable[[], StepLogits]] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Record every shape; nothing is read or written but padding."""
        with self._ranks.recording():
            for shape in self.shapes:
                self._inputs.fill(shape, [])
                self._replays[shape] = self._recorder.record(partial(self._step.compute, shape))

    def run(
        self,
        shape: StepShape,
        spans: Sequence[Span],
        draws: Sequence[Draw] = (),
        sources: Sequence[int] = (),
    ) -> StepLogits:
        """Start a step over what `StepInputs.fill` takes; its results are on their way when this returns."""
        filled = self._inputs.fill(shape, spans, draws, sources, self._ranks.change)
        with self._ranks.running(shape, filled):
            return self._replays[shape]()

    def check(self) -> None:
        """Assert the invariant of the inputs; no step is on its way."""
        self._inputs.check()

    def repeat(self, shape: StepShape, filled: Tensor) -> None:
        """On another rank: start the step that rank 0 starts with these inputs."""
        self._inputs.take(filled)
        self._replays[shape]()
