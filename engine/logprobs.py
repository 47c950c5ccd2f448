"""Log-probabilities under the model's own distribution: of sampled tokens, and of a prompt's."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch import MIN_ROWS
from engine.plan import Scheduled
from engine.request import Request, TokenLogprob

MAX_PROMPT_ROWS = 256
"""Prompt positions whose logits exist at a time."""


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprob]:
    """Of one token per row, with that row's number of likeliest alternatives.

    logits: fp32 [num_rows, vocab_size]; token_ids: int64 [num_rows].
    """
    logprobs = logits.log_softmax(-1)
    values = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    counts = [min(count, logits.shape[1]) for count in num_top]
    top = logprobs.topk(max(counts), dim=-1)
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    return [
        TokenLogprob(value, tuple(zip(ids[:count], tops[:count], strict=True)))
        for value, count, ids, tops in zip(values, counts, top_ids, top_values, strict=True)
    ]


class PromptRow(NamedTuple):
    """A computed position whose next token is in the prompt, too."""

    request: Request
    row: int
    """In the batch."""
    token_id: int
    """The next token."""


def record_prompt_logprobs(
    plan: Sequence[Scheduled], hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> None:
    """Append to `Request.prompt_logprobs` what this step adds, for the requests that still collect.

    hidden: [num_rows, hidden_size], packed in plan order; `logits_of` projects some rows of it.
    """
    rows = [row for first, item in _with_first_rows(plan) for row in _prompt_rows(item, first)]
    for start in range(0, len(rows), MAX_PROMPT_ROWS):
        piece = rows[start : start + MAX_PROMPT_ROWS]
        padding = [0] * max(MIN_ROWS - len(piece), 0)
        index = torch.tensor([each.row for each in piece] + padding, device=hidden.device)
        targets = torch.tensor([each.token_id for each in piece], device=hidden.device)
        logits = logits_of(hidden.index_select(0, index))[: len(piece)]
        num_top = [each.request.sampling.prompt_logprobs or 0 for each in piece]
        for each, logprob in zip(piece, token_logprobs(logits, targets, num_top), strict=True):
            assert each.request.prompt_logprobs is not None
            each.request.prompt_logprobs.append(logprob)


def _with_first_rows(plan: Sequence[Scheduled]) -> Iterator[tuple[int, Scheduled]]:
    first = 0
    for item in plan:
        if item.request.prompt_logprobs is not None:
            yield first, item
        first += item.num_rows


def _prompt_rows(item: Scheduled, first: int) -> Iterator[PromptRow]:
    """Entry i of the list is of token i + 1, from position i; positions computed again are skipped."""
    request, start = item.request, item.request.num_computed_tokens
    assert request.prompt_logprobs is not None
    num_done = len(request.prompt_logprobs)
    assert start <= num_done or start >= len(request.prompt_token_ids) - 1, "positions were left out"
    for position in range(num_done, min(item.context_len, len(request.prompt_token_ids) - 1)):
        yield PromptRow(request, first + position - start, request.prompt_token_ids[position + 1])
