"""The shapes that decode steps are padded to, so that few of them serve every batch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from engine.batch import MIN_ROWS
from engine.plan import Scheduled

MAX_STEP_ROWS = 1024
"""Of a padded step: a batch with more rows has work enough to hide its launches, and its logits are large."""

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 1025, 64))
"""Numbers of requests that a step is padded to unless the operator names others; at most an eighth is padding
in steps of 64 requests and more."""

WIDTHS = (1, 2, 4, 8)
"""Queries per request that a step with draft tokens is padded to; none is above the decode kernel's most."""


@dataclass(frozen=True, order=True)
class StepShape:
    """What a captured step is fixed to."""

    num_seqs: int
    """Requests, padding included."""
    width: int
    """Most queries of a request: 1, or with draft tokens 1 + their number."""

    @property
    def num_rows(self) -> int:
        """Rows of the packed batch, padding included."""
        return max(self.num_seqs * self.width, MIN_ROWS)


class StepShapes:
    """Every shape of an engine."""

    def __init__(self, sizes: Iterable[int], widths: Iterable[int]) -> None:
        self._sizes = sorted(set(sizes))
        self._widths = sorted(set(widths))

    def __iter__(self) -> Iterator[StepShape]:
        """The largest first: what is captured later fits into the memory of what was captured before."""
        shapes = [StepShape(size, width) for size in self._sizes for width in self._widths]
        shapes = [shape for shape in shapes if shape.num_rows <= MAX_STEP_ROWS]
        return iter(sorted(shapes, key=lambda shape: shape.num_rows, reverse=True))

    @property
    def max_num_seqs(self) -> int:
        """Requests of the largest shapes."""
        return self._sizes[-1]

    @property
    def max_num_rows(self) -> int:
        """Rows of the largest shapes."""
        return max(shape.num_rows for shape in self)

    def fit(self, num_seqs: int, width: int) -> StepShape | None:
        """The smallest shape that takes so many requests with so many queries each; None: there is none."""
        size = next((each for each in self._sizes if each >= num_seqs), None)
        wide = next((each for each in self._widths if each >= width), None)
        if size is None or wide is None:
            return None
        shape = StepShape(size, wide)
        return shape if shape.num_rows <= MAX_STEP_ROWS else None

    def fit_plan(self, plan: Sequence[Scheduled]) -> StepShape | None:
        """The shape that a plan is padded to; None: it has prompts, or is too large."""
        if not plan or not all(is_decode(item) for item in plan):
            return None
        return self.fit(len(plan), max(item.num_rows for item in plan))


def is_decode(item: Scheduled) -> bool:
    """One new token, with which the sequence is complete, and one sample behind it and behind each draft."""
    return item.query_len == 1 and item.samples and len(item.request.samplers) == 1 and not item.scored


def usual_sizes(max_num_seqs: int) -> list[int]:
    """SIZES as far as batches go, the largest batch included."""
    return [size for size in SIZES if size < max_num_seqs] + [min(max_num_seqs, SIZES[-1])]


def widths(max_draft_tokens: int) -> list[int]:
    """WIDTHS as far as drafts go."""
    wide = next((width for width in WIDTHS if width > max_draft_tokens), WIDTHS[-1])
    return [width for width in WIDTHS if width <= wide]
