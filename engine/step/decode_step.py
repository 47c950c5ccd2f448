"""What one decode step computes, over buffers that stay in their places."""

from typing import NamedTuple

from torch import Tensor

from engine.models.decoder import Decoder
from engine.step.inputs import StepInputs
from engine.step.shapes import StepShape


class StepLogits(NamedTuple):
    """Valid until the next step."""

    hidden: Tensor
    """[num_rows, hidden_size], after the final norm."""
    logits: Tensor
    """fp32 [num_rows, vocab_size]."""


class DecodeStep:
    """The model over `inputs`. `compute` looks at the shape and at nothing else that changes on the host."""

    def __init__(self, module: Decoder, kv_group: Tensor, inputs: StepInputs) -> None:
        self.inputs = inputs
        self._module = module
        self._kv_group = kv_group

    def compute(self, shape: StepShape) -> StepLogits:
        """Write the KV of the rows that `inputs` holds, and give the logits behind each."""
        views = self.inputs.views(shape)
        hidden = self._module.forward(
            views.token_ids, views.positions, self._kv_group, views.slots, views.attention()
        )
        return StepLogits(hidden, self._module.logits(hidden))
