"""Decode steps that are on their way while the host goes on: their tokens are known when they land.

One may be started before the one before it has landed; its tokens then go from step to step on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Span
from engine.drawing import Draw
from engine.plan import Scheduled
from engine.request import Request, RequestState
from engine.sampler import NOT_FINITE, Sample
from engine.step.graphs import StepGraphs
from engine.step.host_copies import HostCopies
from engine.step.inputs import NO_SOURCE

NUM_HOST_COPIES = 2
"""Of drawn tokens: one is read while the next one is on its way."""


@dataclass(frozen=True)
class Flight:
    """A step that was started; row i is item i of its plan."""

    plan: list[Scheduled]
    _arrived: Callable[[], Tensor]

    def samples(self) -> list[Sample]:
        """Wait until it lands: one sample for each item."""
        token_ids, finite = self._arrived()[:, : len(self.plan)].tolist()
        return [
            Sample(token_id) if sound else Sample(-1, error=NOT_FINITE)
            for token_id, sound in zip(token_ids, finite, strict=True)
        ]


class Flights:
    """Starts steps of requests whose tokens are drawn on the device alone."""

    def __init__(self, graphs: StepGraphs, drawn: Tensor) -> None:
        self._graphs = graphs
        self._copies = HostCopies(drawn, NUM_HOST_COPIES)

    def takes(self, plan: Sequence[Scheduled]) -> bool:
        """The plan decodes, draws on the device and fits."""
        return (
            self._graphs.shapes.fit_plan(plan) is not None
            and all(item.request.state is RequestState.RUNNING for item in plan)
            and all(draws_on_device(item.request) for item in plan)
        )

    @torch.inference_mode()
    def start(self, plan: list[Scheduled], before: Flight | None = None) -> Flight:
        """Start a plan that `takes` accepts; what is in `before` too goes on behind the token drawn there."""
        plan = [plan[index] for index in self._graphs.rows.arrange([item.request for item in plan])]
        rows = {item.request: row for row, item in enumerate(before.plan)} if before else {}
        sources = [rows.get(item.request, NO_SOURCE) for item in plan]
        shape = self._graphs.shapes.fit(len(plan), 1)
        assert shape is not None
        spans = [_span(item.request, source) for item, source in zip(plan, sources, strict=True)]
        draws = [Draw.of(item.request) for item in plan]
        self._graphs.run(shape, spans, draws, sources)
        return Flight(plan, self._copies.start())


def draws_on_device(request: Request) -> bool:
    """Nothing but its tokens is wanted of the request's logits, and nothing on the host changes them."""
    params = request.sampling
    is_beam = (request.leader or request).search is not None
    return Draw.of(request).is_fused and not params.edits_logits and params.logprobs is None and not is_beam


def _span(request: Request, source: int) -> Span:
    """The request's last token; if it is still being drawn, that of the flight."""
    if source == NO_SOURCE:
        start = request.num_computed_tokens
        return Span(
            table=request.block_tables[0], start=start, token_ids=request.tokens(start, request.num_tokens)
        )
    return Span(table=request.block_tables[0], start=request.num_tokens, token_ids=[0])
