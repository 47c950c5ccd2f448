"""Log-probabilities under the model's own distribution: of sampled tokens, and of a prompt's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.batch import MIN_ROWS
from engine.plan import Scheduled
from engine.request import TokenLogprob

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


def record_prompt_logprobs(
    plan: Sequence[Scheduled], hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> None:
    """Append to `Request.prompt_logprobs` what this step adds, for the requests that still collect.

    hidden: [num_scored, hidden_size], the final hidden states of all `Scheduled.scored` in plan order;
    `logits_of` projects some rows of them.
    """
    targets = [
        (item.request, item.request.prompt_token_ids[position + 1])
        for item in plan
        for position in item.scored
    ]
    for start in range(0, len(targets), MAX_PROMPT_ROWS):
        piece = targets[start : start + MAX_PROMPT_ROWS]
        rows = hidden[start : start + len(piece)]
        if len(piece) < MIN_ROWS:
            rows = torch.cat((rows, rows[:1].expand(MIN_ROWS - len(piece), -1)))
        next_ids = torch.tensor([token_id for _, token_id in piece], device=hidden.device)
        num_top = [request.sampling.prompt_logprobs or 0 for request, _ in piece]
        logprobs = token_logprobs(logits_of(rows)[: len(piece)], next_ids, num_top)
        for (request, _), logprob in zip(piece, logprobs, strict=True):
            assert request.prompt_logprobs is not None
            request.prompt_logprobs.append(logprob)
