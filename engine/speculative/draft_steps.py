"""A draft model's passes as steps that are started one behind the other: the host waits once for all tokens.

1. The first pass computes each request's one or two tokens without draft KV, every other one the token that
   the pass before has drawn, which it takes on the device. Places in the KV depend on no token, so the inputs
   of all passes are known beforehand.
2. What each pass has drawn is kept on the device; behind the last pass it comes to the host at once.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.drawing import Draw
from engine.speculative.draft_passes import DraftPasses
from engine.speculative.drafting import USUAL_LAG, Drafting
from engine.speculative.rejection import by_rejection
from engine.step.decode_step import DrawingStep, StepLogits
from engine.step.graphs import StepGraphs
from engine.step.host_copies import HostCopies
from engine.step.inputs import StepViews
from engine.step.shapes import StepShape
from engine.warpers import warp
from kernels.truncation import Truncation
from kernels.verification import DRAFT_STREAM

PENDING = 0
"""Stands for a token that is being drawn."""


class DraftStep(DrawingStep):
    """One pass. Draws, sources and what is drawn belong to requests: one token behind each request's last."""

    def _forward(self, views: StepViews, token_ids: Tensor) -> StepLogits:
        if views.buffers.max_query_len == 1:
            return super()._forward(views, token_ids)
        hidden = self.module.forward(
            token_ids, views.positions, self._kv_group, views.slots, views.attention()
        ).index_select(0, _last_rows(views))
        return StepLogits(hidden, self.module.logits(hidden))

    def _draw(self, views: StepViews, logits: Tensor) -> None:
        if views.buffers.max_query_len > 1:
            views = _of_requests(views)
        super()._draw(views, logits)


def _last_rows(views: StepViews) -> Tensor:
    """int32: the last row of each request, of padding any row; as many as a step of width 1 has."""
    ends = views.buffers.cu_query_lens[1:]
    num_rows = StepShape(len(ends), 1).num_rows
    return F.pad(ends - 1, (0, num_rows - len(ends))).clamp(min=0)


def _of_requests(views: StepViews) -> StepViews:
    """What is drawn behind the requests' last rows."""
    rows = _last_rows(views)
    first = slice(len(rows))
    return replace(
        views,
        positions=views.positions.index_select(0, rows),
        seeds=views.seeds[first],
        choices=views.choices[first],
        truncation=Truncation(*(values[first] for values in views.truncation)),
    )


class DraftSteps:
    """Draws drafts by such steps, `otherwise` what does not fit: more requests, or draws with typical-p."""

    def __init__(
        self,
        graphs: StepGraphs,
        drawn: Tensor,
        otherwise: DraftPasses,
        *,
        max_draft_tokens: int,
        by_rejection: bool,
    ) -> None:
        self._graphs = graphs
        self._drawn = drawn[0]
        self._otherwise = otherwise
        self._by_rejection = by_rejection
        self._all_drawn = drawn.new_zeros(max_draft_tokens, drawn.shape[1])
        """Token ids by pass and row."""
        self._copies = HostCopies(self._all_drawn, 1)

    def draw(self, drafting: Sequence[Drafting]) -> None:
        """See DraftPasses."""
        if self._takes(drafting):
            self._land(self._start(drafting))
        else:
            self._otherwise.draw(drafting)

    def _takes(self, drafting: Sequence[Drafting]) -> bool:
        shape = self._graphs.shapes.fit(len(drafting), USUAL_LAG)
        return shape is not None and all(Draw.of(each.request).is_fused for each in drafting)

    def _start(self, drafting: Sequence[Drafting]) -> list["Pass"]:
        """All passes, each behind the one before; in the drafts, what is drawn is pending."""
        passes: list[Pass] = []
        sources: dict[Drafting, int] = {}
        active = list(drafting)
        while active:
            rows = self._graphs.rows.arrange([each.request for each in active])
            active = [active[index] for index in rows]
            logits = self._run(active, [sources[each] for each in active] if passes else [])
            self._all_drawn[len(passes)].copy_(self._drawn)
            rejecting = [row for row, each in enumerate(active) if self._rejects(each)]
            passes.append(Pass(active, rejecting, logits.clone() if rejecting else None))
            sources = {each: row for row, each in enumerate(active)}
            for each in active:
                each.token_ids.append(PENDING)
            active = [each for each in active if each.wants_more]
        return passes

    def _run(self, active: Sequence[Drafting], sources: Sequence[int]) -> Tensor:
        """Start one pass; its logits [len(active), vocab_size] are valid until the next one starts."""
        draws = [self._draw_of(each) for each in active]
        spans = [each.span() for each in active]
        shape = self._graphs.shapes.fit(len(spans), max(len(span.token_ids) for span in spans))
        assert shape is not None, "what takes the first pass takes all of them"
        return self._graphs.run(shape, spans, draws, sources).logits[: len(spans)]

    def _rejects(self, each: Drafting) -> bool:
        return self._by_rejection and by_rejection(each.request)

    def _draw_of(self, each: Drafting) -> Draw:
        draw = Draw.of(each.request, len(each.token_ids))
        return draw._replace(choice=draw.choice + DRAFT_STREAM) if self._rejects(each) else draw

    def _land(self, passes: Sequence["Pass"]) -> None:
        """Wait for all passes."""
        token_ids = self._copies.start()().tolist()
        for number, each_pass in enumerate(passes):
            for each, token_id in zip(each_pass.drafting, token_ids[number], strict=False):
                each.token_ids[number] = token_id
        _keep_logits(passes)


class Pass(NamedTuple):
    """A pass that was started; row i is that of request i."""

    drafting: list[Drafting]
    rejecting: list[int]
    """Rows of drafts that are judged by rejection."""
    logits: Tensor | None
    """fp32 [len(drafting), vocab_size] if there are such rows."""


def _keep_logits(passes: Sequence[Pass]) -> None:
    """Give the drafts that are judged by rejection what their tokens were drawn from."""
    rows: dict[Drafting, list[Tensor]] = {}
    for drafting, rejecting, logits in passes:
        if logits is None:
            continue
        drawn = [drafting[row] for row in rejecting]
        index = torch.tensor(rejecting, device=logits.device)
        warped = warp(logits.index_select(0, index), [each.request.sampling for each in drawn])
        for each, row in zip(drawn, warped, strict=True):
            rows.setdefault(each, []).append(row)
    for each, kept in rows.items():
        each.logits = torch.stack(kept)
