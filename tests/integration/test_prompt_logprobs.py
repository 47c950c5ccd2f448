"""Log-probabilities of a prompt against transformers, however the engine computes it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.request import Request, SamplingParams
from runtime.checkpoint_dir import bundled_model

PROMPT = torch.randint(3, 4000, (41,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return load_model(bundled_model(), EngineConfig())


@pytest.fixture(scope="module")
def reference():
    """log_softmax of the logits of every position, [len(PROMPT), vocab_size]."""
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)


def request(key=0, prompt=PROMPT, **sampling):
    params = {"max_tokens": 3, "temperature": 0, "prompt_logprobs": 4, "ignore_eos": True, **sampling}
    return Request(key=key, prompt_token_ids=list(prompt), sampling=SamplingParams(**params))


def run(engine, *requests):
    """What each request reports about its prompt, and how often it reports."""
    reports = {each.key: [] for each in requests}
    for each in requests:
        engine.submit(each)
    while engine.has_work():
        for output in engine.step().outputs:
            if output.prompt_logprobs is not None:
                reports[output.request.key].append((output.start_index, output.prompt_logprobs))
    engine.check()
    return reports


@pytest.mark.parametrize("chunk", [5, 16, 41, 512])
def test_equal_to_transformers_chunked_or_not(loaded, reference, chunk):
    engine = Engine(EngineConfig(max_num_batched_tokens=chunk, num_blocks=128), loaded)
    [(start_index, logprobs)] = run(engine, request())[0]
    assert start_index == 0
    assert len(logprobs) == len(PROMPT) - 1
    for position, (logprob, token_id) in enumerate(zip(logprobs, PROMPT[1:], strict=True)):
        row = reference[position]
        assert logprob.logprob == pytest.approx(float(row[token_id]), abs=2e-4)
        assert [token for token, _ in logprob.top] == row.topk(4).indices.tolist()


def test_a_prompt_that_is_cached_and_batch_mates_change_nothing(loaded):
    engine = Engine(EngineConfig(max_num_batched_tokens=48, num_blocks=128), loaded)
    alone = run(engine, request())[0]
    others = [request(key, PROMPT[: 7 * key], prompt_logprobs=[None, 0, 9][key % 3]) for key in range(1, 5)]
    reports = run(engine, request(), *others)
    assert reports[0] == alone
    for other in others:
        wanted = other.sampling.prompt_logprobs
        assert len(reports[other.key]) == (wanted is not None)
        for _, logprobs in reports[other.key]:
            values = [each.logprob for each in logprobs]
            assert values == pytest.approx([each.logprob for each in alone[0][1][: len(values)]], abs=1e-5)
            assert len(values) == len(other.prompt_token_ids) - 1
            assert {len(each.top) for each in logprobs} == {wanted}


def test_one_token_has_nothing_before_it(loaded):
    engine = Engine(EngineConfig(num_blocks=128), loaded)
    assert run(engine, request(prompt=[5]))[0] == [(0, ())]
