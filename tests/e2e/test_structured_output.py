"""Structured output over the whole path: every text matches, wherever it was computed."""

import asyncio
import json
import re
import time
from typing import Any

import grpc
import httpx
import pytest

from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.e2e.harness import Up, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PROMPT = "def read(path):\n    return "
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["file", "folder", 3]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
    # A small model would rather write spaces for ever.
    "x-guidance": {"whitespace_flexible": False},
}


def matches_schema(text: str) -> bool:
    value = json.loads(text)
    name, kind, sizes = (value.pop(key) for key in ("name", "kind", "sizes"))
    numbers = 1 <= len(sizes) <= 3 and all(type(size) is int for size in sizes)
    return not value and len(name) <= 8 and kind in ("file", "folder", 3) and numbers


def is_balanced(text: str) -> bool:
    half = len(text) // 2
    return text == "(" * half + "x" + ")" * half


CONSTRAINTS: dict[str, tuple[dict[str, Any], Any]] = {
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA}}},
        matches_schema,
    ),
    "guided": ({"guided_json": SCHEMA}, matches_schema),
    "regex": (
        {"structured_outputs": {"regex": "[a-z]{3,9}=[0-9]{2,4}(;[a-z]=[0-9]){0,2}"}},
        re.compile("[a-z]{3,9}=[0-9]{2,4}(;[a-z]=[0-9]){0,2}").fullmatch,
    ),
    "choice": (
        {"guided_choice": ["open(path)", "öffnen", "None\n"]},
        ("open(path)", "öffnen", "None\n").count,
    ),
    "lark": ({"guided_grammar": 'start: "(" start ")" | "x"'}, is_balanced),
    "gbnf": ({"structured_outputs": {"grammar": 'root ::= "(" root ")" | "x"'}}, is_balanced),
}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_text_matches_and_split_equals_colocated(
    split: Up, colocated: Up, name: str, temperature: float
) -> None:
    fields, matches = CONSTRAINTS[name]
    for seed in range(1 if temperature == 0 else 3):
        body = {"max_tokens": 120, "temperature": temperature, "seed": seed, "ignore_eos": seed == 1} | fields
        answers = [up.complete(PROMPT, **body)["choices"][0] for up in (split, colocated)]
        assert answers[0]["token_ids"] == answers[1]["token_ids"]
        assert answers[0]["text"] == answers[1]["text"]
        if name in ("lark", "gbnf") and answers[0]["finish_reason"] == "length":
            assert set(answers[0]["text"]) == {"("}
        else:
            assert answers[0]["finish_reason"] == "stop"
            assert matches(answers[0]["text"]), answers[0]["text"]
    eventually(split.is_quiet, 5, "quiet")


def test_a_mixed_batch_equals_lone_runs(split: Up) -> None:
    bodies = [
        {"prompt": PROMPT, "max_tokens": 60, "temperature": 1, "seed": seed, "return_token_ids": True}
        | fields
        for seed, fields in enumerate([fields for fields, _ in CONSTRAINTS.values()] + [{}] * 4)
    ]
    alone = [split.complete(**body)["choices"][0]["token_ids"] for body in bodies]

    async def together() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=split.http, timeout=120) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["token_ids"] for answer in answers]

    assert asyncio.run(together()) == alone


def test_json_object_in_a_chat_starts_one_and_ends_with_it(split: Up) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_object"}}
    answer = split.client.post("/v1/chat/completions", json=body | {"max_tokens": 60, "seed": 5})
    choice = answer.json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    if choice["finish_reason"] == "stop":
        json.loads(choice["message"]["content"])


EXPENSIVE = {"type": "integer", "multipleOf": 99999989}
BAD = {
    "nonsense": {"guided_json": {"type": "nonsense"}},
    "broken": {"guided_json": "{"},
    "deep": {"guided_json": '{"type":"array","items":' * 5000 + "{}" + "}" * 5000},
    "large": {"guided_choice": [f"choice {number}" for number in range(100_000)]},
    "slow": {"guided_json": EXPENSIVE},
    "regex": {"guided_regex": "(" * 30_000 + "a" + ")" * 30_000},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_grammar_is_the_clients_error_and_the_service_goes_on(split: Up, name: str) -> None:
    start = time.monotonic()
    answer = split.client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5} | BAD[name])
    assert time.monotonic() - start < 5
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == next(iter(BAD[name]))
    assert split.complete(PROMPT, max_tokens=3, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
    choice = split.complete(PROMPT, max_tokens=9, guided_choice=["yes"])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("yes", "stop")


def test_over_grpc(split: Up) -> None:
    def complete(**constraint: Any) -> Any:
        output = common_pb2.StructuredOutput(**constraint)
        sampling = common_pb2.SamplingParams(max_tokens=20, structured_output=output)
        return stub.Complete(inference_pb2.CompleteRequest(text=PROMPT, sampling=sampling))

    with grpc.insecure_channel(split.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        completion = complete(regex="[0-9]{4}").completions[0]
        assert re.fullmatch("[0-9]{4}", completion.text)
        assert completion.finish_reason == common_pb2.FINISH_REASON_STOP
        for constraint in (
            {"json_schema": json.dumps(EXPENSIVE)},
            {"json_object": False},
            {"regex": "(" * 9},
        ):
            with pytest.raises(grpc.RpcError) as raised:
                complete(**constraint)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "structured_output" in raised.value.details()
