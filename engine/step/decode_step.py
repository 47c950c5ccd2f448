"""What one decode step computes, over buffers that stay in their places.

On several ranks each runs it with its part of the model; the logits are whole on rank 0, which draws.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.models.decoder import Decoder
from engine.step.inputs import NO_SOURCE, StepInputs, StepViews
from engine.step.shapes import StepShape
from kernels import ops


class StepLogits(NamedTuple):
    """Valid until the next step."""

    hidden: Tensor
    """[num_rows, hidden_size], after the final norm."""
    logits: Tensor
    """fp32 [num_rows, vocab_size]; on a rank other than 0 its own columns."""


class DecodeStep:
    """The model over `inputs`. `compute` looks at the shape and at nothing else that changes on the host."""

    def __init__(self, module: Decoder, kv_group: Tensor, inputs: StepInputs) -> None:
        self.inputs = inputs
        self.module = module
        self._kv_group = kv_group

    def compute(self, shape: StepShape) -> StepLogits:
        """Write the KV of the rows that `inputs` holds, and give the logits behind each."""
        views = self.inputs.views(shape)
        return self._forward(views, views.token_ids)

    def _forward(self, views: StepViews, token_ids: Tensor) -> StepLogits:
        hidden = self.module.forward(
            token_ids, views.positions, self._kv_group, views.slots, views.attention()
        )
        return StepLogits(hidden, self.module.logits(hidden))


class DrawingStep(DecodeStep):
    """A step that also draws each row's token, and begins with tokens that the step before has drawn."""

    def __init__(
        self,
        module: Decoder,
        kv_group: Tensor,
        inputs: StepInputs,
        *,
        max_num_rows: int,
        share: Callable[[Tensor], None] = lambda token_ids: None,
    ) -> None:
        """`share`: see engine.step.step_ranks.StepRanks."""
        super().__init__(module, kv_group, inputs)
        self._share = share
        self.drawn = torch.zeros(2, max_num_rows, dtype=torch.int64, device=kv_group.device)
        """Of the newest step: each row's token id, or 0 if its logits were not finite; whether they were."""

    def compute(self, shape: StepShape) -> StepLogits:
        """See DecodeStep; then `drawn` is this step's."""
        views = self.inputs.views(shape)
        sources = views.sources
        token_ids = self.drawn[0].index_select(0, sources.clamp(min=0))
        step = self._forward(views, torch.where(sources == NO_SOURCE, views.token_ids, token_ids))
        self._draw(views, step.logits)
        self._share(self.drawn[0, : shape.num_rows])
        return step

    def _draw(self, views: StepViews, logits: Tensor) -> None:
        token_ids = ops.draw(logits, views.truncation, views.seeds, views.positions + 1, views.choices)
        finite = logits.amax(-1).isfinite()
        self.drawn[0, : len(logits)] = token_ids * finite
        self.drawn[1, : len(logits)] = finite


class FollowingStep(DrawingStep):
    """A `DrawingStep` on another rank than 0; of `drawn` it has the token ids alone."""

    def _draw(self, views: StepViews, logits: Tensor) -> None:
        """Rank 0 does, and shares."""
