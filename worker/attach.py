"""The worker's end of the attach streams: one per gateway process, all requests of it inside.

1. A gateway opens Attach and says hello; it gets an Attachment.
2. Its Submit and Abort commands go to the role's AttemptHandler under an AttemptKey.
   An attempt's time, which travels as what is left of it, ends it here even if the gateway hangs.
3. What the engine thread produces comes back through `publish` and leaves as one AttachEvent per
   engine step; a gateway that reads slowly gets fewer, larger events, never a growing queue.
4. The end of the stream, or ATTACH_SILENCE_S without a command, aborts all of its attempts.

Everything here belongs to the event loop's thread.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple, Protocol

from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import DeadlineExceeded, InvalidRequest, Mismatch, TandemError, Unavailable
from runtime.ledger import Account
from runtime.limits import ATTACH_SILENCE_S, HEARTBEAT_INTERVAL_S
from runtime.tracing import AttributeValue
from runtime.version import PROTOCOL_MAJOR
from worker.choices import choices_to_end
from worker.convert import attempt_failed
from worker.timeline import Timelines

logger = logging.getLogger(__name__)


class AttemptKey(NamedTuple):
    """Names one attempt on this worker; the engine's request key."""

    attachment: int
    request: int
    attempt: int


class AttemptHandler(Protocol):
    """What a role does with an attempt. All methods run on the event loop."""

    def submit(self, key: AttemptKey, submit: pb.Submit) -> None:
        """Start an attempt; TandemError refuses it."""
        ...

    def abort(self, key: AttemptKey) -> None:
        """Give an attempt up and free what it holds; unknown keys are no-ops."""
        ...

    def abort_choice(self, key: AttemptKey, choice: int) -> None:
        """End one of several choices, which decodes; it is a no-op for one that does not."""
        ...


class TokenUpdate(NamedTuple):
    """New tokens of one attempt and, maybe, its end."""

    key: AttemptKey
    frame: pb.TokenFrame | None
    end: pb.AttemptEnd | None


class Attachment:
    """One gateway's stream: what waits to be sent, and the attempts that depend on it."""

    def __init__(self, number: int, attempts: Account) -> None:
        self.number = number
        self._attempts = attempts
        self.gateway_id = ""
        self.live: dict[AttemptKey, set[int]] = {}
        """Attempts that have not ended, with the choices that have not."""
        self._deadlines: dict[AttemptKey, asyncio.TimerHandle] = {}
        self._frames: dict[tuple[int, int, int], pb.TokenFrame] = {}
        self._ends: list[pb.AttemptEnd] = []
        self._wake = asyncio.Event()
        self._wake.set()  # the first event tells the gateway at once that the stream is up

    def begin(self, key: AttemptKey, submit: pb.Submit, expire: Callable[[AttemptKey], None]) -> None:
        """Enter an attempt; `expire` is called when its time is over and it has not ended."""
        self.live[key] = choices_to_end(submit)
        self._attempts.taken += 1
        if submit.HasField("timeout_ms"):
            loop = asyncio.get_running_loop()
            self._deadlines[key] = loop.call_later(submit.timeout_ms / 1000, expire, key)

    def forget(self, key: AttemptKey) -> None:
        """An attempt has ended."""
        del self.live[key]
        self._attempts.returned += 1
        deadline = self._deadlines.pop(key, None)
        if deadline is not None:
            deadline.cancel()

    def add(self, update: TokenUpdate) -> None:
        """Queue an update; tokens of one choice that were not yet sent become one frame."""
        if update.frame is not None:
            self._merge(update.frame)
        if update.end is not None:
            self._end(update.key, update.end)
        self._wake.set()

    def _end(self, key: AttemptKey, end: pb.AttemptEnd) -> None:
        """The end of a choice is that of its attempt if it was the last; any other end is the attempt's."""
        self._ends.append(end)
        is_choice = end.WhichOneof("outcome") == "finished"
        if is_choice:
            self.live[key].discard(end.finished.choice)
        if not is_choice or not self.live[key]:
            self.forget(key)

    def _merge(self, frame: pb.TokenFrame) -> None:
        key = (frame.request, frame.attempt, frame.choice)
        waiting = self._frames.get(key)
        if waiting is None:
            self._frames[key] = frame
        else:
            waiting.token_ids.extend(frame.token_ids)
            waiting.logprobs.extend(frame.logprobs)

    async def next_event(self, load: Callable[[], pb.WorkerLoad], silence_s: float) -> pb.AttachEvent:
        """What has come since the last event; after `silence_s` an event with nothing but the load."""
        try:
            async with asyncio.timeout(silence_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        event = pb.AttachEvent(tokens=self._frames.values(), ends=self._ends, load=load())
        self._frames, self._ends = {}, []
        return event


class AttachHub:
    """All attach streams of a worker."""

    def __init__(
        self,
        handler: AttemptHandler,
        load: Callable[[], pb.WorkerLoad],
        timelines: Timelines,
        heartbeat_s: float = HEARTBEAT_INTERVAL_S,
        check_memory: Callable[[], None] = lambda: None,
    ) -> None:
        """`check_memory` raises Overloaded when nothing new should begin here."""
        self._check_memory = check_memory
        self._handler = handler
        self._load = load
        self._timelines = timelines
        self._heartbeat_s = heartbeat_s
        self._numbers = itertools.count()
        self._attachments: dict[int, Attachment] = {}
        self.attempts = Account()
        self.draining = False

    @property
    def num_live(self) -> int:
        """Attempts of all gateways."""
        return sum(len(attachment.live) for attachment in self._attachments.values())

    @property
    def gateways(self) -> dict[str, int]:
        """Attempts by gateway that is attached."""
        return {each.gateway_id: len(each.live) for each in self._attachments.values()}

    def publish(self, updates: Iterable[TokenUpdate]) -> None:
        """Send updates to the gateways that wait for them; those of ended attempts are dropped."""
        for update in updates:
            attachment = self._attachments.get(update.key.attachment)
            if attachment is None or update.key not in attachment.live:
                continue
            attachment.add(update)
            if update.key not in attachment.live:
                self._timelines.close(update.key, *_outcome(update))

    def fail(self, key: AttemptKey, error: TandemError) -> None:
        """End an attempt with an error and free what it holds."""
        self._handler.abort(key)
        self.publish([TokenUpdate(key, None, attempt_failed(key.request, key.attempt, error))])

    def _expire(self, key: AttemptKey) -> None:
        self.fail(key, DeadlineExceeded("the request's deadline passed"))

    def fail_all(self, error: TandemError) -> None:
        """End every attempt with an error."""
        for attachment in self._attachments.values():
            for key in list(attachment.live):
                self.fail(key, error)

    async def serve(self, commands: AsyncIterator[pb.AttachCommand]) -> AsyncIterator[pb.AttachEvent]:
        """One attach stream from its first command to its end."""
        attachment = Attachment(next(self._numbers), self.attempts)
        self._attachments[attachment.number] = attachment
        reader = asyncio.ensure_future(self._read(attachment, commands))
        try:
            while not reader.done():
                yield await attachment.next_event(self._load, self._heartbeat_s)
            reader.result()
        finally:
            reader.cancel()
            self._end(attachment)

    def _end(self, attachment: Attachment) -> None:
        del self._attachments[attachment.number]
        lost = list(attachment.live)
        for key in lost:
            attachment.forget(key)
            self._abort(key, "gateway_lost")
        if lost:
            logger.info("gateway %s left: %d attempts ended", attachment.gateway_id, len(lost))

    async def _read(self, attachment: Attachment, commands: AsyncIterator[pb.AttachCommand]) -> None:
        try:
            while True:
                async with asyncio.timeout(ATTACH_SILENCE_S):
                    command = await anext(commands, None)
                if command is None:
                    return
                self._apply(attachment, command)
        except TimeoutError:
            logger.warning("gateway %s is silent: its attempts end", attachment.gateway_id)

    def _apply(self, attachment: Attachment, command: pb.AttachCommand) -> None:
        match command.WhichOneof("command"):
            case "hello":
                _check_hello(command.hello)
                attachment.gateway_id = command.hello.gateway_id
            case "submit":
                self._submit(attachment, command.submit)
            case "abort":
                self._apply_abort(attachment, command.abort)

    def _apply_abort(self, attachment: Attachment, abort: pb.AbortAttempt) -> None:
        key = AttemptKey(attachment.number, abort.request, abort.attempt)
        choices = attachment.live.get(key)
        if choices is None:
            return
        if not abort.HasField("choice"):
            attachment.forget(key)
            self._abort(key, "aborted")
        elif abort.choice in choices and len(choices) > 1:
            choices.discard(abort.choice)
            self._handler.abort_choice(key, abort.choice)

    def _abort(self, key: AttemptKey, outcome: str) -> None:
        self._handler.abort(key)
        self._timelines.close(key, None, {"tandem.outcome": outcome})

    def _submit(self, attachment: Attachment, submit: pb.Submit) -> None:
        key = AttemptKey(attachment.number, submit.request, submit.attempt)
        if key in attachment.live:
            return
        attachment.begin(key, submit, self._expire)
        self._timelines.open(key, submit)
        try:
            if self.draining:
                raise Unavailable("the worker is draining", retryable=True)
            self._check_memory()
            if len(submit.transfer_id) != 16:
                raise InvalidRequest("transfer_id must have 16 bytes", field="transfer_id")
            self._handler.submit(key, submit)
        except TandemError as error:
            self.fail(key, error)


def _outcome(update: TokenUpdate) -> tuple[str | None, dict[str, AttributeValue]]:
    """An attempt's error, if it is one, and what its span says of its end."""
    assert update.end is not None
    outcome = update.end.WhichOneof("outcome") or ""
    facts: dict[str, AttributeValue] = {"tandem.outcome": outcome}
    if outcome == "failed":
        return update.end.failed.message, facts
    if update.frame is not None:
        num_tokens = update.frame.start_index + len(update.frame.token_ids)
        facts["gen_ai.usage.output_tokens"] = num_tokens
    return None, facts


def _check_hello(hello: pb.AttachHello) -> None:
    if hello.protocol_major != PROTOCOL_MAJOR:
        raise Mismatch(f"protocol_major: gateway {hello.protocol_major}, worker {PROTOCOL_MAJOR}")
