"""Retries and migrations: what the client sees is what an undisturbed run gives."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from protos.tandem.v1 import common_pb2 as pb
from tests.fakes.cluster import Cluster, cluster, http
from tests.fakes.worker import Faults, tokens_of

PROMPT = [0, 300, 301, 302]
NUM_TOKENS = 12
TWO_AND_TWO = (("prefill", "p1"), ("prefill", "p2"), ("decode", "d1"), ("decode", "d2"))


async def run(client: httpx.AsyncClient, made: Cluster, **fields: Any) -> dict[str, Any]:
    """A request that must succeed with exactly the undisturbed tokens."""
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True} | fields
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer["choices"][0]["token_ids"] == tokens_of(PROMPT, NUM_TOKENS)
    assert answer["choices"][0]["text"] == made.model.tokenizer.decode(tokens_of(PROMPT, NUM_TOKENS))
    assert answer["usage"]["completion_tokens"] == NUM_TOKENS
    await made.quiet()
    return answer


@pytest.mark.parametrize("index", [0, 1, 5, NUM_TOKENS - 1])
async def test_decode_worker_dies(index: int) -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["d1"].faults.die_at = index
        await run(client, made)
        submit = made.workers["d2"].submits[-1]
        assert submit.attempt == 1
        emitted = list(submit.emitted[0].token_ids) if submit.emitted else []
        assert len(emitted) <= max(index, 1)
        assert emitted == tokens_of(PROMPT, len(emitted))
        assert list(submit.prompt_token_ids) == PROMPT


async def test_prefill_worker_dies() -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["p1"].faults.die_at = 0
        await run(client, made)
        assert made.workers["p2"].submits[-1].attempt == 1
        assert (1, 0) in made.workers["d1"].aborts


async def test_only_prefill_worker_dies_and_decode_prefills_itself() -> None:
    async with cluster(("prefill", "p1"), ("decode", "d1")) as made, http(made) as client:
        made.workers["p1"].faults.die_at = 0
        await run(client, made)
        assert not made.workers["d1"].submits[-1].HasField("peer")
        await run(client, made)
        assert made.workers["d1"].submits[-1].attempt == 0


async def test_prefill_worker_dies_after_the_hand_over() -> None:
    async with cluster(("prefill", "p1"), ("decode", "d1")) as made, http(made) as client:
        made.workers["d1"].faults.token_delay_s = 0.02
        request = asyncio.ensure_future(run(client, made))
        heard = made.gateway.fleet.client("p1")
        await made.until(lambda: made.workers["p1"].submits and not heard.num_live)
        await made.workers["p1"].die()
        await request
        assert len(made.workers["d1"].submits) == 1


@pytest.mark.parametrize("worker_id", ["p1", "d1"])
async def test_attach_stream_breaks(worker_id: str) -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers[worker_id].faults.break_stream_at = 0
        await run(client, made)
        await made.until(lambda: worker_id in made.ready())
        assert made.workers[worker_id].num_attaches == 2


async def test_retryable_refusals_move_on_and_three_are_the_end() -> None:
    refusal = pb.AttemptFailed(code=8, message="no blocks", retryable=True)
    async with cluster(("decode", "d1")) as made, http(made) as client:
        made.workers["d1"].faults.fail_next = [refusal, refusal]
        await run(client, made)
        assert [submit.attempt for submit in made.workers["d1"].submits] == [0, 1, 2]
        made.workers["d1"].faults.fail_next = [refusal] * 3
        response = await client.post("/v1/completions", json={"prompt": PROMPT})
        assert (response.status_code, response.json()["error"]["message"]) == (429, "no blocks")
        await made.quiet()


async def test_a_broken_link_is_left_by_both_of_its_ends() -> None:
    """A decode worker that hangs may show at a link of its first, as a failure of the prefill worker."""
    broken = pb.AttemptFailed(code=14, message="KV link: the peer was silent", retryable=True, at_link=True)
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["d1"].faults.ignore_next = 99
        made.workers["p1"].faults.fail_next = [broken]
        await run(client, made)
        assert [submit.attempt for submit in made.workers["d1"].submits] == [0]


async def test_final_failure_is_not_retried() -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["d1"].faults.fail_next = [pb.AttemptFailed(code=13, message="NaN logits")]
        response = await client.post("/v1/completions", json={"prompt": PROMPT})
        assert (response.status_code, response.json()["error"]["message"]) == (500, "NaN logits")
        assert len(made.workers["d1"].submits) == 1
        await made.quiet()


async def test_duplicate_frames_are_taken_once() -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["d1"].faults.duplicate = True
        made.workers["d1"].faults.frame_tokens = 3
        await run(client, made)


async def test_a_gap_fails_the_attempt() -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["d1"].faults.gap_at = 4
        await run(client, made)
        assert list(made.workers["d2"].submits[-1].emitted[0].token_ids) == tokens_of(PROMPT, 4)


async def test_hung_worker_is_found() -> None:
    async with cluster(*TWO_AND_TWO) as made, http(made) as client:
        made.workers["d1"].faults.ignore_next = 1
        made.workers["d1"].faults.stop_heartbeats = True
        await asyncio.wait_for(run(client, made), 4.0)
        states = {worker["id"]: worker["state"] for worker in made.gateway.fleet.describe()}
        assert states["d1"] == "down"
        made.workers["d1"].faults.stop_heartbeats = False
        await made.until(lambda: "d1" in made.ready())


async def test_error_in_a_stream_is_one_event_without_done() -> None:
    async with cluster(("decode", "d1"), migration_timeout_s=0) as made, http(made) as client:
        made.workers["d1"].faults.die_at = 3
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert "data: [DONE]" not in lines


async def test_deadline() -> None:
    async with cluster(("decode", "d1"), request_timeout_s=0.3) as made, http(made) as client:
        made.workers["d1"].faults.token_delay_s = 0.05
        response = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 100})
        assert response.status_code == 504
        await made.quiet()


async def test_deadline_while_waiting_and_abort_by_id() -> None:
    settings: dict[str, Any] = {"max_concurrent_requests": 1, "request_timeout_s": 0.4}
    async with cluster(("decode", "d1"), **settings) as made, http(made) as client:
        made.workers["d1"].faults.ignore_next = 1
        body = {"prompt": PROMPT}
        first = asyncio.ensure_future(
            client.post("/v1/completions", json=body, headers={"x-request-id": "a"})
        )
        await made.until(lambda: made.gateway.flow.num_running == 1)
        second = asyncio.ensure_future(
            client.post("/v1/completions", json=body, headers={"x-request-id": "b"})
        )
        await made.until(lambda: made.gateway.flow.num_waiting == 1)
        twin = await client.post("/v1/completions", json=body, headers={"x-request-id": "b"})
        assert twin.status_code == 409
        assert made.gateway.flow.abort(["a", "a", "zzz"]) == ["a"]
        answer = (await first).json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert (await second).status_code == 200
        assert (1, 0) in made.workers["d1"].aborts


async def test_drain_finishes_then_fails() -> None:
    async with cluster(("decode", "d1")) as made, http(made) as client:
        made.workers["d1"].faults.token_delay_s = 0.01
        quick = asyncio.ensure_future(run(client, made))
        slow = asyncio.ensure_future(
            client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 500})
        )
        await made.until(lambda: made.gateway.flow.num_running == 2)
        drain = asyncio.ensure_future(made.gateway.drain(0.8))
        await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json={"prompt": PROMPT})
        assert refused.status_code == 503
        assert (await client.get("/ready")).json() == {"status": "the server is shutting down"}
        await quick
        await drain
        assert (await slow).status_code == 503


async def test_mismatching_worker_is_refused() -> None:
    async with cluster(("decode", "d1")) as made:
        from tests.fakes.worker import FakeWorker

        other = FakeWorker("decode", "d2", made.internal, made.links, made.facts(dtype="bfloat16"), Faults())
        made.workers["d2"] = other
        await other.start()
        await asyncio.sleep(0.2)
        assert made.gateway.fleet.registry.get("d2") is None


async def test_threshold_prefills_short_prompts_on_decode() -> None:
    settings = {"local_prefill_threshold": 5}
    async with cluster(("prefill", "p1"), ("decode", "d1"), **settings) as made, http(made) as client:
        await run(client, made)
        assert not made.workers["p1"].submits
        await client.post("/v1/completions", json={"prompt": [*PROMPT, 303]})
        assert len(made.workers["p1"].submits) == 1
