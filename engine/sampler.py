"""From logits to tokens, one vectorised pass over all rows of a step.

The order is that of transformers' processors and warpers: logit bias, repetition, presence and frequency
penalty, min_tokens, temperature, top-k, top-p, min-p; then argmax with counter-based Gumbel noise.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import Request, SamplingParams, TokenLogprob
from kernels import ops


@dataclass(frozen=True, slots=True)
class Sample:
    """The outcome of one row: a token, or an error."""

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None


NOT_FINITE = "the model gave logits that are not finite"


class Sampler:
    """Chooses the next token of each request."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[Sample]:
        """One sample per row; a row with NaN or only infinities fails alone.

        logits: fp32 [num_requests, vocab_size] of each request's last token; left as they are.
        """
        finite = logits.amax(-1).isfinite()
        token_ids = self._choose(logits, requests)
        logprobs = _logprobs(logits, requests, token_ids)
        chosen = torch.stack((token_ids, finite.long()), dim=1).tolist()
        return [
            Sample(token_id, logprob) if ok else Sample(-1, error=NOT_FINITE)
            for (token_id, ok), logprob in zip(chosen, logprobs, strict=True)
        ]

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        logits = self._process(logits, requests)
        token_ids = logits.argmax(-1)
        random = rows_where(requests, lambda params: not params.greedy)
        if random:
            rows = _tensor(random, logits)
            drawn = [requests[row] for row in random]
            warped = warp(logits.index_select(0, rows), [request.sampling for request in drawn])
            token_ids[rows] = ops.sample(
                warped,
                _tensor([request.sampling.seed for request in drawn], logits),
                _tensor([request.num_tokens for request in drawn], logits),
                _tensor([request.choice for request in drawn], logits),
            )
        return token_ids

    def _process(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Bias, penalties and min_tokens, on a copy if any request has some."""
        forbidden = [(row, token) for row, each in enumerate(requests) for token in self._forbidden(each)]
        plain = not rows_where(requests, _has_extras)
        if plain and not forbidden:
            return logits
        logits = logits.clone()
        if not plain:
            add_logit_bias(logits, requests)
            penalize_repetition(logits, requests)
            penalize_output(logits, requests)
        if forbidden:
            rows, token_ids = zip(*forbidden, strict=True)
            logits[_tensor(rows, logits), _tensor(token_ids, logits)] = -torch.inf
        return logits

    def _forbidden(self, request: Request) -> Iterable[int]:
        """Tokens that would end the request before min_tokens."""
        params = request.sampling
        if len(request.output_token_ids) >= params.min_tokens:
            return ()
        return params.stop_token_ids + (() if params.ignore_eos else self._eos_token_ids)


def rows_where(requests: Sequence[Request], holds: Callable[[SamplingParams], bool]) -> list[int]:
    """Indices of the requests whose parameters meet a condition."""
    return [row for row, request in enumerate(requests) if holds(request.sampling)]


def _has_extras(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or params.repetition_penalty != 1 or _penalizes_output(params)


def _penalizes_output(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def add_logit_bias(logits: Tensor, requests: Sequence[Request]) -> None:
    """Add each request's bias to its row, in place. logits: [num_requests, vocab_size]."""
    entries = [
        (row, token_id, bias)
        for row, request in enumerate(requests)
        for token_id, bias in request.sampling.logit_bias.items()
    ]
    if entries:
        rows, token_ids, biases = zip(*entries, strict=True)
        where = (_tensor(rows, logits), _tensor(token_ids, logits))
        logits.index_put_(where, _column(biases, logits).squeeze(1), accumulate=True)


def penalize_repetition(logits: Tensor, requests: Sequence[Request]) -> None:
    """Scale the logits of seen tokens towards less likely, in place (Keskar et al. 2019)."""
    rows = rows_where(requests, lambda params: params.repetition_penalty != 1)
    if not rows:
        return
    penalty = _column([requests[row].sampling.repetition_penalty for row in rows], logits)
    seen = [request.tokens(0, request.num_tokens) for request in map(requests.__getitem__, rows)]
    index = _tensor(rows, logits)
    scores = logits.index_select(0, index)
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    logits[index] = torch.where(_counts(seen, scores) > 0, penalized, scores)


def penalize_output(logits: Tensor, requests: Sequence[Request]) -> None:
    """Subtract presence and frequency penalties of the output tokens, in place."""
    rows = rows_where(requests, _penalizes_output)
    if not rows:
        return
    presence = _column([requests[row].sampling.presence_penalty for row in rows], logits)
    frequency = _column([requests[row].sampling.frequency_penalty for row in rows], logits)
    index = _tensor(rows, logits)
    scores = logits.index_select(0, index)
    counts = _counts([requests[row].output_token_ids for row in rows], scores)
    logits[index] = scores - counts * frequency - (counts > 0) * presence


def warp(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, top-k, top-p and min-p of rows that are not greedy; a new tensor, -inf where excluded."""
    logits = logits / _column([each.temperature for each in params], logits)
    _exclude(logits, [max(each.top_k, 0) for each in params], 0, _below_top_k)
    _exclude(logits, [each.top_p for each in params], 1, _outside_top_p)
    _exclude(logits, [each.min_p for each in params], 0, _below_min_p)
    return logits


def _exclude(
    logits: Tensor, values: list[float], neutral: float, excluded: Callable[[Tensor, list[float]], Tensor]
) -> None:
    """Apply one warper, in place, to the rows whose value is not neutral."""
    rows = [row for row, value in enumerate(values) if value != neutral]
    if rows:
        index = _tensor(rows, logits)
        scores = logits.index_select(0, index)
        logits[index] = scores.masked_fill(excluded(scores, [values[row] for row in rows]), -torch.inf)


def _below_top_k(scores: Tensor, top_k: list[float]) -> Tensor:
    """Less likely than the k-th; ties with it stay."""
    ks = [min(int(k), scores.shape[1]) for k in top_k]
    best = scores.topk(max(ks), dim=-1).values
    kth = best.gather(1, _tensor([k - 1 for k in ks], scores).unsqueeze(1))
    return scores < kth


def _outside_top_p(scores: Tensor, top_p: list[float]) -> Tensor:
    """Not of the smallest set of likeliest tokens with probability top_p (Holtzman et al. 2019)."""
    ordered, index = scores.sort(dim=-1, stable=True)
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - _column(top_p, scores)
    removed[:, -1] = False
    return removed.scatter(1, index, removed)


def _below_min_p(scores: Tensor, min_p: list[float]) -> Tensor:
    """Less probable than min_p times the likeliest token (Nguyen et al. 2024)."""
    probs = scores.softmax(-1)
    return probs < _column(min_p, scores) * probs.amax(-1, keepdim=True)


def _logprobs(logits: Tensor, requests: Sequence[Request], token_ids: Tensor) -> list[TokenLogprob | None]:
    """Log-probabilities under the untouched logits for the requests that ask for them."""
    found: list[TokenLogprob | None] = [None] * len(requests)
    rows = rows_where(requests, lambda params: params.logprobs is not None)
    if not rows:
        return found
    index = _tensor(rows, logits)
    logprobs = logits.index_select(0, index).log_softmax(-1)
    sampled = logprobs.gather(1, token_ids.index_select(0, index).unsqueeze(1)).squeeze(1).tolist()
    num_top = [min(requests[row].sampling.logprobs or 0, logits.shape[1]) for row in rows]
    top = logprobs.topk(max(num_top), dim=-1)
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    for i, row in enumerate(rows):
        alternatives = tuple(zip(top_ids[i][: num_top[i]], top_values[i][: num_top[i]], strict=True))
        found[row] = TokenLogprob(sampled[i], alternatives)
    return found


def _counts(token_lists: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """How often each token id occurs in each list, fp32 of like's shape."""
    rows = [row for row, token_ids in enumerate(token_lists) for _ in token_ids]
    flat = [token_id for token_ids in token_lists for token_id in token_ids]
    ones = torch.ones(len(flat), device=like.device)
    return torch.zeros_like(like).index_put_(
        (_tensor(rows, like), _tensor(flat, like)), ones, accumulate=True
    )


def _tensor(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)
