"""Tensor parallelism as a pass over a plain model (Shoeybi et al. 2019, Megatron-LM).

The weights are cut when they are loaded (`engine.parallel.slices`). What is left to do: sum the partial
outputs of row-parallel layers, twice a layer, and what each rank has of the embedding, and put the logits
together from each rank's rows.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from engine.models.embedding import Embedding
from engine.models.linear import Linear
from engine.models.llama import Llama
from engine.parallel.groups import Group
from engine.parallel.shard import Shard


@dataclass(frozen=True)
class RowParallel:
    """A layer over this rank's input columns; the output is summed over the ranks."""

    shard: Linear
    group: Group

    def apply(self, x: Tensor) -> Tensor:
        """See Linear."""
        return self.group.all_reduce(self.shard.apply(x))


@dataclass(frozen=True)
class VocabParallel:
    """A layer over this rank's rows of the vocabulary; rank 0 gets all columns, others their own."""

    rows: Linear
    group: Group
    step: int
    """Rows of every rank but the last, which may have fewer."""
    vocab_size: int

    def apply(self, x: Tensor) -> Tensor:
        """See Linear."""
        own = self.rows.apply(x)
        parts = self.group.gather(F.pad(own, (0, self.step - own.shape[1])))
        return own if parts is None else parts.movedim(0, 1).flatten(1)[:, : self.vocab_size].contiguous()


@dataclass(frozen=True)
class VocabParallelEmbedding:
    """A table of this rank's rows of the vocabulary; the vectors of others' tokens come by the sum.

    Each vector is summed with zeros, so it keeps its bits, but for a -0.0, which becomes a 0.0, as it does
    without ranks at the first layer's sum with the residual.
    """

    rows: Embedding
    group: Group
    vocab: range
    """Token ids of the rows."""

    def lookup(self, token_ids: Tensor) -> Tensor:
        """See Embedding."""
        others = (token_ids < self.vocab.start) | (token_ids >= self.vocab.stop)
        own = self.rows.lookup((token_ids - self.vocab.start).masked_fill(others, 0))
        return self.group.all_reduce(own.masked_fill(others.unsqueeze(1), 0))


def parallelize(module: Llama, shard: Shard, group: Group, vocab_size: int) -> None:
    """Join a rank's module to the others'."""
    for layer in module.layers:
        layer.o = RowParallel(layer.o, group)
        layer.down = RowParallel(layer.down, group)
    module.embed = VocabParallelEmbedding(module.embed, group, shard.of(vocab_size))
    module.lm_head = VocabParallel(module.lm_head, group, shard.step(vocab_size), vocab_size)
