"""The table of token vectors."""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Embedding(Protocol):
    """One vector for each token id."""

    def lookup(self, token_ids: Tensor) -> Tensor:
        """token_ids: int64 [n] -> [n, hidden_size]."""
        ...


@dataclass(frozen=True)
class PlainEmbedding:
    """All vectors in one table."""

    weight: Tensor
    """[vocab_size, hidden_size]."""

    def lookup(self, token_ids: Tensor) -> Tensor:
        """See Embedding."""
        return F.embedding(token_ids, self.weight)
