"""The life of one request, once, under both the gRPC and the HTTP skin.

1. `stream` enters the request under its id, tokenises and validates it.
2. It waits for a slot (`admission`), bounded by queue length and deadline.
3. `run.RequestRun` has it computed, with retries, and yields deltas.
4. However it ends, the slot is free, the id is free and one outcome is counted.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

from gateway.admission import Admission
from gateway.choices import ChoiceOutputs, best, is_ranked, is_streamable, num_generated
from gateway.delivery import Delivery
from gateway.fleet import Fleet
from gateway.grammar_check import GrammarCheck
from gateway.metrics import GatewayMetrics
from gateway.model import ServedModel
from gateway.output import Delta, TextOutput
from gateway.prompts import Messages, bad_word_token_ids, tokenize
from gateway.quarantine import Quarantine
from gateway.run import Prepared, RequestRun
from gateway.telemetry import Telemetry
from gateway.tracing import Origin, RequestTrace
from gateway.trials import Trials, Watch
from gateway.validation import (
    ModelLimits,
    check_cache_salt,
    check_prompt,
    client_names,
    complete_sampling,
)
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import SystemClock
from runtime.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    TandemError,
    Unavailable,
)
from runtime.grammars import Grammar
from runtime.ledger import Account

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a client asks for, whichever way it came."""

    request_id: str
    """Unique among live requests; empty: one is drawn."""
    prompt: str | list[int] | Messages
    """Text, token ids, or chat messages of `role` and `content`."""
    sampling: pb.SamplingParams
    """As asked; unset fields take defaults."""
    timeout_s: float
    """Until the client's deadline."""
    model: str | None = None
    """Name of the model; None or empty: the served one."""
    priority: int = 0
    """The larger goes first, where the workers schedule by priority."""
    default_max_tokens: int | None = None
    """For an unset max_tokens; None: what the context leaves."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the client calls fields of SamplingParams, where it differs."""
    cache_salt: str = ""
    """Requests share cached KV only with requests of the same salt."""
    tenant: str = ""
    """Tells clients apart: request ids and cached KV of one are nothing to another."""
    origin: Origin = field(default_factory=Origin)
    """How it came in, for its trace."""


@dataclass(eq=False)
class Live:
    """A request between its first and its last moment here."""

    number: int
    """Names it on the attach streams."""
    tenant: str
    request_id: str
    """Names it to the client, together with the tenant."""
    arrived_s: float
    """On the flow's clock."""
    trace: RequestTrace
    stopped: TandemError | None = None
    """Set when it was aborted or the drain gave it up."""
    run: RequestRun | None = None
    """Set once it is admitted."""


class Flow:
    """All live requests of this gateway."""

    def __init__(
        self,
        model: ServedModel,
        fleet: Fleet,
        metrics: GatewayMetrics,
        grammars: GrammarCheck,
        telemetry: Telemetry,
        *,
        max_concurrent_requests: int,
        max_waiting_requests: int,
        request_timeout_s: float,
        local_prefill_threshold: int,
        migration_timeout_s: float,
        share_prefix_cache: bool,
        check_memory: Callable[[], None],
    ) -> None:
        """`check_memory` raises Overloaded when nothing new should begin."""
        self._check_memory = check_memory
        self.model = model
        self.fleet = fleet
        self.draining = False
        self._metrics = metrics
        self._grammars = grammars
        self._telemetry = telemetry
        # For measuring: uvloop's own time has a resolution of 1 ms.
        self._clock = SystemClock()
        self._admission = Admission(max_concurrent_requests, max_waiting_requests)
        self._quarantine = Quarantine(self._clock)
        self._trials = Trials()
        self._request_timeout_s = request_timeout_s
        self._local_prefill_threshold = local_prefill_threshold
        self._migration_timeout_s = migration_timeout_s
        self._share_prefix_cache = share_prefix_cache
        self._live: dict[tuple[str, str], Live] = {}
        self.ledger = Account()
        self._numbers = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.running.set_function(lambda: self._admission.num_running)
        metrics.waiting.set_function(lambda: self._admission.num_waiting)

    @property
    def num_live(self) -> int:
        """Requests that have come and not ended."""
        return len(self._live)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return self._admission.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._admission.num_waiting

    @property
    def limits(self) -> ModelLimits:
        """The workers' limits once one is there, before that the checkpoint's."""
        facts = self.fleet.registry.facts
        if facts is None:
            return self.model.limits
        return replace(self.model.limits, max_model_len=facts.max_model_len, vocab_size=facts.vocab_size)

    async def stream(self, asked: Generation) -> AsyncGenerator[Delta, None]:
        """Deltas of one request; TandemError if it cannot be served. Close it to cancel the request."""
        with self._entered(asked) as live:
            request = await self._prepare_in_time(asked, live)
            queued_s = self._clock.now()
            left_s = request.deadline - asyncio.get_running_loop().time()
            async with self._admission.slot(live.number, left_s, asked.tenant):
                admitted_s = self._clock.now()
                self._metrics.queue_time.observe(admitted_s - queued_s)
                live.trace.admitted(queued_s, admitted_s)
                run = self._admit(request, live)
                delivery = Delivery(request, run, live.trace, self._metrics, live.arrived_s)
                async with aclosing(_deltas(request, run)) as deltas:
                    async for delta in deltas:
                        yield delivery.take(delta)
                delivery.end()

    @contextmanager
    def reading(self, origin: Origin) -> Iterator[None]:
        """Around reading what a client sent: a refusal is counted and traced like any other."""
        try:
            yield
        except TandemError as error:
            self._refused(origin, error)
            raise

    def _refused(self, origin: Origin, error: BaseException | None) -> None:
        now_s = self._clock.now()
        trace = self._telemetry.start(origin, arrived_s=now_s, request_id="", model=self.model.name)
        self._telemetry.end(trace, now_s, error)
        self._metrics.ended(error)

    def abort(self, request_ids: Iterable[str], tenant: str = "") -> list[str]:
        """End live requests of this tenant; returns those of the ids that were live."""
        names = [(tenant, request_id) for request_id in dict.fromkeys(request_ids)]
        found = [self._live[name] for name in names if name in self._live]
        for live in found:
            self._stop(live, Cancelled("the request was aborted"))
        return [live.request_id for live in found]

    async def drain(self, timeout: float) -> None:
        """Take nothing new, let live requests finish for `timeout` seconds, then fail them."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("drain: %d requests did not finish in time", len(self._live))
            for live in list(self._live.values()):
                self._stop(live, _shutting_down())

    def _stop(self, live: Live, error: TandemError) -> None:
        live.stopped = error
        self._admission.interrupt(live.number, error)
        if live.run is not None:
            live.run.interrupt(error)

    @contextmanager
    def _entered(self, asked: Generation) -> Iterator[Live]:
        """The request under its id; its outcome is counted at the end."""
        error: BaseException | None = None
        live: Live | None = None
        try:
            live = self._enter(asked.tenant, asked.request_id or secrets.token_hex(16), asked.origin)
            yield live
        except BaseException as raised:
            error = raised
            raise
        finally:
            if live is None:
                self._refused(asked.origin, error)
            else:
                error = error or live.stopped
                self._leave(live, error)
                self._metrics.ended(error)

    def _enter(self, tenant: str, request_id: str, origin: Origin) -> Live:
        if self.draining:
            raise _shutting_down()
        if (tenant, request_id) in self._live:
            raise AlreadyExists(f"a live request has the id {request_id!r}", field="request_id")
        self._check_memory()
        now_s = self._clock.now()
        trace = self._telemetry.start(origin, arrived_s=now_s, request_id=request_id, model=self.model.name)
        live = Live(next(self._numbers), tenant, request_id, now_s, trace)
        self._live[tenant, request_id] = live
        self.ledger.taken += 1
        self._idle.clear()
        return live

    def _leave(self, live: Live, error: BaseException | None) -> None:
        self._telemetry.end(live.trace, self._clock.now(), error)
        del self._live[live.tenant, live.request_id]
        self.ledger.returned += 1
        if not self._live:
            self._idle.set()

    async def _prepare_in_time(self, asked: Generation, live: Live) -> Prepared:
        limit = asyncio.timeout(min(asked.timeout_s, self._request_timeout_s))
        try:
            async with limit:
                return await self._prepare(asked, live)
        except TimeoutError:
            if not limit.expired():
                raise
        raise DeadlineExceeded("the request's deadline passed")

    async def _prepare(self, asked: Generation, live: Live) -> Prepared:
        self.model.check_name(asked.model)
        limits = self.limits
        prompt = asked.prompt
        if isinstance(prompt, list):
            token_ids = prompt
        else:
            start_s = self._clock.now()
            token_ids = await tokenize(self.model, prompt, max_tokens=limits.max_model_len)
            live.trace.tokenized(start_s, prompt, len(token_ids))
        check_prompt(token_ids, limits)
        check_cache_salt(asked.cache_salt)
        sampling = complete_sampling(
            asked.sampling,
            limits,
            len(token_ids),
            lambda: secrets.randbits(63),
            default_max_tokens=asked.default_max_tokens,
            names=asked.names,
        )
        if asked.origin.stream and not is_streamable(sampling):
            raise InvalidRequest(
                "best_of above n and beam search cannot be streamed: their choices are known at the end",
                field="stream",
            )
        self._quarantine.admit(token_ids, sampling)
        await self._check_grammar(sampling.structured_output, asked.names)
        live.trace.asked(asked.sampling)
        left_s = live.arrived_s + min(asked.timeout_s, self._request_timeout_s) - self._clock.now()
        return Prepared(
            number=live.number,
            request_id=live.request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            bad_words=bad_word_token_ids(self.model.tokenizer, sampling.bad_words),
            deadline=asyncio.get_running_loop().time() + left_s,
            priority=asked.priority,
            cache_salt=asked.cache_salt if self._share_prefix_cache else asked.tenant + asked.cache_salt,
            traceparent=live.trace.traceparent,
            with_logprobs=asked.sampling.HasField("logprobs"),
        )

    async def _check_grammar(self, output: pb.StructuredOutput, names: Mapping[str, str]) -> None:
        kind = output.WhichOneof("constraint")
        if kind is not None:
            value = output.choice.texts if kind == "choice" else getattr(output, kind)
            with client_names(names):
                await self._grammars.check(Grammar.of(kind, value))

    def _admit(self, request: Prepared, live: Live) -> RequestRun:
        facts = self.fleet.registry.facts
        eos_ids = facts.eos_token_ids if facts else ()
        sampling, vocabulary = request.sampling, self.model.tokenizer.vocabulary
        outputs = [TextOutput(vocabulary, sampling, eos_ids) for _ in range(num_generated(sampling))]
        live.run = RequestRun(
            request,
            ChoiceOutputs(outputs, len(request.prompt_token_ids)),
            self.fleet,
            self._metrics,
            live.trace,
            self._quarantine,
            Watch(self._trials),
            local_prefill_threshold=self._local_prefill_threshold,
            migration_timeout_s=self._migration_timeout_s,
        )
        if live.stopped is not None:
            live.run.interrupt(live.stopped)
        return live.run


def _deltas(request: Prepared, run: RequestRun) -> AsyncGenerator[Delta, None]:
    """Of the choices that are returned."""
    if is_ranked(request.sampling):
        return best(run.deltas(), request.sampling.n, with_logprobs=request.with_logprobs)
    return run.deltas()


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down", retry_after_s=1.0, retryable=True)
