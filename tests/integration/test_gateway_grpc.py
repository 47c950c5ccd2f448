"""The gRPC face against fake workers, through real sockets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.fakes.cluster import Cluster, cluster
from tests.fakes.worker import tokens_of

PAIR = (("prefill", "p1"), ("decode", "d1"))
PROMPT = [0, 300, 301, 302]
SERVICE = "tandem.v1.InferenceService"


def request(**sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=PROMPT), sampling=common_pb2.SamplingParams(**sampling)
    )


@asynccontextmanager
async def stub(made: Cluster) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(made.grpc) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def test_generate_and_complete() -> None:
    async with cluster(*PAIR) as made, stub(made) as api:
        deltas = [delta async for delta in api.Generate(request(max_tokens=8))]
        assert [t for delta in deltas for t in delta.token_ids] == tokens_of(PROMPT, 8)
        assert deltas[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert deltas[-1].usage == common_pb2.Usage(prompt_tokens=4, completion_tokens=8, cached_tokens=2)
        assert not any(delta.HasField("finish_reason") for delta in deltas[:-1])
        text = "".join(delta.text for delta in deltas)
        assert text == made.model.tokenizer.decode(tokens_of(PROMPT, 8))
        whole = await api.Complete(
            inference_pb2.CompleteRequest(
                request_id="mine",
                token_ids=inference_pb2.TokenIds(ids=PROMPT),
                sampling=common_pb2.SamplingParams(max_tokens=8),
            )
        )
        assert (whole.request_id, whole.completions[0].text) == ("mine", text)
        sent = made.workers["d1"].submits[0].sampling
        assert sent.temperature == pytest.approx(0.7)
        assert sent.top_p == pytest.approx(0.95)
        assert all(sent.HasField(name) for name in ("max_tokens", "seed", "top_k", "min_p"))
        await made.quiet()


async def test_cache_salt_reaches_both_workers() -> None:
    async with cluster(*PAIR) as made, stub(made) as api:
        asked = request(max_tokens=1)
        asked.cache_salt = "tenant"
        assert [delta async for delta in api.Generate(asked)]
        assert [worker.submits[-1].cache_salt for worker in made.workers.values()] == ["tenant"] * 2
        asked.cache_salt = "x" * 257
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [delta async for delta in api.Generate(asked)]
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_max_tokens_unset_is_what_the_context_leaves() -> None:
    async with cluster(*PAIR) as made, stub(made) as api:
        deltas = [delta async for delta in api.Generate(request())]
        assert sum(len(delta.token_ids) for delta in deltas) == 512 - 4


async def test_errors_carry_details() -> None:
    async with cluster(*PAIR) as made, stub(made) as api:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await api.Complete(inference_pb2.CompleteRequest(text="x", model="nope"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        for asked, field in (
            (request(temperature=float("nan")), "temperature"),
            (request(max_tokens=600), "max_tokens"),
            (inference_pb2.GenerateRequest(), "prompt"),
            (inference_pb2.GenerateRequest(text=""), "prompt"),
            (inference_pb2.GenerateRequest(text="x", request_id="a b"), "request_id"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                _ = [delta async for delta in api.Generate(asked)]
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            status = rpc_status.from_call(raised.value)
            violations = error_details_pb2.BadRequest()
            assert any(detail.Unpack(violations) for detail in status.details)
            assert violations.field_violations[0].field == field


async def test_malformed_message_harms_nobody() -> None:
    async with cluster(*PAIR) as made, grpc.aio.insecure_channel(made.grpc) as channel:
        raw = channel.unary_stream(f"/{SERVICE}/Generate")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [item async for item in raw(b"\xff\xff\xff\xff")]
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        api = inference_pb2_grpc.InferenceServiceStub(channel)
        assert (await api.ListModels(inference_pb2.ListModelsRequest())).models[0].id == "demo"


async def test_cancel_deadline_and_abort() -> None:
    async with cluster(*PAIR) as made, stub(made) as api:
        made.workers["d1"].faults.token_delay_s = 0.02
        call = api.Generate(request(max_tokens=400))
        await call.read()
        call.cancel()
        await made.quiet()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [delta async for delta in api.Generate(request(max_tokens=400), timeout=0.2)]
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await made.quiet()
        asked = request(max_tokens=400)
        asked.request_id = "mine"
        call = api.Generate(asked)
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await api.Generate(asked).read()
        assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
        answer = await api.Abort(inference_pb2.AbortRequest(request_ids=["mine", "other"]))
        assert list(answer.aborted) == ["mine"]
        last = None
        while (delta := await call.read()) is not grpc.aio.EOF:
            last = delta
        assert last is not None
        assert last.finish_reason == common_pb2.FINISH_REASON_ABORT
        assert last.usage.completion_tokens > 0
        await made.quiet()


async def test_tokenize_and_info() -> None:
    async with cluster(*PAIR) as made, stub(made) as api:
        answer = await api.Tokenize(inference_pb2.TokenizeRequest(text="def f(x):"))
        assert answer.token_ids[0] == 0
        assert answer.max_model_len == 512
        text = await api.Detokenize(inference_pb2.DetokenizeRequest(token_ids=answer.token_ids))
        assert text.text == "def f(x):"
        message = inference_pb2.ChatMessage(role="user", content="hi")
        chat = inference_pb2.TokenizeRequest(messages=inference_pb2.ChatMessages(messages=[message]))
        assert made.model.tokenizer.decode((await api.Tokenize(chat)).token_ids) == "# hi\ndef "
        info = await api.GetServerInfo(inference_pb2.GetServerInfoRequest())
        assert [worker.state for worker in info.workers] == [common_pb2.WORKER_STATE_READY] * 2


async def test_health_and_reflection() -> None:
    async with cluster() as made, grpc.aio.insecure_channel(made.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            answer: int = (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
            return answer

        assert await status(SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
        await made.add("decode", "d1")
        async with asyncio.timeout(2):
            while await status(SERVICE) != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.02)
        assert await status("") == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        answers = [answer async for answer in reflection.ServerReflectionInfo(ask())]
        assert SERVICE in {service.name for service in answers[0].list_services_response.service}
        await made.gateway.drain(0.1)
        assert await status("") == health_pb2.HealthCheckResponse.NOT_SERVING
