"""Beam search against `generate(num_beams=...)` of transformers, token for token, fp32."""

import pytest
import torch

from engine.beam_search import BeamParams, EarlyStopping
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.request import Request, SamplingParams
from tests.integration.test_transformers_oracle import DEMO_MODEL, SIZES, eager, prompts

RULES = {
    False: EarlyStopping.LIKELY,
    True: EarlyStopping.WHEN_ENOUGH,
    "never": EarlyStopping.NEVER,
}
CASES = [
    (2, 1, 1.0, False),
    (4, 4, 1.0, False),
    (4, 2, 1.0, True),
    (4, 3, 2.0, "never"),
    (5, 5, 0.0, "never"),
    (3, 2, -1.0, False),
    (8, 8, 0.5, True),
]


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def want(model, prompt, width, num_returned, penalty, early_stopping, max_tokens, eos):
    """[(score, tokens up to the first end token)], best first."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            num_beams=width,
            num_return_sequences=num_returned,
            length_penalty=penalty,
            early_stopping=early_stopping,
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    found = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        tokens = row[len(prompt) :]
        ends = [i for i, token in enumerate(tokens) if token in eos]
        found.append((score, tokens[: ends[0] + 1] if ends else tokens))
    return found


def got(engine, prompt, width, num_returned, penalty, early_stopping, max_tokens, eos):
    params = BeamParams(
        width=width,
        num_returned=num_returned,
        length_penalty=penalty,
        early_stopping=RULES[early_stopping],
    )
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=tuple(eos), beams=params)
    engine.submit(Request(key=0, prompt_token_ids=prompt, sampling=sampling))
    outputs = []
    while engine.has_work():
        outputs += engine.step().outputs
        engine.check()
    assert engine.load().blocks_used == 0
    return [(output.score, list(output.token_ids)) for output in outputs]


def check(model, engine, prompt, case, max_tokens, eos):
    expected = want(model, prompt, *case, max_tokens, eos)
    found = got(engine, prompt, *case, max_tokens, eos)
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beams_of_random_checkpoints(transformers, tmp_path, case):
    torch.manual_seed(len(str(case)))
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 67})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = eager(transformers, tmp_path)
    engine_config = EngineConfig(kv_cache_memory_bytes=32 << 20, block_size=4)
    engine = Engine(engine_config, load_model(tmp_path, engine_config))
    for prompt in prompts(67, (1, 7, 32)):
        for eos in ((), (5,), (5, 17, 40)):
            check(model, engine, prompt, case, 24, eos)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beams_of_the_demo_model(transformers, case):
    model = eager(transformers, DEMO_MODEL)
    engine_config = EngineConfig(kv_cache_memory_bytes=64 << 20)
    engine = Engine(engine_config, load_model(DEMO_MODEL, engine_config))
    for prompt in prompts(4096, (4, 60)):
        check(model, engine, prompt, case, 20, engine.facts.eos_token_ids)
