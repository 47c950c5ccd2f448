"""The two ways to draw a step's tokens, and what a decode layer launches on a GPU."""

import pytest
import torch

from engine.drawing import Draw, choose, draw_fused, draw_warped
from engine.request import SamplingParams
from kernels import ops, triton_sampling, truncation

PARAMS = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1e-6, "top_k": 2, "typical_p": 0.5},
    {"top_p": 0.8, "top_k": -1},
    {"top_p": 0.9, "min_p": 0.05, "top_k": 20},
    {"typical_p": 0.6},
    {"typical_p": 0.9, "top_p": 0.95},
    {"temperature": 2.0, "min_p": 0.2},
]
"""Every kind of row, also those that only the warpers know."""


@pytest.mark.parametrize("draw", [truncation.draw, triton_sampling.draw], ids=["reference", "triton"])
def test_fused_draws_give_the_tokens_of_the_warpers(monkeypatch, draw):
    monkeypatch.setattr(ops, "draw", draw)
    torch.manual_seed(1)
    for num_rows in (1, 4, 9, 17):
        logits = 2 * torch.randn(num_rows, 131)
        draws = [
            Draw(
                SamplingParams(max_tokens=1, seed=row * 2**55, **PARAMS[row % len(PARAMS)]), 7 * row, row % 3
            )
            for row in range(num_rows)
        ]
        assert torch.equal(draw_fused(logits, draws), draw_warped(logits, draws))


def test_a_draw_is_of_the_token_behind_the_sequence(make_request):
    request = make_request(5, outputs=(7, 8), choice=2, top_k=-1)
    assert Draw.of(request).integers == (5, 7, 2, 0)
    assert Draw.of(request, ahead=3).position == 10


@pytest.mark.gpu
def test_on_a_gpu_the_tokens_stay_there(make_request, gpu):
    logits = torch.randn(3, 500, device=gpu)
    requests = [make_request(n, temperature=n % 2) for n in (4, 5, 6)]
    assert (
        choose(logits, requests).cpu().tolist()
        == draw_warped(logits.cpu(), list(map(Draw.of, requests))).tolist()
    )
