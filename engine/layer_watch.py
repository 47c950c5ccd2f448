"""Tells, while prompts are computed, which layers have written the KV of their tokens.

A pass over a plain model: the last product of every layer that ends a group says that the layer is done, so
that nothing of it stands in the model file. Layers write KV in their order, so a number says which.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from engine.models.linear import Linear
from engine.models.llama import Llama
from engine.plan import Scheduled

NUM_LAYER_GROUPS = 4
"""In which a step's layers are told of: what nothing hides behind the last one is a quarter of a chunk, and
each group costs a frame and a scatter more."""

Listener = Callable[[Sequence[Scheduled], int], None]
"""Called with chunks of prompts and the number of leading layers whose KV of these chunks is written, for the
target's KV group. On the engine thread, within the step; on a GPU the kernels that write are started."""


class LayerWatch:
    """Who wants to know, and of which chunks; lives on the engine thread."""

    def __init__(self, min_tokens: int) -> None:
        """`min_tokens`: of a chunk that is told of; 0: none is."""
        self._min_tokens = min_tokens
        self._chunks: Sequence[Scheduled] = ()
        self._listener: Listener | None = None

    def listen(self, listener: Listener) -> None:
        """Be told from the next step on."""
        self._listener = listener

    @contextmanager
    def watching(self, plan: Sequence[Scheduled]) -> Iterator[None]:
        """Around the forward pass of a plan; passes outside of it are nobody's business."""
        if self._listener is not None and self._min_tokens:
            self._chunks = [item for item in plan if self._is_long(item)]
        try:
            yield
        finally:
            self._chunks = ()

    def passed(self, num_layers: int) -> None:
        """So many layers of the pass are done."""
        if self._chunks:
            assert self._listener is not None
            self._listener(self._chunks, num_layers)

    def _is_long(self, item: Scheduled) -> bool:
        return item.request.prefill_only and item.query_len >= self._min_tokens


@dataclass(frozen=True)
class Watched:
    """The last product of a layer, and a word that the layer is done."""

    linear: Linear
    watch: LayerWatch
    num_layers: int
    """Done with this one."""

    def apply(self, x: Tensor) -> Tensor:
        """See Linear."""
        y = self.linear.apply(x)
        self.watch.passed(self.num_layers)
        return y


def group_ends(num_layers: int) -> list[int]:
    """Layers that are done at the end of each group; groups are of nearly equal size."""
    num_groups = min(NUM_LAYER_GROUPS, num_layers)
    return [num_layers * (index + 1) // num_groups for index in range(num_groups)]


def watch_layers(module: Llama, min_tokens: int) -> LayerWatch:
    """Make a module tell of its layers; to be called when every other pass is done.

    With several ranks this is rank 0's module: a layer's last product is summed over the ranks, so that all
    have written when it is known.
    """
    watch = LayerWatch(min_tokens)
    if min_tokens:
        for end in group_ends(len(module.layers)):
            layer = module.layers[end - 1]
            layer.down = Watched(layer.down, watch, end)
    return watch
