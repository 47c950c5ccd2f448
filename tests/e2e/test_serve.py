"""The whole path with real processes: gateway, prefill, link, decode."""

import asyncio
import json
import random
from pathlib import Path

import httpx
import openai
import pytest

import tandem
from tests.e2e.harness import Up, eventually, kv_bytes_per_token

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MODEL = Path(tandem.__file__).parent / "demo_model"
PROMPTS = ["def ", "class Node:\n    def __init__(self", "import os\n\ndef walk(path):\n", "x" * 700]


@pytest.fixture(scope="session")
def naive() -> "Naive":
    return Naive()


class Naive:
    """transformers, in float32: the oracle."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def greedy(self, prompt: str, num_tokens: int) -> list[int]:
        import torch

        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        out = self.model.generate(ids, max_new_tokens=num_tokens, do_sample=False, use_cache=True)
        return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_split_and_colocated_equal_transformers(split: Up, colocated: Up, naive: Naive, prompt: str) -> None:
    expected = naive.greedy(prompt, 24)
    for up in (split, colocated):
        choice = up.complete(prompt, max_tokens=24, temperature=0)["choices"][0]
        assert choice["token_ids"] == expected
        assert choice["text"] == naive.tokenizer.decode(expected, skip_special_tokens=True)


def test_32_requests_at_once_equal_their_lone_runs(split: Up) -> None:
    rng = random.Random(7)
    requests = [
        {
            "prompt": [rng.randrange(3, 4000) for _ in range(rng.choice([1, 15, 16, 17, 40, 300]))],
            "max_tokens": rng.randrange(1, 40),
            "temperature": rng.choice([0, 0.7, 1.3]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 20]),
            "seed": rng.randrange(1 << 40),
            "ignore_eos": True,
        }
        for _ in range(32)
    ]
    alone = [split.complete(**request)["choices"][0]["token_ids"] for request in requests]

    async def together() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=split.http, timeout=120) as client:
            bodies = [request | {"model": split.model, "return_token_ids": True} for request in requests]
            posts = [client.post("/v1/completions", json=body) for body in bodies]
            return [r.json()["choices"][0]["token_ids"] for r in await asyncio.gather(*posts)]

    assert asyncio.run(together()) == alone
    assert all(worker["links"] >= 1 for worker in split.workers("prefill"))
    eventually(split.is_quiet, 5, "quiet")


def test_every_face_gives_the_same_text(split: Up) -> None:
    options = {"max_tokens": 20, "temperature": 0.8, "seed": 11}
    unary = split.complete("def ", **options)["choices"][0]["text"]

    def sse() -> str:
        body = {"model": split.model, "prompt": "def ", "stream": True} | options
        text = ""
        with split.client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            text += "".join(c["text"] for c in json.loads(line.removeprefix("data: "))["choices"])
        return text

    def openai_client() -> str:
        client = openai.OpenAI(base_url=f"{split.http}/v1", api_key="none")
        stream = client.completions.create(model=split.model, prompt="def ", stream=True, **options)
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    async def grpc_client() -> str:
        async with tandem.Client(split.grpc) as client:
            return "".join([delta.text async for delta in client.generate("def ", **options)])

    assert unary == sse() == openai_client() == asyncio.run(grpc_client())
    assert unary


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 100])
def test_transfer_moves_exactly_the_prompts_blocks(split: Up, num_tokens: int) -> None:
    name = "tandem_kv_transfer_bytes_total"

    def moved(role: str) -> float:
        return sum(split.metric(worker["http"], name) for worker in split.workers(role))

    before = moved("prefill"), moved("decode")
    prompt = [random.randrange(3, 4000) for _ in range(num_tokens)]
    split.complete(prompt, max_tokens=3, ignore_eos=True, temperature=0)
    expected = -(-num_tokens // 16) * 16 * kv_bytes_per_token()
    assert moved("prefill") - before[0] == expected
    assert moved("decode") - before[1] == expected


def test_a_client_that_leaves_frees_everything_within_a_second(split: Up) -> None:
    body = {"model": split.model, "prompt": "def ", "stream": True, "max_tokens": 1900, "ignore_eos": True}
    for leave_after in (1, 3):
        with split.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            for _ in range(leave_after):
                next(lines)
        eventually(split.is_quiet, 1.0, "all blocks free")


def test_finish_at_the_first_token(split: Up) -> None:
    result = split.complete("def ", max_tokens=1, temperature=0)
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 1
    eventually(split.is_quiet, 2, "quiet")
