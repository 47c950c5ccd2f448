"""Verification by rejection sampling: exact in distribution, but not token by token that of speculation off.

A request whose parameters edit single logits is verified by the coupled law all the same, and so is a greedy
one, where both are one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import Request
from engine.sampler import NOT_FINITE, Sample, logprobs_of
from engine.speculative.proposer import Draft
from engine.warpers import warp
from kernels import ops
from kernels.verification import DRAFT_STREAM


def by_rejection(request: Request) -> bool:
    """Whether the rejection law is used for this request, if it is switched on."""
    return not (request.sampling.greedy or request.sampling.edits_logits)


def draw_draft(
    logits: Tensor, requests: Sequence[Request], ahead: Sequence[int], token_ids: Tensor
) -> list[Tensor | None]:
    """Draw the requests' next draft tokens with noise that the target does not use, into `token_ids`.

    logits: fp32 [num_requests, vocab_size]; token_ids: int64 [num_requests]. Returns the logits that each
    token was drawn from; None for requests of the other law, whose tokens are left.
    """
    kept: list[Tensor | None] = [None] * len(requests)
    rows = [row for row, request in enumerate(requests) if by_rejection(request)]
    if not rows:
        return kept
    drawn = [requests[row] for row in rows]
    index = torch.tensor(rows, device=logits.device)
    warped = warp(logits.index_select(0, index), [request.sampling for request in drawn])
    seeds, positions, choices = _keys(drawn, logits.device)
    positions += torch.tensor([ahead[row] for row in rows], device=logits.device)
    token_ids[index] = ops.sample(warped, seeds, positions, choices + DRAFT_STREAM)
    for row, logits_row in zip(rows, warped, strict=True):
        kept[row] = logits_row
    return kept


def verify(logits: Tensor, requests: Sequence[Request], drafts: Sequence[Draft]) -> list[list[Sample]]:
    """The tokens that each request's draft emits, all in one pass.

    logits: fp32 [num_rows, vocab_size], for each request one row per draft token and one behind them.
    """
    lens = [len(draft.token_ids) for draft in drafts]
    rows = [request for request, num in zip(requests, lens, strict=True) for _ in range(num + 1)]
    warped = warp(logits, [request.sampling for request in rows])
    kept = [draft.logits for draft in drafts if draft.logits is not None]
    num_accepted, behind = ops.rejection_verify(
        warped,
        torch.cat(kept) if kept else None,
        _padded([draft.token_ids for draft in drafts], logits.device),
        *_keys(requests, logits.device),
    )
    samples: list[list[Sample]] = []
    first = 0
    outcomes = torch.stack((num_accepted, behind), 1).tolist()
    for request, draft, (accepted, last) in zip(requests, drafts, outcomes, strict=True):
        emitted = [*draft.token_ids[:accepted], last]
        samples.append(_samples(logits[first : first + len(emitted)], request, emitted))
        first += len(draft.token_ids) + 1
    return samples


def _samples(logits: Tensor, request: Request, token_ids: list[int]) -> list[Sample]:
    rows = [request] * len(token_ids)
    logprobs = logprobs_of(logits, rows, torch.tensor(token_ids, device=logits.device))
    finite = logits.amax(-1).isfinite().tolist()
    return [
        Sample(token_id, logprob) if sound else Sample(-1, error=NOT_FINITE)
        for token_id, logprob, sound in zip(token_ids, logprobs, finite, strict=True)
    ]


def _padded(token_ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, token_ids))
    rows = [[*ids, *[-1] * (longest - len(ids))] for ids in token_ids]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), longest)


def _keys(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds, positions of the next tokens, choices, each a dense tensor."""
    keys = [(request.sampling.seed, request.num_tokens, request.choice) for request in requests]
    columns = torch.tensor(keys, dtype=torch.int64).T.contiguous()
    seeds, positions, choices = columns.to(device).unbind(0)
    return seeds, positions, choices
