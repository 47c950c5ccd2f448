"""Chooses tokens from logits: the likeliest, or a draw with the request's own counter-based noise.

Two ways to the same tokens. `draw_warped` is transformers' warpers one by one, each over the rows that ask
for it: what runs on a CPU. `draw_fused` is one operator over all rows with every parameter in a tensor, which
on a GPU sorts nothing and leaves the tokens there; typical-p alone is left to the warpers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.request import Request, SamplingParams
from engine.warpers import warp
from kernels import ops
from kernels.integers import int64s
from kernels.truncation import Truncation

LARGEST_TOP_K = 2**31 - 1


class Draw(NamedTuple):
    """How one row's token is chosen."""

    params: SamplingParams
    position: int
    """Of the token that is chosen."""
    choice: int

    @classmethod
    def of(cls, request: Request, ahead: int = 0) -> "Draw":
        """The token behind the request's sequence, or so many tokens further on."""
        return cls(request.sampling, request.num_tokens + ahead, request.choice)

    @property
    def is_fused(self) -> bool:
        """One operator does all that the parameters ask for, once single logits are edited."""
        return self.params.greedy or self.params.typical_p == 1

    @property
    def integers(self) -> tuple[int, int, int, int]:
        """Seed, position, choice, top-k as int32; 0: every token."""
        return self.params.seed, self.position, self.choice, min(max(self.params.top_k, 0), LARGEST_TOP_K)

    @property
    def floats(self) -> tuple[float, float, float]:
        """Temperature, 0 if the row is greedy, then top-p and min-p."""
        params = self.params
        return 0.0 if params.greedy else params.temperature, params.top_p, params.min_p


def choose(logits: Tensor, requests: Sequence[Request], ahead: Sequence[int] | None = None) -> Tensor:
    """Token ids int64 [num_requests]: argmax of each row; of those that are not greedy warped, with noise.

    logits: fp32 [num_requests, vocab_size]; ahead: see `engine.sampler.Sampler.sample`.
    """
    ahead = ahead or [0] * len(requests)
    if logits.is_cuda:
        return draw_fused(logits, list(map(Draw.of, requests, ahead)))
    random = [row for row, request in enumerate(requests) if not request.sampling.greedy]
    return _with_noise(logits, random, [Draw.of(requests[row], ahead[row]) for row in random])


def draw_warped(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The token of each row; greedy ones cost no noise."""
    random = [row for row, draw in enumerate(draws) if not draw.params.greedy]
    return _with_noise(logits, random, [draws[row] for row in random])


def _with_noise(logits: Tensor, random: Sequence[int], draws: Sequence[Draw]) -> Tensor:
    """The likeliest token of each row; of the rows that are named, what is drawn."""
    token_ids = ops.argmax(logits)
    if random:
        rows = _integers(random, logits)
        warped = warp(logits.index_select(0, rows), [draw.params for draw in draws])
        seeds, positions, choices, _ = _columns(draws, logits)
        token_ids[rows] = ops.sample(warped, seeds, positions, choices)
    return token_ids


def draw_fused(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The token of each row, on the device of the logits."""
    seeds, positions, choices, top_ks = _columns(draws, logits)
    floats = torch.tensor([draw.floats for draw in draws], dtype=torch.float32).T.contiguous()
    temperatures, top_ps, min_ps = floats.to(logits.device).unbind(0)
    truncation = Truncation(temperatures, top_ks.int(), top_ps, min_ps)
    token_ids = ops.draw(logits, truncation, seeds, positions, choices)
    others = [row for row, draw in enumerate(draws) if not draw.is_fused]
    if others:
        rows = _integers(others, logits)
        warped = draw_warped(logits.index_select(0, rows), [draws[row] for row in others])
        token_ids.index_copy_(0, rows, warped)
    return token_ids


def _columns(draws: Sequence[Draw], like: Tensor) -> tuple[Tensor, ...]:
    """`Draw.integers` of all rows, each kind a dense int64 tensor."""
    rows = torch.tensor([draw.integers for draw in draws], dtype=torch.int64)
    return rows.T.contiguous().to(like.device).unbind(0)


def _integers(values: Sequence[int], like: Tensor) -> Tensor:
    return int64s(values, like.device)
