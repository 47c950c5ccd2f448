"""Tensor parallelism as a pass over a plain model (Shoeybi et al. 2019, Megatron-LM).

The weights are cut when they are loaded (`engine.parallel.slices`). What is left to do: sum the partial
outputs of row-parallel layers, twice a layer, and put the logits together from each rank's rows.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

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


def parallelize(module: Llama, shard: Shard, group: Group, vocab_size: int) -> None:
    """Join a rank's module to the others'."""
    for layer in module.layers:
        layer.o = RowParallel(layer.o, group)
        layer.down = RowParallel(layer.down, group)
    module.lm_head = VocabParallel(module.lm_head, group, shard.step(vocab_size), vocab_size)
