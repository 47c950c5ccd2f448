"""The attach hub over plain async iterators: commands in, events out."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import Mismatch, Overloaded
from runtime.memory_guard import MemoryGuard
from runtime.tracing import Tracer
from worker.attach import AttachHub, AttemptKey, TokenUpdate
from worker.timeline import Timelines


class FakeHandler:
    def __init__(self) -> None:
        self.live: set[AttemptKey] = set()
        self.refuse = False
        self.ended_choices: list[tuple[AttemptKey, int]] = []

    def submit(self, key: AttemptKey, submit: pb.Submit) -> None:
        if self.refuse:
            raise Overloaded("full", retryable=True)
        self.live.add(key)

    def abort(self, key: AttemptKey) -> None:
        self.live.discard(key)

    def abort_choice(self, key: AttemptKey, choice: int) -> None:
        self.ended_choices.append((key, choice))


class Gateway:
    """The other end of one attach stream."""

    def __init__(self, hub: AttachHub) -> None:
        self.commands: asyncio.Queue[pb.AttachCommand | None] = asyncio.Queue()
        self.events = hub.serve(self._iterate())

    async def _iterate(self) -> AsyncIterator[pb.AttachCommand]:
        while (command := await self.commands.get()) is not None:
            yield command

    def send(self, **command: object) -> None:
        self.commands.put_nowait(pb.AttachCommand(**command))

    def hello(self) -> None:
        self.send(hello=pb.AttachHello(gateway_id="g", protocol_major=1))

    def submit(self, request: int) -> None:
        self.send(submit=pb.Submit(request=request, attempt=1, transfer_id=bytes(16)))


def hub_and_handler() -> tuple[AttachHub, FakeHandler]:
    handler = FakeHandler()
    timelines = Timelines(Tracer(), "decode", lambda stage, seconds: None)
    return AttachHub(handler, lambda: pb.WorkerLoad(blocks_total=7), timelines, heartbeat_s=0.01), handler


def update(request: int, start: int, tokens: list[int], end: bool = False) -> TokenUpdate:
    frame = pb.TokenFrame(request=request, attempt=1, start_index=start, token_ids=tokens)
    finished = pb.AttemptEnd(request=request, attempt=1, finished=pb.ChoiceFinished()) if end else None
    return TokenUpdate(AttemptKey(0, request, 1), frame, finished)


async def started(hub: AttachHub, *requests: int) -> Gateway:
    gateway = Gateway(hub)
    gateway.hello()
    for request in requests:
        gateway.submit(request)
    await anext(gateway.events)
    event = await anext(gateway.events)
    assert event.load.blocks_total == 7
    return gateway


async def test_steps_that_were_not_yet_sent_become_one_frame() -> None:
    hub, handler = hub_and_handler()
    gateway = await started(hub, 5, 6)
    assert handler.live == {AttemptKey(0, 5, 1), AttemptKey(0, 6, 1)}
    hub.publish([update(5, 0, [10]), update(6, 0, [20])])
    hub.publish([update(5, 1, [11, 12]), update(6, 1, [21], end=True)])
    event = await anext(gateway.events)
    assert [(f.request, f.start_index, list(f.token_ids)) for f in event.tokens] == [
        (5, 0, [10, 11, 12]),
        (6, 0, [20, 21]),
    ]
    assert [end.request for end in event.ends] == [6]
    assert hub.num_live == 1
    await gateway.events.aclose()


async def test_an_attempt_ends_with_its_last_choice() -> None:
    hub, _ = hub_and_handler()
    gateway = await started(hub)
    emitted = [pb.ChoiceTokens(choice=2), pb.ChoiceTokens(choice=3)]
    for request, choices in ((5, []), (6, emitted), (7, [])):
        sampling = pb.SamplingParams(n=2, use_beam_search=request == 7, best_of=4 if request == 7 else 2)
        gateway.send(
            submit=pb.Submit(
                request=request, attempt=1, transfer_id=bytes(16), sampling=sampling, emitted=choices
            )
        )
    await anext(gateway.events)

    def end(request: int, choice: int) -> TokenUpdate:
        finished = pb.ChoiceFinished(choice=choice)
        end = pb.AttemptEnd(request=request, attempt=1, finished=finished)
        return TokenUpdate(AttemptKey(0, request, 1), None, end)

    hub.publish([end(5, 0), end(6, 3), end(7, 0)])
    assert hub.num_live == 3
    hub.publish([end(5, 1), end(6, 2), end(7, 1), end(5, 0)])
    assert hub.num_live == 0
    event = await anext(gateway.events)
    assert [(each.request, each.finished.choice) for each in event.ends] == [
        (5, 0), (6, 3), (7, 0), (5, 1), (6, 2), (7, 1),
    ]  # fmt: skip
    await gateway.events.aclose()


async def test_one_choice_is_aborted_as_long_as_others_go_on() -> None:
    hub, handler = hub_and_handler()
    gateway = await started(hub)
    sampling = pb.SamplingParams(n=2, best_of=2)
    gateway.send(submit=pb.Submit(request=5, attempt=1, transfer_id=bytes(16), sampling=sampling))
    for choice in (1, 1, 0):
        gateway.send(abort=pb.AbortAttempt(request=5, attempt=1, choice=choice))
    await anext(gateway.events)
    assert handler.ended_choices == [(AttemptKey(0, 5, 1), 1)]
    assert hub.num_live == 1
    finished = pb.AttemptEnd(request=5, attempt=1, finished=pb.ChoiceFinished(choice=0))
    hub.publish([TokenUpdate(AttemptKey(0, 5, 1), None, finished)])
    assert hub.num_live == 0
    await gateway.events.aclose()


async def test_updates_of_ended_and_unknown_attempts_are_dropped() -> None:
    hub, _ = hub_and_handler()
    gateway = await started(hub, 5)
    hub.publish([update(5, 0, [1], end=True), update(5, 1, [2]), update(99, 0, [3])])
    event = await anext(gateway.events)
    assert [list(f.token_ids) for f in event.tokens] == [[1]]
    await gateway.events.aclose()


async def test_the_end_of_the_stream_aborts_its_attempts_alone() -> None:
    hub, handler = hub_and_handler()
    first, second = await started(hub, 1, 2), await started(hub, 1)
    assert hub.num_live == 3
    first.commands.put_nowait(None)
    async for _ in first.events:
        pass
    assert handler.live == {AttemptKey(1, 1, 1)}
    assert hub.num_live == 1
    await second.events.aclose()
    assert not handler.live


async def test_abort_ends_one_attempt_and_is_idempotent() -> None:
    hub, handler = hub_and_handler()
    gateway = await started(hub, 1, 2)
    for _ in range(2):
        gateway.send(abort=pb.AbortAttempt(request=1, attempt=1))
    gateway.send(abort=pb.AbortAttempt(request=2, attempt=9))
    await anext(gateway.events)
    assert handler.live == {AttemptKey(0, 2, 1)}
    await gateway.events.aclose()


async def test_a_refused_submit_is_one_failed_end() -> None:
    hub, handler = hub_and_handler()
    handler.refuse = True
    gateway = Gateway(hub)
    await anext(gateway.events)
    gateway.hello()
    gateway.submit(3)
    gateway.send(submit=pb.Submit(request=4, attempt=1, transfer_id=b"short"))
    ends = [end for _ in range(1) for end in (await anext(gateway.events)).ends]
    assert [(end.request, end.failed.code, end.failed.retryable) for end in ends] == [
        (3, 8, True),
        (4, 3, False),
    ]
    assert hub.num_live == 0
    await gateway.events.aclose()


async def test_a_worker_without_memory_refuses_as_retryable() -> None:
    handler = FakeHandler()
    timelines = Timelines(Tracer(), "decode", lambda stage, seconds: None)
    guard = MemoryGuard(0.5, lambda: 0.6)
    hub = AttachHub(handler, pb.WorkerLoad, timelines, heartbeat_s=0.01, check_memory=guard.check)
    gateway = Gateway(hub)
    await anext(gateway.events)
    gateway.hello()
    gateway.submit(3)
    (end,) = (await anext(gateway.events)).ends
    assert (end.failed.code, end.failed.retryable) == (8, True)
    assert (hub.num_live, handler.live) == (0, set())
    await gateway.events.aclose()


async def test_another_protocol_is_refused() -> None:
    hub, _ = hub_and_handler()
    gateway = Gateway(hub)
    gateway.send(hello=pb.AttachHello(gateway_id="g", protocol_major=99))
    with pytest.raises(Mismatch, match="protocol_major"):
        async for _ in gateway.events:
            pass


async def test_a_draining_worker_refuses_as_retryable() -> None:
    hub, _ = hub_and_handler()
    hub.draining = True
    gateway = Gateway(hub)
    await anext(gateway.events)
    gateway.hello()
    gateway.submit(3)
    event = await anext(gateway.events)
    assert event.ends[0].failed.retryable
    await gateway.events.aclose()


async def test_an_attempt_ends_with_its_remaining_time_and_one_that_ended_does_not() -> None:
    hub, handler = hub_and_handler()
    gateway = await started(hub)
    for request, timeout_ms in ((5, 20), (6, 60_000), (7, 30)):
        submit = pb.Submit(request=request, attempt=1, transfer_id=bytes(16), timeout_ms=timeout_ms)
        gateway.send(submit=submit)
    gateway.send(abort=pb.AbortAttempt(request=7, attempt=1))
    ends: list[pb.AttemptEnd] = []
    async with asyncio.timeout(5):
        while not ends:
            ends += (await anext(gateway.events)).ends
    assert [(end.request, end.failed.code, end.failed.retryable) for end in ends] == [(5, 4, False)]
    assert handler.live == {AttemptKey(0, 6, 1)}
    assert (hub.attempts.taken, hub.attempts.returned) == (3, 2)
    await gateway.events.aclose()
    assert hub.attempts.held == 0
