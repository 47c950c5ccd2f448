"""A worker without an engine: real sockets, tokens that can be computed by hand, faults on demand.

Token `i` of a request is `token_at(prompt, i)` on every worker, as a real model gives the same tokens after
a migration. A decode worker of a split attempt waits for the prefill worker's commit, through `Links`.
"""

import asyncio
import contextlib
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from protos.tandem.v1 import (
    common_pb2 as pb,
)
from protos.tandem.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)
from runtime import rpc
from runtime.access import Keys, call_metadata
from runtime.limits import HEARTBEAT_INTERVAL_S
from runtime.rpc_access import INTERNAL_REFUSAL, KeyGuard
from runtime.version import PROTOCOL_MAJOR

EOS = 1
FIRST_TOKEN = 260


def token_at(prompt: Sequence[int], index: int, choice: int = 0) -> int:
    """The token of a choice at an output index."""
    return FIRST_TOKEN + (sum(prompt) + 7 * index + 13 * choice) % 500


def tokens_of(prompt: Sequence[int], num_tokens: int, choice: int = 0) -> list[int]:
    """The first tokens of a choice."""
    return [token_at(prompt, index, choice) for index in range(num_tokens)]


@dataclass
class Faults:
    """What this worker does wrong, or on request."""

    token_delay_s: float = 0.0
    die_at: int | None = None
    """The process is gone when this output index is due."""
    poison: int | None = None
    """The process is gone as soon as it computes a request with this token in its prompt or output."""
    fail_next: list[pb.AttemptFailed] = field(default_factory=list)
    """Each new attempt takes one and fails with it."""
    ignore_next: int = 0
    """This many new attempts get no answer at all."""
    break_stream_at: int | None = None
    """The attach stream breaks when this output index is due, once."""
    eos_at: int | None = None
    """This output index is an EOS."""
    duplicate: bool = False
    """Every frame is sent twice, and whole from index 0."""
    gap_at: int | None = None
    """This output index is left out, once."""
    frame_tokens: int = 1
    stop_heartbeats: bool = False


class Links:
    """Commits of prefill workers that decode workers wait for."""

    def __init__(self) -> None:
        self.committed: dict[bytes, asyncio.Event] = defaultdict(asyncio.Event)


class FakeWorker:
    """One worker process in miniature."""

    def __init__(
        self,
        role: str,
        worker_id: str,
        gateway: str,
        links: Links,
        facts: registry_pb2.ModelFacts,
        faults: Faults | None = None,
        secret: str | None = None,
    ) -> None:
        self._secret = secret
        self.role = role
        self.worker_id = worker_id
        self.faults = faults or Faults()
        self.submits: list[pb.Submit] = []
        self.aborts: list[tuple[int, int]] = []
        self.live: dict[tuple[int, int], asyncio.Task[None]] = {}
        self.num_attaches = 0
        self.state = pb.WORKER_STATE_READY
        self._gateway = gateway
        self._links = links
        self._facts = facts
        self._boots = itertools.count()
        self._streams: list[asyncio.Queue[pb.AttachEvent | None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._server: grpc.aio.Server | None = None
        self._dying: asyncio.Future[None] | None = None

    async def start(self, behind: Callable[[tuple[str, int]], Any] | None = None) -> "FakeWorker":
        """`behind` makes a proxy of an address, under whose own address the worker is then known."""
        guard = KeyGuard(Keys.parse(self._secret), INTERNAL_REFUSAL)
        self._server = rpc.server([guard], max_message_bytes=1 << 20)
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_Prefill(self), self._server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(_Decode(self), self._server)
        port = rpc.listen(self._server, "127.0.0.1", 0, "--port")
        self.proxy = behind(("127.0.0.1", port)) if behind else None
        port = self.proxy.port if self.proxy else port
        self.identity = pb.WorkerIdentity(
            worker_id=self.worker_id,
            boot_id=f"{self.worker_id}-boot-{next(self._boots)}",
            address=f"127.0.0.1:{port}",
        )
        await self._server.start()
        self._registration = self._spawn(self._register())
        return self

    async def die(self) -> None:
        """As kill -9 does: every stream is cut, nothing is said."""
        self._registration.cancel()
        for task in list(self.live.values()):
            task.cancel()
        if self._server is not None:
            # A task of its own: whoever called may be cancelled, and a server is stopped once.
            self._dying, self._server = asyncio.ensure_future(self._server.stop(0)), None
        if self._dying is not None:
            await asyncio.shield(self._dying)

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self.die()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Membership

    async def _register(self) -> None:
        async with rpc.channel(self._gateway) as channel:
            while True:
                stub = registry_pb2_grpc.RegistryServiceStub(channel)
                call = stub.Register(self._heartbeats(), metadata=call_metadata(self._secret))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        pass
                call.cancel()
                await asyncio.sleep(0.05)

    async def _heartbeats(self) -> AsyncIterator[registry_pb2.RegisterRequest]:
        role = pb.WORKER_ROLE_PREFILL if self.role == "prefill" else pb.WORKER_ROLE_DECODE
        info = registry_pb2.WorkerInfo(
            identity=self.identity,
            role=role,
            http="http://127.0.0.1:1",
            pid=4711,
            model=self._facts,
            protocol_major=PROTOCOL_MAJOR,
        )
        yield registry_pb2.RegisterRequest(info=info)
        for sequence in itertools.count():
            if not self.faults.stop_heartbeats:
                heartbeat = registry_pb2.Heartbeat(sequence=sequence, state=self.state)
                yield registry_pb2.RegisterRequest(heartbeat=heartbeat)
            await asyncio.sleep(0.1)

    # Attach

    async def attach(self, commands: AsyncIterator[pb.AttachCommand]) -> AsyncIterator[pb.AttachEvent]:
        events: asyncio.Queue[pb.AttachEvent | None] = asyncio.Queue()
        events.put_nowait(pb.AttachEvent(load=self._load()))
        self._streams.append(events)
        self.num_attaches += 1
        reader = self._spawn(self._read(commands, events))
        try:
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                        event = await events.get()
                except TimeoutError:
                    event = pb.AttachEvent(load=self._load())
                if event is None:
                    return
                yield event
        finally:
            reader.cancel()
            self._streams.remove(events)
            for task in self.live.values():
                task.cancel()

    def _load(self) -> pb.WorkerLoad:
        return pb.WorkerLoad(requests_running=len(self.live), blocks_total=100, blocks_used=len(self.live))

    async def _read(
        self, commands: AsyncIterator[pb.AttachCommand], events: asyncio.Queue[pb.AttachEvent | None]
    ) -> None:
        async for command in commands:
            match command.WhichOneof("command"):
                case "submit":
                    self.submits.append(command.submit)
                    key = (command.submit.request, command.submit.attempt)
                    self.live[key] = self._spawn(self._attempt(command.submit, events))
                    self.live[key].add_done_callback(lambda _, key=key: self.live.pop(key, None))
                case "abort":
                    key = (command.abort.request, command.abort.attempt)
                    self.aborts.append(key)
                    if key in self.live:
                        self.live[key].cancel()

    async def _attempt(self, submit: pb.Submit, events: asyncio.Queue[pb.AttachEvent | None]) -> None:
        if self.faults.ignore_next:
            self.faults.ignore_next -= 1
            await asyncio.sleep(3600)
        if self.faults.fail_next:
            events.put_nowait(_end(submit, failed=self.faults.fail_next.pop(0)))
            return
        starts = {each.choice: len(each.token_ids) for each in submit.emitted}
        starts = starts or dict.fromkeys(range(max(submit.sampling.best_of, 1)), 0)
        if self.role == "prefill":
            await self._prefill(submit, starts, events)
            return
        if submit.HasField("peer"):
            await self._links.committed[submit.transfer_id].wait()
        await self._decode(submit, starts, events)

    async def _prefill(
        self, submit: pb.Submit, starts: dict[int, int], events: asyncio.Queue[pb.AttachEvent | None]
    ) -> None:
        if await self._fault_at(min(starts.values()), events) or self._poisoned(submit.prompt_token_ids):
            return
        await asyncio.sleep(self.faults.token_delay_s)
        goes_on = False
        for choice, start in starts.items():
            if start and len(starts) > 1:
                goes_on = True
                continue
            token, reason = self._token(submit, start, choice)
            events.put_nowait(_frame(submit, start, [token], choice))
            goes_on |= reason is None
            if reason is not None:
                events.put_nowait(_end(submit, finished=_finished(submit, token, reason, choice)))
        if goes_on:
            events.put_nowait(_end(submit, handed_over=pb.HandedOver()))
        self._links.committed[submit.transfer_id].set()

    async def _decode(
        self, submit: pb.Submit, starts: dict[int, int], events: asyncio.Queue[pb.AttachEvent | None]
    ) -> None:
        indices = dict(starts)
        while indices:
            if await self._fault_at(min(indices.values()), events):
                return
            await asyncio.sleep(self.faults.token_delay_s)
            if self._poisoned([*submit.prompt_token_ids, *self._computed(submit, indices)]):
                return
            for choice, index in list(indices.items()):
                indices[choice], ended = self._decode_choice(submit, choice, index, events)
                if ended:
                    del indices[choice]

    def _decode_choice(
        self, submit: pb.Submit, choice: int, index: int, events: asyncio.Queue[pb.AttachEvent | None]
    ) -> tuple[int, bool]:
        """One frame; (next index, whether the choice has ended)."""
        tokens, reason, first = [], None, index
        while reason is None and len(tokens) < self.faults.frame_tokens:
            token, reason = self._token(submit, index, choice)
            tokens.append(token)
            index += 1
        if self.faults.gap_at is not None and first >= self.faults.gap_at:
            self.faults.gap_at = None
            return index, False
        events.put_nowait(_frame(submit, first, tokens, choice))
        if self.faults.duplicate:
            whole = [self._token(submit, each, choice)[0] for each in range(index)]
            events.put_nowait(_frame(submit, 0, whole, choice))
        if reason is not None:
            events.put_nowait(_end(submit, finished=_finished(submit, tokens[-1], reason, choice)))
        return index, reason is not None

    def _token(self, submit: pb.Submit, index: int, choice: int) -> tuple[int, int | None]:
        """(token, why it ends the choice)."""
        if self.faults.eos_at == index and not submit.sampling.ignore_eos:
            return EOS, pb.FINISH_REASON_STOP
        token = token_at(submit.prompt_token_ids, index, choice)
        if token in submit.sampling.stop_token_ids and index >= submit.sampling.min_tokens:
            return token, pb.FINISH_REASON_STOP
        if index + 1 >= submit.sampling.max_tokens:
            return token, pb.FINISH_REASON_LENGTH
        return token, None

    @staticmethod
    def _computed(submit: pb.Submit, indices: dict[int, int]) -> list[int]:
        return [token_at(submit.prompt_token_ids, index, choice) for choice, index in indices.items()]

    def _poisoned(self, token_ids: Sequence[int]) -> bool:
        if self.faults.poison is None or self.faults.poison not in token_ids:
            return False
        self._spawn(self.die())
        return True

    async def _fault_at(self, index: int, events: asyncio.Queue[pb.AttachEvent | None]) -> bool:
        if self.faults.die_at is not None and index >= self.faults.die_at:
            self.faults.die_at = None
            self._spawn(self.die())
            return True
        if self.faults.break_stream_at is not None and index >= self.faults.break_stream_at:
            self.faults.break_stream_at = None
            events.put_nowait(None)
            return True
        return False


def _logprobs(submit: pb.Submit, tokens: list[int]) -> list[pb.TokenLogprob]:
    if not submit.sampling.HasField("logprobs"):
        return []
    top = [
        pb.TopLogprob(token_id=FIRST_TOKEN + rank, logprob=-1.0 - rank)
        for rank in range(submit.sampling.logprobs)
    ]
    return [pb.TokenLogprob(logprob=-0.5, top=top) for _ in tokens]


def _frame(submit: pb.Submit, start: int, tokens: list[int], choice: int) -> pb.AttachEvent:
    frame = pb.TokenFrame(
        request=submit.request,
        attempt=submit.attempt,
        choice=choice,
        start_index=start,
        token_ids=tokens,
        logprobs=_logprobs(submit, tokens),
    )
    if start == 0:
        frame.cached_tokens = 2
    return pb.AttachEvent(tokens=[frame])


def _finished(submit: pb.Submit, token: int, reason: int, choice: int) -> pb.ChoiceFinished:
    finished = pb.ChoiceFinished(choice=choice, reason=reason)
    if token in submit.sampling.stop_token_ids:
        finished.stop_token_id = token
    return finished


def _end(submit: pb.Submit, **outcome: Any) -> pb.AttachEvent:
    return pb.AttachEvent(ends=[pb.AttemptEnd(request=submit.request, attempt=submit.attempt, **outcome)])


class _Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._worker.attach(_commands(requests)):
            yield prefill_pb2.PrefillServiceAttachResponse(event=event)


class _Decode(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self._worker.attach(_commands(requests)):
            yield decode_pb2.DecodeServiceAttachResponse(event=event)


async def _commands(requests: Any) -> AsyncIterator[pb.AttachCommand]:
    async for request in requests:
        yield request.command
