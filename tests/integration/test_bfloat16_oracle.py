"""The engine against transformers in bfloat16, with weights packed where the processor has such products."""

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.models import linear
from engine.request import Request, SamplingParams

torch.set_num_threads(1)
DEMO_MODEL = Path(__file__).parents[2] / "tandem" / "demo_model"
NUM_TOKENS = 24
LARGEST_MARGIN = 2.0**-6
"""Between the two likeliest tokens, relative to the larger logit: over it, both choose the same.

Logits come in bfloat16, whose steps are 2**-7 of the value: absolute margins under a step mean nothing.
"""


@pytest.fixture(scope="module")
def reference():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.LlamaForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()


def test_the_first_divergence_is_a_near_tie(reference, monkeypatch):
    monkeypatch.setattr(linear, "MIN_PACKED_ELEMENTS", 0)
    config = EngineConfig(dtype="bfloat16", kv_cache_memory_bytes=32 << 20)
    engine = Engine(config, load_model(DEMO_MODEL, config))
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [
        Request(
            key=length,
            prompt_token_ids=torch.randint(3, 4096, (length,), generator=generator).tolist(),
            sampling=sampling,
        )
        for length in (1, 17, 100)
    ]
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        engine.step()
    for request in requests:
        assert largest_margin_lost(reference, request) < LARGEST_MARGIN


@torch.inference_mode()
def largest_margin_lost(reference, request: Request) -> float:
    """By how much the reference prefers another token, at most, after the same tokens; relative."""
    token_ids = torch.tensor([request.prompt_token_ids + request.output_token_ids])
    logits = reference(token_ids).logits[0, len(request.prompt_token_ids) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(request.output_token_ids).unsqueeze(1)).squeeze(1)
    best = logits.amax(-1)
    return float(((best - chosen) / best.abs()).max())
