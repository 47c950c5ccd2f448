"""What the ranks of an engine do together in a step over fixed buffers, as rank 0 sees it.

Every rank has the same buffers and runs the same operations over them, each with its part of weights and KV.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from engine.models.decoder import Decoder
from engine.step.shapes import StepShape


class StepRanks(Protocol):
    """Whoever runs the steps of one `StepSpec`; RankLost if one of them is gone."""

    module: Decoder
    """This rank's part of the model: what a step runs, collective operations included."""

    def recording(self) -> AbstractContextManager[None]:
        """Around the recording of every shape, which all ranks do at the same time in the same order."""
        ...

    def change(self, changes: Tensor) -> None:
        """Before a step: see `changed` of `StepInputs.fill`."""
        ...

    def running(self, shape: StepShape, filled: Tensor) -> AbstractContextManager[None]:
        """Around the start of a step; `filled`: what `StepInputs.fill` has returned."""
        ...

    def share(self, token_ids: Tensor) -> None:
        """Within a step: rank 0's tensor into everybody's."""
        ...


class Alone:
    """One rank."""

    def __init__(self, module: Decoder) -> None:
        self.module = module
        self._nothing = nullcontext()

    def recording(self) -> AbstractContextManager[None]:
        """See StepRanks."""
        return self._nothing

    def change(self, changes: Tensor) -> None:
        """There is nobody else."""

    def running(self, shape: StepShape, filled: Tensor) -> AbstractContextManager[None]:
        """See StepRanks."""
        return self._nothing

    def share(self, token_ids: Tensor) -> None:
        """There is nobody else."""
