"""Changes of single logits, each a sparse or masked pass over the rows that ask for it, in place.

In the order of transformers' processors: logit bias, repetition penalty (then presence and frequency
penalty, which transformers does not have), bad words and min_tokens, allowed tokens and grammars.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Request
from engine.sampler_state import SamplerState, mask_words
from engine.structured import fill_masks
from kernels import ops

EditedRow = tuple[int, Request, SamplerState]
"""A row of the logits, its request and its state, which has caught up with the request's tokens."""


def edit_logits(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    """Apply everything that the rows' requests ask for. logits: fp32 [num_requests, vocab_size]."""
    add_logit_bias(logits, [row for row in rows if len(row[2].biases)])
    penalize(logits, [row for row in rows if row[2].counts is not None])
    forbid(logits, rows)
    allow(logits, [row for row in rows if row[2].is_masked])


def add_logit_bias(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    """Add each request's biases to its row."""
    if rows:
        where = _places(logits, [(row, state.bias_ids) for row, _, state in rows])
        biases = np.concatenate([state.biases for _, _, state in rows])
        logits.view(-1).index_add_(0, where, _on_device(biases, logits))


def penalize(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    """Make seen tokens less likely: scale (Keskar et al. 2019), then subtract for those of the output."""
    counted = [(row, request.sampling, state.counts) for row, request, state in rows if state.counts]
    if not counted:
        return
    where = _places(logits, [(row, counts.token_ids) for row, _, counts in counted])
    params = np.array(
        [(each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for _, each, _ in counted],
        dtype=np.float32,
    )
    lengths = [len(counts.token_ids) for _, _, counts in counted]
    scale, frequency, presence = _on_device(np.repeat(params.T, lengths, axis=1), logits)
    outputs = _on_device(np.concatenate([counts.outputs for _, _, counts in counted]), logits)
    scores = logits.view(-1).index_select(0, where)
    scores = torch.where(scores < 0, scores * scale, scores / scale)
    scores = scores - outputs * frequency - (outputs > 0) * presence
    logits.view(-1).index_copy_(0, where, scores)


def forbid(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    """Exclude the tokens that would complete a bad word, or end a request before min_tokens."""
    forbidden = [(row, ids) for row, request, state in rows for ids in state.forbidden(request)]
    if forbidden:
        logits.view(-1).index_fill_(0, _places(logits, forbidden), -torch.inf)


def allow(logits: Tensor, rows: Sequence[EditedRow]) -> None:
    """Exclude all but the allowed tokens and what a grammar lets follow."""
    if rows:
        masks = _masks([state for _, _, state in rows], mask_words(logits.shape[1]))
        indices = torch.tensor([row for row, _, _ in rows], dtype=torch.int64, device=logits.device)
        ops.apply_bit_mask(logits, indices, _on_device(masks, logits))


def _masks(states: Sequence[SamplerState], num_words: int) -> NDArray[np.int32]:
    masks = np.full((len(states), num_words), -1, dtype=np.int32)
    constrained = [row for row, state in enumerate(states) if state.constraint is not None]
    if constrained:
        follows = np.empty((len(constrained), num_words), dtype=np.int32)
        fill_masks([state.constraint for state in states if state.constraint is not None], follows)
        masks[constrained] = follows
    for mask, state in zip(masks, states, strict=True):
        if state.allowed is not None:
            mask &= state.allowed
    return masks


def _places(logits: Tensor, ids_of_rows: Sequence[tuple[int, NDArray[np.int64]]]) -> Tensor:
    """Indices into the flattened logits of some tokens of some rows, int64."""
    vocab_size = logits.shape[1]
    places = np.concatenate([ids + row * vocab_size for row, ids in ids_of_rows])
    return _on_device(places, logits)


def _on_device(array: NDArray[np.generic], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)
