"""The HTTP face against fake workers, through real sockets."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.cluster import Cluster, cluster, http
from tests.fakes.worker import EOS, tokens_of

PAIR = (("prefill", "p1"), ("decode", "d1"))
PROMPT = [0, 300, 301, 302]


async def events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def test_completion_whole_and_streamed_say_the_same() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        body = {"prompt": PROMPT, "max_tokens": 8, "return_token_ids": True}
        whole = (await client.post("/v1/completions", json=body)).json()
        choice = whole["choices"][0]
        assert choice["token_ids"] == tokens_of(PROMPT, 8)
        assert choice["prompt_token_ids"] == PROMPT
        assert choice["text"] == made.model.tokenizer.decode(tokens_of(PROMPT, 8))
        assert choice["finish_reason"] == "length"
        assert whole["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 8,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        chunks = await events(client, "/v1/completions", body | {"stream_options": {"include_usage": True}})
        assert chunks.pop() == "[DONE]"
        usage = chunks.pop()
        assert usage["choices"] == []
        assert usage["usage"] == whole["usage"]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
        assert [t for chunk in chunks for t in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
        assert "prompt_token_ids" not in chunks[1]["choices"][0]
        await made.quiet()


async def test_text_prompt_gets_bos_and_special_spellings_stay_text() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        body = {"prompt": "def <|eos|> f", "max_tokens": 1}
        await client.post("/v1/completions", json=body)
        sent = list(made.workers["d1"].submits[-1].prompt_token_ids)
        assert sent[0] == 0
        assert EOS not in sent
        assert made.model.tokenizer.decode(sent) == "def <|eos|> f"
        assert made.workers["d1"].submits[-1].peer.worker_id == "p1"
        assert made.workers["p1"].submits[-1].peer.worker_id == "d1"
        assert made.workers["p1"].submits[-1].transfer_id == made.workers["d1"].submits[-1].transfer_id


async def test_cache_salt_reaches_both_workers() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        body = {"prompt": PROMPT, "max_tokens": 1, "cache_salt": "tenant"}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert [worker.submits[-1].cache_salt for worker in made.workers.values()] == ["tenant"] * 2
        for bad in ("", "x" * 257, 7):
            response = await client.post("/v1/completions", json=body | {"cache_salt": bad})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_salt")


async def test_a_prompt_goes_where_its_prefix_is() -> None:
    async with cluster(("prefill", "p2"), ("decode", "d2")) as made, http(made) as client:

        async def workers_of(prompt: list[int]) -> set[str]:
            before = {name: len(worker.submits) for name, worker in made.workers.items()}
            body = {"prompt": prompt, "max_tokens": 2}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            await made.until(lambda: not any(each.num_requests for each in made.gateway.fleet.candidates()))
            return {name for name, worker in made.workers.items() if len(worker.submits) > before[name]}

        assert await workers_of([300] * 40) == {"p2", "d2"}
        for role, name in (("prefill", "p1"), ("decode", "d1")):
            await made.add(role, name)
        assert await workers_of([301] * 40) == {"p1", "d1"}
        assert await workers_of([300] * 40 + [5, 6]) == {"p2", "d2"}
        await made.workers["p2"].die()
        await made.until(lambda: "p2" not in made.ready())
        await made.add("prefill", "p2")
        assert await workers_of([300] * 40) == {"p1", "d2"}, "a new boot has an empty cache"


async def test_openai_client_chat() -> None:
    async with cluster(*PAIR) as made:
        client = openai.AsyncOpenAI(base_url=f"{made.url}/v1", api_key="none", max_retries=0)
        async with client:
            assert [model.id async for model in client.models.list()] == ["demo"]
            messages: Any = [{"role": "user", "content": "add <|eos|>"}]
            whole = await client.chat.completions.create(
                model="demo", messages=messages, max_completion_tokens=6, logprobs=True, top_logprobs=2
            )
            text = whole.choices[0].message.content
            assert whole.choices[0].logprobs is not None
            assert len(whole.choices[0].logprobs.content or []) == 6
            assert len((whole.choices[0].logprobs.content or [])[0].top_logprobs) == 2
            stream = await client.chat.completions.create(
                model="demo", messages=messages, max_tokens=6, stream=True, extra_body={"top_k": 5}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
            assert chunks[0].choices[0].delta.role == "assistant"
            assert chunks[-1].choices[0].finish_reason == "length"
            prompt = list(made.workers["d1"].submits[-1].prompt_token_ids)
            assert prompt.count(EOS) == 0
            assert made.model.tokenizer.decode(prompt) == "# add <|eos|>\ndef "
            with pytest.raises(openai.NotFoundError, match="nope"):
                await client.chat.completions.create(model="nope", messages=messages)


async def test_completion_logprobs_shape() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        body = {"prompt": PROMPT, "max_tokens": 3, "logprobs": 1}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [-0.5] * 3
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert len(logprobs["top_logprobs"]) == 3
        assert logprobs["text_offset"][0] == 0


async def test_eos_counts_but_does_not_show() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        for worker in made.workers.values():
            worker.faults.eos_at = 3
        body = {"prompt": PROMPT, "max_tokens": 9, "return_token_ids": True}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["token_ids"] == [*tokens_of(PROMPT, 3), EOS]
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["stop_reason"] is None
        assert answer["choices"][0]["text"] == made.model.tokenizer.decode(tokens_of(PROMPT, 3))
        assert answer["usage"]["completion_tokens"] == 4


async def test_finish_at_token_zero() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        for worker in made.workers.values():
            worker.faults.eos_at = 0
        answer = (await client.post("/v1/completions", json={"prompt": PROMPT})).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["text"] == ""
        assert answer["usage"]["completion_tokens"] == 1
        await made.quiet()


async def test_stop_string_and_stop_token_id() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        tokens = tokens_of(PROMPT, 12)
        whole = made.model.tokenizer.decode(tokens)
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
        body = {"prompt": PROMPT, "max_tokens": 12, "stop": stop, "return_token_ids": True}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert choice["token_ids"] == tokens[: len(choice["token_ids"])]
        assert len(choice["token_ids"]) < 12
        await made.quiet()
        included = body | {"include_stop_str_in_output": True}
        choice = (await client.post("/v1/completions", json=included)).json()["choices"][0]
        assert choice["text"] == whole[: whole.index(stop) + 3]
        by_id = {"prompt": PROMPT, "max_tokens": 12, "stop_token_ids": [tokens[4]], "return_token_ids": True}
        choice = (await client.post("/v1/completions", json=by_id)).json()["choices"][0]
        assert choice["token_ids"] == tokens[:5]
        assert choice["stop_reason"] == tokens[4]
        assert choice["text"] == made.model.tokenizer.decode(tokens[:4])


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"prompt": PROMPT, "temperature": -1}, "temperature"),
    ("completions", {"prompt": PROMPT, "temperature": 2.5}, "temperature"),
    ("completions", {"prompt": PROMPT, "temperature": "1"}, "temperature"),
    ("completions", {"prompt": PROMPT, "top_p": 0}, "top_p"),
    ("completions", {"prompt": PROMPT, "max_tokens": -1}, "max_tokens"),
    ("completions", {"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
    ("completions", {"prompt": PROMPT, "max_tokens": True}, "max_tokens"),
    ("completions", {"prompt": PROMPT, "max_tokens": 1.5}, "max_tokens"),
    ("completions", {"prompt": PROMPT, "max_tokens": 509}, "max_tokens"),
    ("completions", {"prompt": [5] * 512}, "prompt"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {}, "prompt"),
    ("completions", {"prompt": [4096]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"prompt": ["a", "b"]}, "prompt"),
    ("completions", {"prompt": PROMPT, "n": 9}, "n"),
    ("completions", {"prompt": PROMPT, "n": 0}, "n"),
    ("completions", {"prompt": PROMPT, "n": 2, "best_of": 1}, "best_of"),
    ("completions", {"prompt": PROMPT, "best_of": 9}, "best_of"),
    ("completions", {"prompt": PROMPT, "best_of": 2, "stream": True}, "stream"),
    ("completions", {"prompt": PROMPT, "n": 2, "use_beam_search": True, "stream": True}, "stream"),
    ("completions", {"prompt": PROMPT, "use_beam_search": True}, "best_of"),
    ("completions", {"prompt": PROMPT, "n": 2, "use_beam_search": True, "top_p": 0.5}, "top_p"),
    ("completions", {"prompt": PROMPT, "n": 2, "use_beam_search": True, "stop": "x"}, "stop"),
    ("completions", {"prompt": PROMPT, "length_penalty": 2}, "length_penalty"),
    ("completions", {"prompt": PROMPT, "early_stopping": "yes"}, "early_stopping"),
    ("completions", {"prompt": PROMPT, "echo": True}, "echo"),
    ("completions", {"prompt": PROMPT, "suffix": "x"}, "suffix"),
    ("completions", {"prompt": PROMPT, "seed": 2**63}, "seed"),
    ("completions", {"prompt": PROMPT, "stop": ["a"] * 17}, "stop"),
    ("completions", {"prompt": PROMPT, "stop": ""}, "stop"),
    ("completions", {"prompt": PROMPT, "stop": 5}, "stop"),
    ("completions", {"prompt": PROMPT, "logprobs": 21}, "logprobs"),
    ("completions", {"prompt": PROMPT, "logit_bias": {"4096": 1}}, "logit_bias"),
    ("completions", {"prompt": PROMPT, "logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"prompt": PROMPT, "logit_bias": {"5": 101}}, "logit_bias"),
    ("completions", {"prompt": PROMPT, "stop_token_ids": [9999]}, "stop_token_ids"),
    ("completions", {"prompt": PROMPT, "min_tokens": 99}, "min_tokens"),
    ("completions", {"prompt": PROMPT, "colour": "red"}, "colour"),
    ("completions", {"prompt": PROMPT, "stream": "yes"}, "stream"),
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 600},
        "max_completion_tokens",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 21},
        "top_logprobs",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json"}},
        "response_format",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
    ),
]


async def test_errors_name_the_field() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        for path, body, field in BAD:
            response = await client.post(f"/v1/{path}", json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, field), (body, error)
            assert field.split("[")[0] in error["message"], error
            assert set(error) == {"message", "type", "param", "code"}
        assert not made.workers["d1"].submits
        assert (await client.post("/v1/completions", json={"prompt": PROMPT})).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"{", b"[1]", b"nul", b'{"prompt": "\xff"}', b"[" * 5000, b'{"a":' * 100000, b""],
)
async def test_broken_bodies(content: bytes) -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        response = await client.post("/v1/completions", content=content)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_json_does_not_have_name_their_field(number: str) -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        for field in ("temperature", "top_p", "max_tokens"):
            content = f'{{"prompt": [1], "{field}": {number}}}'
            response = await client.post("/v1/completions", content=content)
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)


async def test_infinite_number_and_large_body() -> None:
    async with cluster(*PAIR, max_body_bytes=1000) as made, http(made) as client:
        response = await client.post("/v1/completions", content=b'{"prompt": [1], "temperature": 1e309}')
        assert response.status_code == 400
        response = await client.post("/v1/completions", json={"prompt": "x" * 1000})
        assert response.status_code == 413

        reader, writer = await asyncio.open_connection("127.0.0.1", made.gateway.http_port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write((b"190\r\n" + b" " * 400 + b"\r\n") * 3)
        answer = await reader.read()  # to its end: the gateway closes instead of reading on
        writer.close()
        assert b" 413 " in answer
        assert b"payload_too_large" in answer


async def test_routes_and_headers() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        response = await client.get("/nowhere")
        assert (response.status_code, response.json()["error"]["param"]) == (404, None)
        assert (await client.get("/v1/completions")).status_code == 405
        response = await client.get("/v1/models/other")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert (await client.get("/v1/models/demo")).json()["root"].endswith("demo_model")
        response = await client.get("/version", headers={"x-request-id": "abc"})
        assert response.headers["x-request-id"] == "abc"
        response = await client.post(
            "/v1/completions", json={"prompt": PROMPT}, headers={"x-request-id": "mine"}
        )
        assert response.json()["id"] == "cmpl-mine"
        assert (await client.get("/ready")).status_code == 200
        assert "tandem_time_to_first_token_seconds_count 1.0" in (await client.get("/metrics")).text
        state = (await client.get("/debug/state")).json()
        assert state["requests"] == 0
        assert [(worker["id"], worker["role"], worker["state"]) for worker in state["workers"]] == [
            ("d1", "decode", "ready"),
            ("p1", "prefill", "ready"),
        ]


async def test_tokenize_and_detokenize() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        answer = (await client.post("/tokenize", json={"prompt": "def f(x):"})).json()
        assert answer["tokens"][0] == 0
        assert answer["count"] == len(answer["tokens"])
        plain = await client.post("/tokenize", json={"prompt": "def f(x):", "add_special_tokens": False})
        assert plain.json()["tokens"] == answer["tokens"][1:]
        text = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
        assert text == {"prompt": "def f(x):"}
        chat = await client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
        assert made.model.tokenizer.decode(chat.json()["tokens"]) == "# hi\ndef "
        assert (await client.post("/detokenize", json={"tokens": [5000]})).status_code == 400


async def test_not_ready_without_decode_worker() -> None:
    async with cluster(("prefill", "p1")) as made, http(made) as client:
        response = await client.get("/ready")
        assert response.status_code == 503
        assert "no decode worker" in response.json()["status"]
        response = await client.post("/v1/completions", json={"prompt": PROMPT})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert (await client.get("/health")).status_code == 200


async def _hold(made: Cluster) -> None:
    for worker in made.workers.values():
        worker.faults.token_delay_s = 0.02


@pytest.mark.parametrize("stream", [True, False])
async def test_disconnect_aborts_on_the_workers(stream: bool) -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        await _hold(made)
        body = {"prompt": PROMPT, "max_tokens": 400, "stream": stream}
        if stream:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                await anext(response.aiter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=body, timeout=0.2)
        await made.quiet()
        assert made.workers["d1"].aborts
        assert 'tandem_requests_total{outcome="cancelled"} 1.0' in (await client.get("/metrics")).text


async def test_full_queue_refuses_at_once() -> None:
    async with (
        cluster(*PAIR, max_concurrent_requests=1, max_waiting_requests=0) as made,
        http(made) as client,
    ):
        await _hold(made)
        body = {"prompt": PROMPT, "max_tokens": 400}
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            await anext(response.aiter_lines())
            refused = await client.post("/v1/completions", json=body)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
        await made.quiet()


async def test_a_client_that_does_not_read_delays_nobody() -> None:
    async with cluster(*PAIR) as made, http(made) as client:
        body = {"prompt": PROMPT, "max_tokens": 500, "stream": True, "logprobs": 20}
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n".encode()
        stuck = [await asyncio.open_connection("127.0.0.1", made.gateway.http_port) for _ in range(3)]
        for _, writer in stuck:
            writer.write(head + raw)
        await made.until(lambda: made.gateway.flow.num_live == 3)
        answer = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 50})
        assert answer.json()["usage"]["completion_tokens"] == 50
        for _, writer in stuck:
            writer.transport.abort()
        await made.quiet()


async def test_many_streams_at_once() -> None:
    async with cluster(*PAIR, max_concurrent_requests=8) as made, http(made) as client:

        async def one(number: int) -> None:
            prompt = [0, 300 + number]
            body = {"prompt": prompt, "max_tokens": 10, "return_token_ids": True}
            chunks = await events(client, "/v1/completions", body)
            ids = [t for chunk in chunks[:-1] for t in chunk["choices"][0]["token_ids"]]
            assert ids == tokens_of(prompt, 10)

        async with asyncio.TaskGroup() as tasks:
            for number in range(32):
                tasks.create_task(one(number))
        await made.quiet()
        assert made.gateway.state()["requests_waiting"] == 0
