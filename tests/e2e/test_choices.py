"""Several choices and beams over real processes: the same on one worker and on two, and over a death."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

import tandem
from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import all_ready, busy, kill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MODEL = Path(tandem.__file__).parent / "demo_model"
PROMPT = list(range(3, 80))
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 3, "ignore_eos": True}


def ids(answer: dict[str, Any]) -> list[list[int]]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["token_ids"] for choice in answer["choices"]]


def streamed(up: Up, num_choices: int, after: Any = None, **options: Any) -> list[list[int]]:
    """Tokens of each choice of a stream; `after()` is called once when twenty have come."""
    body = {"model": up.model, "prompt": PROMPT, "n": num_choices, "stream": True, "return_token_ids": True}
    tokens: list[list[int]] = [[] for _ in range(num_choices)]
    ends = []
    with up.client.stream("POST", "/v1/completions", json=body | options) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                (choice,) = chunk["choices"]
                tokens[choice["index"]] += choice["token_ids"]
                ends += [choice["index"]] if choice["finish_reason"] else []
                if after is not None and sum(map(len, tokens)) >= 20:
                    after()
                    after = None
    assert sorted(ends) == list(range(num_choices))
    return tokens


def test_choices_are_the_same_on_one_worker_and_on_two(split: Up, colocated: Up) -> None:
    want = ids(colocated.complete(PROMPT, n=4, max_tokens=24, **SEEDED))
    assert len(set(map(tuple, want))) == 4
    assert want[0] == ids(colocated.complete(PROMPT, max_tokens=24, **SEEDED))[0]
    answer = split.complete(PROMPT, n=4, max_tokens=24, **SEEDED)
    assert ids(answer) == want
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(PROMPT), 96)
    assert streamed(split, 4, max_tokens=24, **SEEDED) == want
    eventually(split.is_quiet, 5, "quiet")


def test_a_choice_that_a_stop_string_ended_is_not_computed_further(split: Up) -> None:
    def seats() -> float:
        """Requests in all steps of all decode workers so far."""
        return sum(
            split.metric(worker["http"], "tandem_batch_size_sum") for worker in split.workers("decode")
        )

    options = {**SEEDED, "n": 2, "max_tokens": 240}
    before = seats()
    texts = [choice["text"] for choice in split.complete(PROMPT, **options)["choices"]]
    both = seats() - before
    ends = (texts[0][i : i + 8] for i in range(40, 80))
    stop = next(end for end in ends if end not in texts[1])
    stopped, other = split.complete(PROMPT, stop=[stop], **options)["choices"]
    assert (stopped["finish_reason"], other["finish_reason"]) == ("stop", "length")
    assert texts[0].startswith(stopped["text"])
    assert other["text"] == texts[1]
    assert seats() - before - both < 0.8 * both
    eventually(split.is_quiet, 5, "quiet")


def test_greedy_choices_are_equal(split: Up) -> None:
    first, *others = ids(split.complete(PROMPT, n=3, max_tokens=12, temperature=0))
    assert others == [first, first]


def test_the_best_of_several(split: Up) -> None:
    every = split.complete(PROMPT, n=4, max_tokens=12, logprobs=0, **SEEDED)
    scores = [sum(choice["logprobs"]["token_logprobs"]) for choice in every["choices"]]
    ranked = sorted(range(4), key=lambda choice: -scores[choice])
    best = split.complete(PROMPT, n=2, best_of=4, max_tokens=12, **SEEDED)
    assert ids(best) == [ids(every)[choice] for choice in ranked[:2]]
    assert best["usage"]["completion_tokens"] == 48


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_equal_transformers(split: Up, colocated: Up, early_stopping: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    out = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=16, num_beams=4, num_return_sequences=2, do_sample=False,
        length_penalty=0.8, early_stopping=early_stopping, eos_token_id=None,
    )  # fmt: skip
    options = {"n": 2, "best_of": 4, "use_beam_search": True, "length_penalty": 0.8, "max_tokens": 16}
    for up in (split, colocated):
        answer = up.complete(PROMPT, early_stopping=early_stopping, ignore_eos=True, **options)
        assert ids(answer) == out[:, len(PROMPT) :].tolist()
        eventually(up.is_quiet, 5, "quiet")


def test_choices_over_grpc(split: Up) -> None:
    async def complete() -> list[list[int]]:
        async with grpc.aio.insecure_channel(split.grpc) as channel:
            request = inference_pb2.CompleteRequest(
                token_ids=inference_pb2.TokenIds(ids=PROMPT),
                sampling=common_pb2.SamplingParams(
                    max_tokens=10, n=3, seed=3, temperature=0.9, ignore_eos=True
                ),
            )
            answer = await inference_pb2_grpc.InferenceServiceStub(channel).Complete(request)
            return [list(each.token_ids) for each in answer.completions]

    assert asyncio.run(complete()) == ids(split.complete(PROMPT, n=3, max_tokens=10, **SEEDED))


def test_choices_survive_a_killed_decode_worker(split: Up) -> None:
    eventually(lambda: all_ready(split), 60, "all workers")
    undisturbed = streamed(split, 2, max_tokens=500, **SEEDED)
    assert [len(tokens) for tokens in undisturbed] == [500, 500]
    disturbed = streamed(
        split, 2, lambda: kill(split, "decode", busy(split, "decode")), max_tokens=500, **SEEDED
    )
    assert disturbed == undisturbed
    eventually(lambda: all_ready(split), 60, "all workers again")
    eventually(split.is_quiet, 5, "quiet")
