"""Every limit of docs/limits.md: exactly so much is served, one more is refused by name, on both faces."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from gateway.limits import (
    LIMITS,
    MAX_BAD_WORD_BYTES,
    MAX_BAD_WORDS,
    MAX_CACHE_SALT_BYTES,
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_JSON_DEPTH,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_BYTES,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_URL_BYTES,
)
from gateway.validation import FLOAT_RANGES
from protos.tandem.v1 import common_pb2 as pb
from protos.tandem.v1 import inference_pb2, inference_pb2_grpc
from tests.fakes.cluster import MAX_MODEL_LEN, Cluster, cluster, http
from tools.limits_table import FILE, render

PAIR = (("decode", "d1"), ("prefill", "p1"))
PROMPT = [5, 6, 7]
VOCAB = 4096
LEFT = MAX_MODEL_LEN - len(PROMPT)

Fields = dict[str, Any]
SAMPLING: Mapping[str, tuple[int, Callable[[int], Fields]]] = {
    "max_tokens": (LEFT, lambda n: {"max_tokens": n}),
    "min_tokens": (9, lambda n: {"max_tokens": 9, "min_tokens": n}),
    "n": (MAX_CHOICES, lambda n: {"n": n, "max_tokens": 2}),
    "best_of": (MAX_CHOICES, lambda n: {"best_of": n, "max_tokens": 2}),
    "stop": (MAX_STOPS, lambda n: {"stop": [f"s{i}" for i in range(n)]}),
    "stop, each": (MAX_STOP_BYTES, lambda n: {"stop": ["é" * (n // 2) + "x" * (n % 2)]}),
    "stop_token_ids": (MAX_STOP_TOKEN_IDS, lambda n: {"stop_token_ids": list(range(n))}),
    "bad_words": (MAX_BAD_WORDS, lambda n: {"bad_words": [f"w{i}" for i in range(n)]}),
    "bad_words, each": (MAX_BAD_WORD_BYTES, lambda n: {"bad_words": ["é" * (n // 2) + "x" * (n % 2)]}),
    "allowed_token_ids": (VOCAB, lambda n: {"allowed_token_ids": [i % VOCAB for i in range(n)]}),
    "logprobs": (MAX_LOGPROBS, lambda n: {"logprobs": n}),
    "prompt_logprobs": (MAX_LOGPROBS, lambda n: {"prompt_logprobs": n}),
    "logit_bias": (MAX_LOGIT_BIAS, lambda n: {"logit_bias": {str(i): 1.0 for i in range(n)}}),
}
"""Row -> the limit, and the fields that ask for so much; both faces call them alike."""

# The fake workers know nothing of prompts' log-probabilities.
NOT_SERVED = {"prompt_logprobs"}


def sampling(fields: Fields) -> pb.SamplingParams:
    bias = {int(token_id): value for token_id, value in fields.get("logit_bias", {}).items()}
    rest = {name: value for name, value in fields.items() if name != "logit_bias"}
    return pb.SamplingParams(**({"max_tokens": 3} | rest), logit_bias=bias)


async def over_http(made: Cluster, fields: Fields, path: str = "completions") -> tuple[int, str | None]:
    """(status, the field that is named)."""
    body = ({"prompt": PROMPT} if path == "completions" else {}) | {"max_tokens": 3} | fields
    async with http(made) as client:
        answer = await client.post(f"/v1/{path}", json=body)
    return answer.status_code, answer.json().get("error", {}).get("param")


async def over_grpc(made: Cluster, **fields: Any) -> tuple[grpc.StatusCode, str | None]:
    prompt = {} if "messages" in fields else {"token_ids": inference_pb2.TokenIds(ids=PROMPT)}
    asked = inference_pb2.CompleteRequest(**(prompt | {"sampling": sampling({})} | fields))
    async with grpc.aio.insecure_channel(made.grpc) as channel:
        try:
            await inference_pb2_grpc.InferenceServiceStub(channel).Complete(asked, timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code(), _field(error)
    return grpc.StatusCode.OK, None


def _field(error: grpc.aio.AioRpcError) -> str | None:
    status = rpc_status.from_call(error)
    violations = error_details_pb2.BadRequest()
    if status is None or not any(detail.Unpack(violations) for detail in status.details):
        return None
    return violations.field_violations[0].field


@pytest.mark.parametrize("row", SAMPLING)
async def test_sampling(row: str) -> None:
    limit, fields = SAMPLING[row]
    field = row.removesuffix(", each")
    bad = grpc.StatusCode.INVALID_ARGUMENT
    async with cluster(*PAIR) as made:
        if row not in NOT_SERVED:
            assert await over_http(made, fields(limit)) == (200, None)
            assert await over_grpc(made, sampling=sampling(fields(limit))) == (grpc.StatusCode.OK, None)
        served = [len(worker.submits) for worker in made.workers.values()]
        assert await over_http(made, fields(limit + 1)) == (400, field)
        assert await over_grpc(made, sampling=sampling(fields(limit + 1))) == (bad, field)
        assert [len(worker.submits) for worker in made.workers.values()] == served


async def test_top_logprobs_of_a_chat() -> None:
    async with cluster(*PAIR) as made:
        chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
        assert await over_http(made, chat | {"top_logprobs": MAX_LOGPROBS}, "chat/completions") == (200, None)
        refused = await over_http(made, chat | {"top_logprobs": MAX_LOGPROBS + 1}, "chat/completions")
        assert refused == (400, "top_logprobs")


async def test_prompt() -> None:
    async with cluster(*PAIR) as made:
        for num_tokens, status, code, field in (
            (MAX_MODEL_LEN - 1, 200, grpc.StatusCode.OK, None),
            (MAX_MODEL_LEN, 400, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ):
            ids = [5] * num_tokens
            assert await over_http(made, {"prompt": ids, "max_tokens": 1}) == (status, field)
            asked = {"token_ids": inference_pb2.TokenIds(ids=ids), "sampling": sampling({"max_tokens": 1})}
            assert await over_grpc(made, **asked) == (code, field)


async def test_messages() -> None:
    """The demo's context is shorter than so many messages: the one limit hides behind the other."""
    async with cluster(*PAIR) as made, http(made) as client:
        for count, status in ((MAX_MESSAGES, 200), (MAX_MESSAGES + 1, 400)):
            chat = [{"role": "user", "content": "x"}] * count
            answer = await client.post("/tokenize", json={"messages": chat})
            assert answer.status_code == status
            assert (status == 200) or answer.json()["error"]["param"] == "messages"
            messages = inference_pb2.ChatMessages(
                messages=[inference_pb2.ChatMessage(**each) for each in chat]
            )
            async with grpc.aio.insecure_channel(made.grpc) as channel:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                call = stub.Tokenize(inference_pb2.TokenizeRequest(messages=messages))
                if status == 200:
                    assert (await call).token_ids
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
                assert _field(raised.value) == "messages"


async def test_structured_output() -> None:
    def schema(size: int) -> str:
        frame = '{"type":"integer","title":""}'
        return frame.replace('""', f'"{"x" * (size - len(frame))}"')

    # Tag and length of the one field are part of what is measured.
    for size, status, code in (
        (MAX_GRAMMAR_BYTES - 4, 200, grpc.StatusCode.OK),
        (MAX_GRAMMAR_BYTES - 3, 400, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        output = pb.StructuredOutput(json_schema=schema(size))
        assert (output.ByteSize() <= MAX_GRAMMAR_BYTES) == (status == 200)
        async with cluster(*PAIR) as made:
            answer = await over_http(made, {"guided_json": schema(size)})
            assert answer == (status, None if status == 200 else "guided_json")
            asked = sampling({"structured_output": output})
            field = None if status == 200 else "structured_output"
            assert await over_grpc(made, sampling=asked) == (code, field)


@pytest.mark.parametrize(
    ("field", "limit"), [("cache_salt", MAX_CACHE_SALT_BYTES), ("request_id", MAX_REQUEST_ID_CHARS)]
)
async def test_names(field: str, limit: int) -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        for size, code, named in (
            (limit, grpc.StatusCode.OK, None),
            (limit + 1, grpc.StatusCode.INVALID_ARGUMENT, field),
        ):
            assert await over_grpc(made, **{field: "x" * size}) == (code, named)
            if field == "cache_salt":
                status = 200 if named is None else 400
                assert await over_http(made, {field: "x" * size}) == (status, named)
            else:  # HTTP draws an id of its own instead
                answer = await client.post("/v1/completions", json={"prompt": PROMPT, field: "x" * size})
                assert (answer.json()["id"] == f"cmpl-{'x' * size}") == (named is None)


@pytest.mark.parametrize(("field", "limit"), [("seed", 2**63 - 1), ("priority", 2**31 - 1)])
async def test_integers(field: str, limit: int) -> None:
    async with cluster(*PAIR) as made:
        assert await over_http(made, {field: limit}) == (200, None)
        assert await over_http(made, {field: -limit - 1}) == (200, None)
        assert await over_http(made, {field: limit + 1}) == (400, field)
        assert await over_http(made, {field: -limit - 2}) == (400, field)


@pytest.mark.parametrize("field", FLOAT_RANGES)
async def test_ranges(field: str) -> None:
    range_ = FLOAT_RANGES[field]
    inside = [range_.high, range_.low + 0.01 if range_.low_open else range_.low]
    outside = [range_.high * 1.01, range_.low - 0.01, *([range_.low] if range_.low_open else [])]
    async with cluster(*PAIR) as made:
        for value in inside:
            assert await over_http(made, {field: value}) == (200, None)
            assert await over_grpc(made, sampling=sampling({field: value})) == (grpc.StatusCode.OK, None)
        for value in outside:
            assert await over_http(made, {field: value}) == (400, field)
            assert await over_grpc(made, sampling=sampling({field: value})) == (
                grpc.StatusCode.INVALID_ARGUMENT, field,
            )  # fmt: skip
        for value in (float("nan"), float("inf"), -float("inf")):
            assert (await over_grpc(made, sampling=sampling({field: value})))[1] == field


async def test_body_and_message() -> None:
    async with cluster(*PAIR, max_body_bytes=1000) as made, http(made) as client:

        def body(size: int) -> bytes:
            return (b'{"prompt":[5],"max_tokens":1' + b" " * 1000)[: size - 1] + b"}"

        assert (await client.post("/v1/completions", content=body(1000))).status_code == 200
        assert (await client.post("/v1/completions", content=body(1001))).status_code == 413

        def message(size: int) -> inference_pb2.CompleteRequest:
            asked = inference_pb2.CompleteRequest(text="x", sampling=sampling({"max_tokens": 1}))
            asked.sampling.stop.extend(["y" * 200] * 8)
            asked.request_id = "z" * (size - asked.ByteSize() - 3)
            assert asked.ByteSize() == size
            return asked

        async with grpc.aio.insecure_channel(made.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Complete(message(2000))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # it was read: the id is too long
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Complete(message(2001))
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_depth() -> None:
    async with cluster(*PAIR) as made, http(made) as client:

        def body(depth: int) -> str:
            nested = "[" * (depth - 1) + "]" * (depth - 1)
            return f'{{"prompt":[5],"max_tokens":1,"stop":"[{{\\"[","metadata":{nested}}}'

        assert (await client.post("/v1/completions", content=body(MAX_JSON_DEPTH))).status_code == 200
        refused = await client.post("/v1/completions", content=body(MAX_JSON_DEPTH + 1))
        assert refused.status_code == 400
        assert "deep" in refused.json()["error"]["message"]


async def status_of(made: Cluster, target: str, headers: list[str]) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", made.gateway.http_port)
    writer.write("\r\n".join([f"GET {target} HTTP/1.1", *headers, "", ""]).encode())
    async with asyncio.timeout(5):
        answer = await reader.readline()
    writer.close()
    return int(answer.split()[1])


async def test_url_and_headers() -> None:
    async with cluster() as made:
        host = ["host: x"]
        path = "/version"
        for extra, status in ((0, 200), (1, 414)):
            target = f"{path}?{'q' * (MAX_URL_BYTES - len(path) + extra)}"
            assert await status_of(made, target, host) == status
        for extra, status in ((0, 200), (1, 431)):
            many = [f"x-{number}: 1" for number in range(MAX_HEADERS - 1 + extra)]
            assert await status_of(made, path, host + many) == status
            large = [f"x: {'y' * (MAX_HEADER_BYTES - len('hostx') - len('x') + extra)}"]
            assert await status_of(made, path, host + large) == status


def test_every_row_has_its_test_and_the_page_is_fresh() -> None:
    others = {
        "the body",
        "the body's depth",
        "the URL",
        "the headers",
        "the headers' size",
        "request_id",
        "prompt",
        "messages",
    }
    others |= {"structured_output", "cache_salt", "seed", "priority"}
    assert {limit.field for limit in LIMITS} == SAMPLING.keys() | others
    assert FILE.read_text() == render(), "run python tools/limits_table.py"
