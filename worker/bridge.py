"""Between the event loop and the engine thread: commands one way, token updates the other."""

import asyncio
from collections.abc import Callable, Iterable

from engine.engine import Engine, EngineLoad, StepOutput, StepResult
from engine.request import Request
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import SystemClock
from runtime.errors import Internal, TandemError
from runtime.ledger import Account
from worker.attach import AttachHub, AttemptKey, TokenUpdate
from worker.convert import attempt_end, token_frame
from worker.engine_thread import Command, EngineThread
from worker.prefill_watch import PrefillWatch, enter
from worker.timeline import QUEUE, Timelines


class EngineBridge:
    """What a role uses to reach the engine and the gateways; thread, hub and timelines join it at start."""

    thread: EngineThread
    hub: AttachHub
    timelines: Timelines

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._load = pb.WorkerLoad()
        self.num_tokens_due = 0
        """Of the next step, about, as of the last snapshot."""
        self.blocks = Account()
        """Users of blocks, as of the last snapshot."""
        self._watch = PrefillWatch()
        self._clock = SystemClock()

    def on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function on the event loop; from any thread. After the loop's end it is a no-op."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            assert self._loop.is_closed()

    def post(self, key: AttemptKey, command: Command) -> None:
        """Run a command on the engine thread; its error ends the attempt."""

        def guarded(engine: Engine) -> None:
            try:
                command(engine)
            except TandemError as error:
                self.fail(key, error)

        self.thread.post(guarded)

    def call_roll(self) -> None:
        """A link's epoch has ended: so does the worker if that is because another of its ranks hangs."""
        self.thread.post(lambda engine: engine.model.ranks.call_roll())

    def submit(self, key: AttemptKey, request: Request) -> None:
        """Queue a prompt on the engine; its stages go into the attempt's timeline."""
        self.timelines.begin(key, QUEUE)

        def submit(engine: Engine) -> None:
            engine.submit(request)
            self._watch.add(key)

        self.post(key, submit)

    def grant(self, key: AttemptKey) -> None:
        """The decode worker has room for what this attempt computes."""
        self.thread.post(lambda engine: engine.grant(key))

    def abort(self, key: AttemptKey) -> None:
        """Free what the engine holds for an attempt."""

        def abort(engine: Engine) -> None:
            self._watch.drop(key)
            engine.abort(key)

        self.thread.post(abort)

    def abort_choice(self, key: AttemptKey, choice: int) -> None:
        """Free what the engine holds for one of several choices."""
        self.thread.post(lambda engine: engine.abort_choice(key, choice))

    def mark_prefills(self, result: StepResult, then: str | None = None) -> None:
        """Note which prompts a step has begun and finished, and what follows here; on the engine thread."""
        marks = self._watch.on_step(result, self.thread.step_started_s, self._clock.now())
        if marks:
            self.on_loop(enter, self.timelines, marks, then)

    def fail(self, key: AttemptKey, error: TandemError) -> None:
        """End an attempt with an error; from any thread."""
        self.on_loop(self.hub.fail, key, error)

    def publish(self, outputs: Iterable[StepOutput]) -> None:
        """Send what a step produced, all in one call to the loop; on the engine thread."""
        updates = [self._update(output) for output in outputs]
        if updates:
            self.on_loop(self.hub.publish, updates)

    def _update(self, output: StepOutput) -> TokenUpdate:
        key = output.request.key
        if not isinstance(key, AttemptKey):
            raise Internal(f"request key {key!r}")
        return TokenUpdate(
            key,
            token_frame(key.request, key.attempt, output),
            attempt_end(key.request, key.attempt, output),
        )

    def end(self, key: AttemptKey, end: pb.AttemptEnd) -> None:
        """End an attempt without new tokens; on the event loop."""
        self.hub.publish([TokenUpdate(key, None, end)])

    def snapshot(self, engine: Engine, *, waiting: int = 0) -> EngineLoad:
        """Keep the engine's load for readers on other threads, and return it; on the engine thread.

        `waiting` requests are counted beside the engine's own.
        """
        load = engine.load()
        self._load = pb.WorkerLoad(
            requests_running=load.requests_running,
            requests_waiting=load.requests_waiting + waiting,
            queued_prefill_tokens=load.queued_prefill_tokens,
            blocks_total=load.blocks_total,
            blocks_used=load.blocks_used,
            blocks_cached=load.blocks_cached,
        )
        num_tokens = load.queued_prefill_tokens + load.requests_running
        self.num_tokens_due = min(num_tokens, engine.config.max_num_batched_tokens)
        self.blocks = Account(load.blocks_taken, load.blocks_returned)
        return load

    def load(self) -> pb.WorkerLoad:
        """The last snapshot; a message that nobody changes."""
        return self._load
