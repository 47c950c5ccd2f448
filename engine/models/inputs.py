"""What a model's forward pass is told beside its tokens."""

from dataclasses import dataclass

from torch import Tensor

from kernels.attention import AttentionBatch


@dataclass(frozen=True, kw_only=True)
class FinalRows:
    """The rows of a packed batch whose final hidden states are wanted, where they are not all.

    Behind the last layer's keys and values nothing depends on the others: an n-layer model saves most of
    one n-th of a prompt's cost.
    """

    rows: Tensor
    """int64 [num_final]: rows of the batch; one may be named more than once, padding is row 0."""
    attention: AttentionBatch
    """One query for each of `rows`, without the padding."""
