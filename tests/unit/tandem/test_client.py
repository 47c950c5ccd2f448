"""The client against a small service in the same process."""

import asyncio

import pytest

from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from runtime import rpc
from runtime.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    TandemError,
    Unavailable,
)
from tandem import Client


class FakeService(inference_pb2_grpc.InferenceServiceServicer):
    """Answers from what the request says; `error` is raised instead when set."""

    def __init__(self):
        self.error = None
        self.requests = []
        self.cancelled = asyncio.Event()

    async def Generate(self, request, context):
        self.requests.append(request)
        async with rpc.translated(context):
            if self.error is not None:
                raise self.error
            try:
                for index in range(request.sampling.max_tokens):
                    yield inference_pb2.GenerateResponse(request_id="r", token_ids=[index], text=f"<{index}>")
                if request.sampling.ignore_eos:
                    await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        yield inference_pb2.GenerateResponse(
            request_id="r",
            finish_reason=common_pb2.FINISH_REASON_LENGTH,
            usage=common_pb2.Usage(prompt_tokens=4, completion_tokens=2, cached_tokens=1),
        )

    async def Complete(self, request, context):
        self.requests.append(request)
        async with rpc.translated(context):
            if self.error is not None:
                raise self.error
        top = [common_pb2.TopLogprob(token_id=3, logprob=-1.0)]
        choice = inference_pb2.Completion(
            text="x",
            token_ids=[9],
            finish_reason=common_pb2.FINISH_REASON_STOP,
            stop_reason="y",
            logprobs=[common_pb2.TokenLogprob(logprob=-0.5, top=top)],
        )
        return inference_pb2.CompleteResponse(request_id="c", model="m", completions=[choice])

    async def Tokenize(self, request, context):
        ids = [len(request.text), int(request.add_special_tokens), len(request.messages.messages)]
        return inference_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request, context):
        return inference_pb2.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    async def ListModels(self, request, context):
        return inference_pb2.ListModelsResponse(
            models=[inference_pb2.Model(id="m", root="/m", max_model_len=7)]
        )

    async def GetServerInfo(self, request, context):
        worker = inference_pb2.WorkerStatus(
            identity=common_pb2.WorkerIdentity(worker_id="decode-0", address="h:1"),
            role=common_pb2.WORKER_ROLE_DECODE,
            state=common_pb2.WORKER_STATE_READY,
            load=common_pb2.WorkerLoad(blocks_used=5, blocks_total=10),
        )
        return inference_pb2.GetServerInfoResponse(version="1", model="m", max_model_len=7, workers=[worker])

    async def Abort(self, request, context):
        return inference_pb2.AbortResponse(aborted=[i for i in request.request_ids if i != "unknown"])


@pytest.fixture
async def service():
    fake = FakeService()
    server = rpc.server([], max_message_bytes=1 << 20)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{rpc.listen(server, '127.0.0.1', 0, '--grpc-port')}"
    await server.start()
    yield fake
    await server.stop(0)


@pytest.fixture
async def client(service):
    async with Client(service.address) as client:
        yield client


async def test_generate_streams_deltas_and_ends_with_usage(client, service):
    deltas = [d async for d in client.generate("def ", max_tokens=2, temperature=0.0, stop="\n")]
    assert "".join(d.text for d in deltas) == "<0><1>"
    assert [d.token_ids for d in deltas] == [(0,), (1,), ()]
    assert [d.finish_reason for d in deltas] == [None, None, "length"]
    assert deltas[-1].usage.completion_tokens == 2
    sampling = service.requests[0].sampling
    assert sampling.HasField("temperature")
    assert not sampling.HasField("top_p")
    assert list(sampling.stop) == ["\n"]


async def test_prompt_kinds(client, service):
    await client.complete("text")
    await client.complete([1, 2])
    await client.complete([{"role": "user", "content": "hi"}])
    kinds = [request.WhichOneof("prompt") for request in service.requests]
    assert kinds == ["text", "token_ids", "messages"]


async def test_complete(client):
    answer = await client.complete("p")
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("x", "stop", "y")
    assert answer.logprobs[0].top == ((3, -1.0),)


async def test_small_calls(client):
    assert await client.tokenize("abc") == [3, 1, 0]
    assert await client.tokenize([{"role": "user", "content": "hi"}], add_special_tokens=False) == [0, 0, 1]
    assert await client.detokenize([72, 105]) == "Hi"
    assert (await client.models())[0].root == "/m"
    assert await client.abort("a", "unknown") == ["a"]
    worker = (await client.server_info()).workers[0]
    assert (worker.id, worker.role, worker.state, worker.blocks_used) == ("decode-0", "decode", "ready", 5)


async def test_leaving_the_loop_cancels_the_request(client, service):
    stream = client.generate("p", max_tokens=1, ignore_eos=True)
    async for _ in stream:
        break
    await stream.aclose()
    async with asyncio.timeout(2):
        await service.cancelled.wait()


async def test_cancelling_the_task_stays_a_cancellation(client, service):
    async def consume():
        async for _ in client.generate("p", max_tokens=1, ignore_eos=True):
            started.set()

    started = asyncio.Event()
    task = asyncio.ensure_future(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_timeout_becomes_a_deadline(client):
    with pytest.raises(DeadlineExceeded):
        async for _ in client.generate("p", ignore_eos=True, timeout=0.02):
            pass


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("wrong", field="sampling.top_p"),
        ContextLengthExceeded("too long", field="prompt"),
        Overloaded("full", retry_after_s=1.5),
        PayloadTooLarge("too big"),
        Cancelled("the server cancelled the call"),
    ],
    ids=lambda error: error.reason,
)
@pytest.mark.parametrize("method", ["generate", "complete"])
async def test_errors_come_back_as_they_were_raised(client, service, error, method):
    service.error = error
    call = client.complete("p") if method == "complete" else anext(client.generate("p"))
    with pytest.raises(TandemError) as caught:
        await call
    assert type(caught.value) is type(error)
    assert caught.value.message == error.message
    assert (caught.value.field, caught.value.retry_after_s) == (error.field, error.retry_after_s)


async def test_nobody_listens():
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match=r"^cannot reach 127\.0\.0\.1:1 \("):
            await client.models()


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json": "{}"}, {"json_schema": "{}"}),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["a", "b"]}, {"choice": common_pb2.TextChoices(texts=["a", "b"])}),
    ],
)
async def test_structured_output(client, service, given, want):
    await client.complete("p", structured_output=given)
    assert service.requests[0].sampling.structured_output == common_pb2.StructuredOutput(**want)


@pytest.mark.parametrize(
    "sampling", [{"structured_output": {}}, {"structured_output": {"xml": "x"}}, {"early_stopping": "often"}]
)
async def test_values_that_the_wire_cannot_say(client, sampling):
    with pytest.raises(ValueError, match=min(sampling)):
        await client.complete("p", **sampling)


async def test_choices(client, service):
    answer = await client.complete("p", n=2, best_of=3, early_stopping=True, use_beam_search=True)
    asked = service.requests[0].sampling
    assert (asked.n, asked.best_of, asked.use_beam_search) == (2, 3, True)
    assert asked.early_stopping == common_pb2.EARLY_STOPPING_WHEN_ENOUGH
    assert [choice.text for choice in answer.choices] == ["x"]


async def test_unknown_sampling_parameter(client):
    with pytest.raises(TypeError, match="beam"):
        await client.complete("p", beam=3)
