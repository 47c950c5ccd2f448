"""Peers of a later minor version: what they say beyond us is ignored. Another major one is refused."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf.message import Message

from protos.tandem.v1 import common_pb2 as pb
from protos.tandem.v1 import inference_pb2, inference_pb2_grpc, registry_pb2, registry_pb2_grpc
from runtime import rpc
from runtime.errors import Mismatch
from runtime.tracing import Tracer
from runtime.version import PROTOCOL_MAJOR
from tests.fakes.cluster import cluster, http
from tests.fakes.worker import FakeWorker, tokens_of
from worker.attach import AttachHub, AttemptKey
from worker.timeline import Timelines

PROMPT = [300, 301, 302, 303]
NUM_TOKENS = 6
UNKNOWN = b"\xca\x3e\x05later" + b"\xd0\x3e\x07"
"""Fields 1001, a string, and 1002, a number; no message of ours has them."""


def later(message: Any) -> Any:
    """The message as a later version says it: with fields of its own, in all of its parts."""
    made = type(message).FromString(message.SerializeToString() + UNKNOWN)
    for field, value in made.ListFields():
        if isinstance(value, Message):
            value.CopyFrom(later(value))
        elif field.message_type is not None:
            parts = [later(part) for part in value]
            made.ClearField(field.name)
            getattr(made, field.name).extend(parts)
    return made


def test_a_later_message_has_all_that_ours_has() -> None:
    frame = pb.TokenFrame(request=3, token_ids=[4, 5])
    event = pb.AttachEvent(tokens=[frame, frame], load=pb.WorkerLoad(blocks_total=7))
    found = later(event)
    assert found.SerializeToString().count(UNKNOWN) == 4
    assert [list(each.token_ids) for each in found.tokens] == [[4, 5], [4, 5]]


class LaterWorker(FakeWorker):
    """Of the next minor version."""

    async def _heartbeats(self) -> AsyncIterator[registry_pb2.RegisterRequest]:
        async for request in super()._heartbeats():
            if request.HasField("info"):
                request.info.version = f"{PROTOCOL_MAJOR}.99.0"
            yield later(request)

    async def attach(self, commands: AsyncIterator[pb.AttachCommand]) -> AsyncIterator[pb.AttachEvent]:
        async for event in super().attach(commands):
            yield later(event)


async def test_later_workers_and_clients_are_served() -> None:
    async with cluster() as made, http(made) as client:
        for role, name in (("prefill", "p1"), ("decode", "d1")):
            worker = LaterWorker(role, name, made.internal, made.links, made.facts())
            made.workers[name] = await worker.start()
            await made.until(lambda name=name: name in made.ready())
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "return_token_ids": True}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["token_ids"] == tokens_of(PROMPT, NUM_TOKENS)
        assert all(worker.submits for worker in made.workers.values())
        request = inference_pb2.CompleteRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=pb.SamplingParams(max_tokens=NUM_TOKENS, temperature=0),
        )
        async with grpc.aio.insecure_channel(made.grpc) as channel:
            complete = inference_pb2_grpc.InferenceServiceStub(channel).Complete
            found = await complete(later(request))
        assert list(found.completions[0].token_ids) == tokens_of(PROMPT, NUM_TOKENS)
        await made.quiet()


async def test_a_worker_of_another_major_version_is_refused_by_name() -> None:
    async with cluster() as made, rpc.channel(made.internal) as channel:

        async def say() -> AsyncIterator[registry_pb2.RegisterRequest]:
            identity = pb.WorkerIdentity(worker_id="w", boot_id="b", address="127.0.0.1:1")
            info = registry_pb2.WorkerInfo(
                identity=identity,
                role=pb.WORKER_ROLE_DECODE,
                model=made.facts(),
                protocol_major=PROTOCOL_MAJOR + 1,
            )
            yield later(registry_pb2.RegisterRequest(info=info))

        call = registry_pb2_grpc.RegistryServiceStub(channel).Register(say())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        expected = f"protocol_major: gateway {PROTOCOL_MAJOR}, worker {PROTOCOL_MAJOR + 1}"
        assert refused.value.details() == expected
        assert not made.gateway.fleet.registry.all()


class Handler:
    """Takes every attempt."""

    def __init__(self) -> None:
        self.submits: list[pb.Submit] = []

    def submit(self, key: AttemptKey, submit: pb.Submit) -> None:
        self.submits.append(submit)

    def abort(self, key: AttemptKey) -> None:
        pass

    def abort_choice(self, key: AttemptKey, choice: int) -> None:
        pass


async def test_a_worker_takes_what_it_knows_of_a_later_gateway_s_words() -> None:
    """A command that it does not know is none; another major version is refused."""
    handler = Handler()
    hub = AttachHub(handler, pb.WorkerLoad, Timelines(Tracer(), "decode", lambda *_: None), heartbeat_s=0.01)

    async def say(major: int) -> AsyncIterator[pb.AttachCommand]:
        yield later(pb.AttachCommand(hello=pb.AttachHello(gateway_id="g", protocol_major=major)))
        yield pb.AttachCommand.FromString(UNKNOWN)
        submit = pb.Submit(request=3, transfer_id=bytes(16), prompt_token_ids=PROMPT)
        yield later(pb.AttachCommand(submit=submit))

    assert [event async for event in hub.serve(say(PROTOCOL_MAJOR))]
    (submit,) = handler.submits
    assert (submit.request, list(submit.prompt_token_ids)) == (3, PROMPT)
    with pytest.raises(Mismatch, match="protocol_major"):
        [event async for event in hub.serve(say(PROTOCOL_MAJOR + 1))]
