"""What an engine's steps are fixed to at its start: the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.step.inputs import StepInputs
from engine.step.shapes import StepShapes


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """From equal ones come equal buffers and shapes, recorded in the same order."""

    sizes: tuple[int, ...]
    """Numbers of requests."""
    widths: tuple[int, ...]
    """Queries per request."""
    max_model_len: int
    block_size: int
    draws: bool
    """A step draws its tokens, and the next one takes them from the device."""
    captured: bool
    """As CUDA graphs."""

    @property
    def shapes(self) -> StepShapes:
        """All shapes."""
        return StepShapes(self.sizes, self.widths)

    def inputs(self, device: torch.device) -> StepInputs:
        """Buffers for any of the shapes."""
        shapes = self.shapes
        return StepInputs(
            max_num_seqs=shapes.max_num_seqs,
            max_num_rows=shapes.max_num_rows,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            device=device,
        )

    def arrays(self) -> list[Sequence[int]]:
        """As they travel to another rank."""
        return [self.sizes, self.widths, [self.max_model_len, self.block_size, self.draws, self.captured]]

    @classmethod
    def of(cls, arrays: Sequence[Sequence[int]]) -> "StepSpec":
        """From `arrays`."""
        sizes, widths, (max_model_len, block_size, draws, captured) = arrays
        return cls(
            sizes=tuple(sizes),
            widths=tuple(widths),
            max_model_len=max_model_len,
            block_size=block_size,
            draws=bool(draws),
            captured=bool(captured),
        )
