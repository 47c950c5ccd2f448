"""What the engine asks of a model, whichever processes compute it."""

from typing import Protocol

from torch import Tensor

from engine.models.inputs import FinalRows
from kernels.attention import AttentionBatch


class Decoder(Protocol):
    """Packed tokens in, hidden states out; see engine.models.llama.Llama for shapes."""

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_group: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        final: FinalRows | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [n, h] or of `final` alone; writes the new tokens' KV into
        their slots."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [n, vocab_size] of hidden states [n, h]."""
        ...
