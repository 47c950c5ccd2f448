"""The gateway's end of the attach streams: one per worker, all requests of this gateway inside.

1. `run` opens Attach, says hello, and pings each heartbeat interval. The worker's first event makes the
   client `connected`.
2. `submit` queues a command and files the request's Inbox under (request, attempt); events of the worker
   go to that Inbox. `abort` takes it out again and tells the worker.
3. The end of the stream, or HANG_S without an event, is put into every Inbox as a loss; the client
   connects again until its task is cancelled.

A slow reader of an Inbox delays nobody: an Inbox takes what comes.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from gateway.attempt import Source
from gateway.choices import choices_to_end
from gateway.inbox import Arrival, Inbox
from gateway.quarantine import Suspicion, losses
from protos.tandem.v1 import common_pb2 as pb
from protos.tandem.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from runtime import rpc
from runtime.clock import SystemClock
from runtime.errors import Overloaded, Unavailable
from runtime.ledger import Account
from runtime.limits import HANG_S, HEARTBEAT_INTERVAL_S
from runtime.version import PROTOCOL_MAJOR

logger = logging.getLogger(__name__)

MAX_QUEUED_COMMANDS = 4096
"""Submits that wait to be sent to one worker; more are refused. Aborts always fit."""

RECONNECT_S = (0.05, 1.0)
"""First and longest pause before the stream is opened again."""

STUBS: dict[Source, tuple[Callable[[grpc.aio.Channel], Any], Callable[..., Any]]] = {
    Source.PREFILL: (prefill_pb2_grpc.PrefillServiceStub, prefill_pb2.PrefillServiceAttachRequest),
    Source.DECODE: (decode_pb2_grpc.DecodeServiceStub, decode_pb2.DecodeServiceAttachRequest),
}


@dataclass(slots=True, eq=False)
class Attempt:
    """One that a worker has not ended. One record, for it is looked at once per token, and cold by then."""

    inbox: Inbox
    suspicion: Suspicion
    going_on: set[int]
    """Choices."""
    step: int = 0
    """The worker's latest with tokens of it."""


class AttachClient:
    """One worker as this gateway talks to it."""

    def __init__(
        self,
        identity: pb.WorkerIdentity,
        source: Source,
        gateway_id: str,
        on_dropped: Callable[[int], None],
        credentials: tuple[tuple[str, str], ...] = (),
        attempts: Account | None = None,
    ) -> None:
        """`attempts` counts those of several workers."""
        self._attempts = attempts or Account()
        self._credentials = credentials
        self.identity = identity
        self.source = source
        self.connected = False
        self.load = pb.WorkerLoad()
        self._gateway_id = gateway_id
        self._on_dropped = on_dropped
        self._live: dict[tuple[int, int], Attempt] = {}
        self._uncomputed: dict[tuple[int, int], int] = {}
        self._step = 0
        """Number of the event whose tokens were handed out last."""
        self._outgoing: deque[pb.AttachCommand] = deque()
        self._wake = asyncio.Event()
        self._clock = SystemClock()
        self._heard_s = 0.0
        self._patience: asyncio.Timeout | None = None
        """Around the open stream."""

    @property
    def num_live(self) -> int:
        """Attempts of this gateway on the worker."""
        return len(self._live)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens submitted whose attempts have not produced anything yet: runs ahead of the reported load."""
        return sum(self._uncomputed.values())

    def submit(
        self, submit: pb.Submit, inbox: Inbox, suspicion: Suspicion, num_cached_tokens: int = 0
    ) -> None:
        """Start an attempt. Unavailable without a stream, Overloaded if the worker does not read.

        `num_cached_tokens` tokens of the prompt are probably not computed again.
        """
        if not self.connected:
            raise Unavailable(f"worker {self.identity.worker_id} is not connected", retryable=True)
        if len(self._outgoing) >= MAX_QUEUED_COMMANDS:
            raise Overloaded(
                f"worker {self.identity.worker_id} does not keep up", retryable=True, retry_after_s=1.0
            )
        key = (submit.request, submit.attempt)
        self._live[key] = Attempt(inbox, suspicion, choices_to_end(submit))
        self._attempts.taken += 1
        self._uncomputed[key] = max(len(submit.prompt_token_ids) - num_cached_tokens, 0)
        self._send(pb.AttachCommand(submit=submit))

    def abort(self, request: int, attempt: int) -> None:
        """Give an attempt up; no-op if it has ended."""
        if self._forget((request, attempt)) is not None:
            self._send(pb.AttachCommand(abort=pb.AbortAttempt(request=request, attempt=attempt)))

    def abort_choice(self, request: int, attempt: int, choice: int) -> None:
        """Give one choice of an attempt up, which others go on with; no-op if it has ended."""
        live = self._live.get((request, attempt))
        if live is not None and choice in live.going_on and len(live.going_on) > 1:
            live.going_on.discard(choice)
            abort = pb.AbortAttempt(request=request, attempt=attempt, choice=choice)
            self._send(pb.AttachCommand(abort=abort))

    async def run(self) -> None:
        """Keep the stream open until cancelled."""
        pause_s, longest_s = RECONNECT_S
        async with rpc.channel(self.identity.address) as channel:
            while True:
                if await self._stream(channel):
                    pause_s = RECONNECT_S[0]
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, longest_s)

    async def _stream(self, channel: grpc.aio.Channel) -> bool:
        """One stream to its end; True if the worker ever spoke on it."""
        stub, request_type = STUBS[self.source]
        call = stub(channel).Attach(self._requests(request_type, self._outgoing), metadata=self._credentials)
        spoke = False
        self._heard_s = self._clock.now()
        try:
            async with asyncio.timeout(None) as self._patience:
                while (event := await _next_event(call)) is not None:
                    self._heard_s = self._clock.now()
                    spoke = self.connected = True
                    self._dispatch(event)
        except TimeoutError:
            logger.info("attach stream: silent")
        finally:
            self._patience = None
            call.cancel()
            self.lose()
        return spoke

    def excuse(self, seconds: float) -> None:
        """We did not listen for so long: no silence of that time counts."""
        self._heard_s += seconds

    def expire(self) -> None:
        """Break the stream if it has been silent for too long; the owner calls it many times a second."""
        if self._patience is not None and self._clock.now() - self._heard_s > HANG_S:
            self._patience.reschedule(asyncio.get_running_loop().time())
            self._patience = None

    def lose(self) -> None:
        """Take the worker for gone: every attempt on it ends with a loss."""
        if self.connected:
            logger.warning("worker %s: attach stream lost", self.identity.worker_id)
        self.connected = False
        self._outgoing = deque()
        lost = list(self._live.items())
        errors = losses(self.identity, [live.suspicion for _, live in lost])
        for (key, live), error in zip(lost, errors, strict=True):
            self._forget(key)
            live.inbox.put(Arrival(self.source, key[1], error))

    def _dispatch(self, event: pb.AttachEvent) -> None:
        if event.HasField("load"):
            self.load = event.load
        self._dispatch_tokens(event.tokens)
        for end in event.ends:
            self._dispatch_end((end.request, end.attempt), end)

    def _dispatch_tokens(self, frames: Iterable[pb.TokenFrame]) -> None:
        source, is_decode = self.source, self.source is Source.DECODE
        self._step += 1
        for frame in frames:
            attempt = frame.attempt
            key = frame.request, attempt
            live = self._live.get(key)
            if live is None:
                self._on_dropped(1)
                continue
            if self._uncomputed:
                self._uncomputed.pop(key, None)
            if is_decode and live.step != self._step:  # once: the choices of a request are one step's
                live.step = self._step
                live.suspicion.on_step()
            live.inbox.put(Arrival(source, attempt, frame))

    def _dispatch_end(self, key: tuple[int, int], end: pb.AttemptEnd) -> None:
        """The end of an attempt's last choice, or of the whole, is the end of the attempt."""
        live = self._live.get(key)
        if live is None:
            return
        live.going_on.discard(end.finished.choice)
        if end.WhichOneof("outcome") != "finished" or not live.going_on:
            self._forget(key)
        live.inbox.put(Arrival(self.source, end.attempt, end))

    def _forget(self, key: tuple[int, int]) -> Attempt | None:
        self._uncomputed.pop(key, None)
        self._attempts.returned += key in self._live
        return self._live.pop(key, None)

    def _send(self, command: pb.AttachCommand) -> None:
        self._outgoing.append(command)
        self._wake.set()

    async def _requests(
        self, request_type: Callable[..., Any], outgoing: deque[pb.AttachCommand]
    ) -> AsyncIterator[Any]:
        hello = pb.AttachHello(gateway_id=self._gateway_id, protocol_major=PROTOCOL_MAJOR)
        yield request_type(command=pb.AttachCommand(hello=hello))
        sequence = 0
        # grpc.aio goes on asking for requests of a stream that the worker has ended: the next one has them.
        while outgoing is self._outgoing:
            while outgoing:
                yield request_type(command=outgoing.popleft())
            self._wake.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                yield request_type(command=pb.AttachCommand(ping=pb.Ping(sequence=sequence)))
                sequence += 1

    def check(self) -> None:
        """Nothing is filed without a stream, and only live attempts count as uncomputed."""
        assert self.connected or not self._live
        assert self._uncomputed.keys() <= self._live.keys()


async def _next_event(call: Any) -> pb.AttachEvent | None:
    """The worker's next event; None when the stream is over or broken."""
    try:
        response = await call.read()
    except grpc.aio.AioRpcError as error:
        logger.info("attach stream: %s", error.details())
        return None
    if response is grpc.aio.EOF:
        return None
    event: pb.AttachEvent = response.event
    return event
