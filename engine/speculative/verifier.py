"""From the logits of a step with draft tokens to samples: which draft tokens are kept, and what follows.

By the coupled law a draft token is kept if it is the token that the target draws at its place. Whoever edits
logits by what was sampled before (penalties, grammars, bad words, min_tokens) is judged place by place: the
next one is sampled when the token before it is known, by the same code and with the same state as without a
draft. All others are sampled at once.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.plan import Scheduled
from engine.request import Request
from engine.sampler import Sample, Sampler
from engine.speculative import rejection
from engine.speculative.proposer import Draft
from kernels import ops


class Row(NamedTuple):
    """A row of the logits, and whose next token but `ahead` it gives."""

    number: int
    request: Request
    ahead: int


class Drafted(NamedTuple):
    """A request with its draft; the row behind its sequence is the first, a row per draft token follows."""

    request: Request
    draft: Draft
    first_row: int

    def rows(self) -> list[Row]:
        """All of them."""
        return [Row(self.first_row + i, self.request, i) for i in range(len(self.draft.token_ids) + 1)]


class Verifier:
    """Samples a step; the law is one of the engine."""

    def __init__(self, sampler: Sampler, *, by_rejection: bool) -> None:
        self._sampler = sampler
        self._by_rejection = by_rejection

    def sample(self, logits: Tensor, plan: Sequence[Scheduled], drafts: Sequence[Draft]) -> list[Sample]:
        """One sample for each of `Request.samplers`, in plan order; a draft's are chained in one.

        logits: fp32 [num_rows, vocab_size], as `engine.batch.build_batch` orders the rows; drafts: one for
        each item of the plan.
        """
        if not any(draft.token_ids for draft in drafts):
            requests = [each for item in plan if item.samples for each in item.request.samplers]
            return self._sampler.sample(logits, requests)
        plain, drafted = _places(plan, drafts)
        rejecting = [each for each in drafted if self._rejects(each.request)]
        others = [each for each in drafted if not self._rejects(each.request)]
        at_once = [each for each in others if not each.request.sampling.edits_logits]
        stepwise = [each for each in others if each.request.sampling.edits_logits]
        rows = [
            *plain,
            *(row for each in at_once for row in each.rows()),
            *(each.rows()[0] for each in stepwise),
        ]
        sampled = self._draw(logits, sorted(rows, key=lambda row: row.number))
        for each, samples in [
            *zip(at_once, _accept(at_once, sampled), strict=True),
            *zip(stepwise, self._step(logits, stepwise, sampled), strict=True),
            *zip(rejecting, _reject(logits, rejecting), strict=True),
        ]:
            sampled[each.first_row] = _chain(samples, len(each.draft.token_ids))
        first_rows = [row.number for row in plain] + [each.first_row for each in drafted]
        return [sampled[row] for row in sorted(first_rows)]

    def _rejects(self, request: Request) -> bool:
        return self._by_rejection and rejection.by_rejection(request)

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> dict[int, Sample]:
        """Samples by row number; the rows ascend."""
        if not rows:
            return {}
        if len(rows) < len(logits):
            logits = logits.index_select(0, torch.tensor([row.number for row in rows], device=logits.device))
        requests, ahead = [row.request for row in rows], [row.ahead for row in rows]
        samples = self._sampler.sample(logits, requests, ahead)
        return {row.number: sample for row, sample in zip(rows, samples, strict=True)}

    def _step(
        self, logits: Tensor, drafted: Sequence[Drafted], sampled: dict[int, Sample]
    ) -> list[list[Sample]]:
        """Place by place, each request's sequence extended meanwhile by the draft tokens that are kept."""
        found = {each: [sampled[each.first_row]] for each in drafted}
        lens = {each: len(each.request.output_token_ids) for each in drafted}
        active = list(drafted)
        while active := [each for each in active if self._extend(each, found[each])]:
            rows = [Row(each.first_row + len(found[each]), each.request, 0) for each in active]
            samples = self._draw(logits, rows)
            for each, row in zip(active, rows, strict=True):
                found[each].append(samples[row.number])
        for each in drafted:
            del each.request.output_token_ids[lens[each] :]
        return [found[each] for each in drafted]

    def _extend(self, each: Drafted, samples: Sequence[Sample]) -> bool:
        """Take the draft's next token into the sequence if it is the one that was sampled and may go on."""
        token_ids, place = each.draft.token_ids, len(samples) - 1
        if place == len(token_ids) or samples[-1].token_id != token_ids[place]:
            return False
        each.request.output_token_ids.append(token_ids[place])
        return not self._sampler.completes(each.request)


def _places(plan: Sequence[Scheduled], drafts: Sequence[Draft]) -> tuple[list[Row], list[Drafted]]:
    """The rows of the plan's samples, those without and those with a draft."""
    plain: list[Row] = []
    drafted: list[Drafted] = []
    next_row = 0
    for item, draft in zip(plan, drafts, strict=True):
        if draft.token_ids:
            drafted.append(Drafted(item.request, draft, next_row))
            next_row += len(draft.token_ids) + 1
        elif item.samples:
            plain += [Row(next_row + i, sampler, 0) for i, sampler in enumerate(item.request.samplers)]
            next_row += len(item.request.samplers)
    return plain, drafted


def _accept(drafted: Sequence[Drafted], sampled: dict[int, Sample]) -> list[list[Sample]]:
    """Of requests whose rows were sampled at once: the samples up to the first that is not the draft's."""
    if not drafted:
        return []
    rows = [[sampled[row.number] for row in each.rows()] for each in drafted]
    width = max(map(len, rows))
    draft_ids = [[*each.draft.token_ids, *[-1] * width][: width - 1] for each in drafted]
    target_ids = [[*(sample.token_id for sample in samples), *[-2] * width][:width] for samples in rows]
    counts = ops.count_accepted(torch.tensor(draft_ids), torch.tensor(target_ids)).tolist()
    return [samples[: count + 1] for samples, count in zip(rows, counts, strict=True)]


def _reject(logits: Tensor, drafted: Sequence[Drafted]) -> list[list[Sample]]:
    if not drafted:
        return []
    rows = torch.tensor([row.number for each in drafted for row in each.rows()], device=logits.device)
    requests, drafts = [each.request for each in drafted], [each.draft for each in drafted]
    return rejection.verify(logits.index_select(0, rows), requests, drafts)


def _chain(samples: Sequence[Sample], num_draft_tokens: int) -> Sample:
    """One sample that the others follow; an error ends the chain, and counts only where it is the first."""
    errors = (i for i, sample in enumerate(samples) if sample.error is not None)
    then = tuple(samples[1 : next(errors, len(samples))])
    return replace(samples[0], then=then, num_draft_tokens=num_draft_tokens)
