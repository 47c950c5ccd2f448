"""Requests with several choices through the real gateway: HTTP and gRPC, streams, stops, migrations."""

import json
from typing import Any

import grpc
import grpc.aio
import pytest

from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.fakes.cluster import cluster, http
from tests.fakes.worker import tokens_of

PROMPT = [0, 300, 301, 302]
PAIR = (("prefill", "p1"), ("decode", "d1"))
TWO_AND_TWO = (("prefill", "p1"), ("prefill", "p2"), ("decode", "d1"), ("decode", "d2"))
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "return_token_ids": True}


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("workers", [PAIR, (("decode", "d1"),)], ids=["split", "local"])
async def test_all_choices_in_one_answer(workers: Any) -> None:
    async with cluster(*workers) as made, http(made) as client:
        answer = (await client.post("/v1/completions", json=BODY | {"n": 3})).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["token_ids"] for choice in answer["choices"]] == [
            tokens_of(PROMPT, 8, choice) for choice in range(3)
        ]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 3
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (4, 24)
        await made.quiet()
        assert not made.workers["d1"].aborts


async def test_streamed_choices_are_interleaved_and_end_apart() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        first = tokens_of(PROMPT, 8, 1)
        body = BODY | {"n": 2, "stream": True, "stop_token_ids": [first[3]]}
        body |= {"stream_options": {"include_usage": True}}
        chunks = events((await client.post("/v1/completions", json=body)).text)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 8 + 4
        tokens: dict[int, list[int]] = {0: [], 1: []}
        reasons: list[tuple[int, str]] = []
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            tokens[choice["index"]] += choice["token_ids"]
            if choice["finish_reason"]:
                reasons.append((choice["index"], choice["finish_reason"]))
        assert tokens == {0: tokens_of(PROMPT, 8, 0), 1: first[:4]}
        assert reasons == [(1, "stop"), (0, "length")]
        await made.quiet()


async def test_chat_choices_have_their_own_roles_and_stop_strings() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 6, "n": 2, "stream": True}
        chunks = events((await client.post("/v1/chat/completions", json=body)).text)
        roles = [chunk["choices"][0]["index"] for chunk in chunks if "role" in chunk["choices"][0]["delta"]]
        assert sorted(roles) == [0, 1]
        prompt = list(made.workers["d1"].submits[0].prompt_token_ids)
        decode = made.model.tokenizer.decode
        texts = [decode(tokens_of(prompt, 6, choice)) for choice in range(2)]
        stop = next(text for size in (2, 3, 4) if (text := texts[1][:size]) not in texts[0])
        answer = (
            await client.post("/v1/chat/completions", json=body | {"stream": False, "stop": stop})
        ).json()
        by_index = {choice["index"]: choice for choice in answer["choices"]}
        assert by_index[0]["message"]["content"] == texts[0]
        assert (by_index[1]["message"]["content"], by_index[1]["stop_reason"]) == ("", stop)
        await made.quiet()


@pytest.mark.parametrize("index", [0, 1, 5])
async def test_a_migration_goes_on_with_the_unfinished_choices(index: int) -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["d1"].faults.die_at = index
        made.workers["d1"].faults.token_delay_s = 0.01
        second = tokens_of(PROMPT, 8, 1)
        body = BODY | {"n": 3, "stop_token_ids": [second[2]]}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert [choice["token_ids"] for choice in answer["choices"]] == [
            tokens_of(PROMPT, 8, 0), second[:3], tokens_of(PROMPT, 8, 2),
        ]  # fmt: skip
        submit = made.workers["d2"].submits[-1]
        assert submit.attempt == 1
        assert [each.choice for each in submit.emitted] == ([0, 2] if index == 5 else [0, 1, 2])
        assert answer["usage"]["completion_tokens"] == 8 + 3 + 8
        await made.quiet()


async def test_the_best_choices_are_returned_in_order() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        stop = tokens_of(PROMPT, 8, 2)[1]
        body = BODY | {"n": 2, "best_of": 4, "stop_token_ids": [stop]}
        answer = (await client.post("/v1/completions", json=body)).json()
        # Every token has the same log-probability: the shortest choice is the likeliest.
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert [choice["token_ids"] for choice in answer["choices"]] == [
            tokens_of(PROMPT, 2, 2),
            tokens_of(PROMPT, 8, 0),
        ]
        assert answer["usage"]["completion_tokens"] == 8 + 8 + 2 + 8
        assert answer["choices"][0]["logprobs"] is None
        await made.quiet()


async def test_grpc_choices() -> None:
    async with cluster(*PAIR) as made, grpc.aio.insecure_channel(made.grpc) as channel:
        api = inference_pb2_grpc.InferenceServiceStub(channel)
        prompt = inference_pb2.TokenIds(ids=PROMPT)
        sampling = common_pb2.SamplingParams(max_tokens=5, n=2)
        request = inference_pb2.GenerateRequest(token_ids=prompt, sampling=sampling)
        deltas = [delta async for delta in api.Generate(request)]
        for choice in range(2):
            mine = [delta for delta in deltas if delta.choice == choice]
            assert [token for delta in mine for token in delta.token_ids] == tokens_of(PROMPT, 5, choice)
            assert mine[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert [delta.HasField("usage") for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert deltas[-1].usage.completion_tokens == 10
        whole = await api.Complete(inference_pb2.CompleteRequest(token_ids=prompt, sampling=sampling))
        assert [list(each.token_ids) for each in whole.completions] == [
            tokens_of(PROMPT, 5, choice) for choice in range(2)
        ]
        assert not any(each.logprobs for each in whole.completions)
        sampling.best_of = 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [delta async for delta in api.Generate(inference_pb2.GenerateRequest(
                token_ids=prompt, sampling=sampling
            ))]  # fmt: skip
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        whole = await api.Complete(inference_pb2.CompleteRequest(token_ids=prompt, sampling=sampling))
        assert len(whole.completions) == 2
        assert not any(each.logprobs for each in whole.completions)
        await made.quiet()


async def test_an_abort_ends_every_choice() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        made.workers["d1"].faults.token_delay_s = 0.05
        body = BODY | {"n": 2, "max_tokens": 400, "stream": True, "request_id": "mine"}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            while not (await anext(lines)).startswith("data: "):
                pass
            made.gateway.flow.abort(["mine"])
            rest = [line async for line in lines if line.startswith("data: {")]
        reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest]
        assert reasons.count("abort") == 2
        await made.quiet()
