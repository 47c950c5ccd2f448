"""The bundled model and its draft: mixed requests give, token by token, the output of speculation off."""

import random

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.request import Request, SamplingParams
from runtime.checkpoint_dir import bundled_model
from runtime.grammars import Grammar

torch.set_num_threads(1)

DRAFT = bundled_model() / "draft"
SURFACE = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40, "logprobs": 3},
    {"temperature": 0.9, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 0.5, "min_p": 0.05, "min_tokens": 8, "ignore_eos": False},
    {"temperature": 0.3, "logit_bias": {17: 3.0, 40: -5.0}, "bad_words": ((300, 301), (9,))},
    {"temperature": 1.2, "typical_p": 0.9, "stop_token_ids": tuple(range(200, 260))},
    {"temperature": 0.8, "grammar": Grammar("regex", r"(def|class) [a-z_]{1,12}(\([a-z, ]*\))?:( [a-z ]+)*")},
    {"temperature": 0.0, "grammar": Grammar("json_object", "")},
)


@pytest.fixture(scope="module")
def models():
    drafted = EngineConfig(speculative="draft", draft_model=DRAFT)
    return {"off": load_model(bundled_model(), EngineConfig()), "on": load_model(bundled_model(), drafted)}


def mixed(num_requests, seed):
    """Random prompts, short and long, some beginning alike, with random parameters."""
    draws = random.Random(seed)
    head = [draws.randrange(3, 4000) for _ in range(40)]
    requests = []
    for key in range(num_requests):
        prompt = [draws.randrange(3, 4000) for _ in range(draws.choice((1, 5, 16, 33, 90)))]
        if draws.random() < 0.3:
            prompt = head + prompt
        if draws.random() < 0.3:
            prompt *= 2
        params = {"ignore_eos": True, **draws.choice(SURFACE), "seed": draws.randrange(1 << 40)}
        sampling = SamplingParams(max_tokens=draws.randrange(1, 33), **params)
        requests.append(Request(key=key, prompt_token_ids=prompt, sampling=sampling))
    return requests


def outputs(engine, requests):
    """Tokens with their end, and log-probabilities, under a load that rises and falls."""
    found = {request.key: ([], [], []) for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work():
        for request in waiting[:3]:
            engine.submit(request)
        del waiting[:3]
        for output in engine.step().outputs:
            tokens, logprobs, ends = found[output.request.key]
            tokens += output.token_ids
            logprobs += output.logprobs or ()
            ends.append((output.finish_reason, output.stop_token_id))
    assert engine.load().blocks_used == 0
    ended = {key: (tokens, ends[-1]) for key, (tokens, _, ends) in found.items()}
    return ended, {key: [each.logprob for each in logprobs] for key, (_, logprobs, _) in found.items()}


def compare(models, num_requests, seed, **config):
    size = {"num_blocks": 400, "max_num_seqs": 24, "max_num_batched_tokens": 96, "block_size": 8}
    undisturbed = outputs(Engine(EngineConfig(**size), models["off"]), mixed(num_requests, seed))
    on = models["on" if config["speculative"] == "draft" else "off"]
    engine = Engine(EngineConfig(**size, **config), on)
    drafted = outputs(engine, mixed(num_requests, seed))
    assert drafted[0] == undisturbed[0]
    # Prompts are cut into other chunks, because the steps are others: that moves the last bits.
    for key, logprobs in undisturbed[1].items():
        assert drafted[1][key] == pytest.approx(logprobs, abs=1e-4)
    engine.check()
    assert engine.speculation_stats.accepted_tokens > 0


@pytest.mark.parametrize(
    "config",
    [
        {"speculative": "draft", "draft_model": DRAFT},
        {"speculative": "draft", "draft_model": DRAFT, "num_draft_tokens": 3, "overlap": "on"},
        {"speculative": "ngram", "num_draft_tokens": 4},
    ],
)
def test_fifty_mixed_requests(models, config):
    compare(models, 50, 1, **config)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_draft_tokens", [None, 1, 3, 8])
def test_five_hundred_mixed_requests(models, num_draft_tokens):
    compare(models, 500, 2, speculative="draft", draft_model=DRAFT, num_draft_tokens=num_draft_tokens)
