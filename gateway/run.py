"""One admitted request on the workers, over at most 1 + 2 attempts, preempted ones apart.

1. Choose a route; submit to the decode worker and, unless it prefills for itself, to the prefill worker at
   once, with one fresh transfer id.
2. Merge what both say (`attempt.Progress`), turn tokens into text (`choices.ChoiceOutputs`), yield deltas.
3. An attempt that fails retryably is followed by another one that starts behind the emitted tokens,
   elsewhere if possible. What was emitted is never sent again.
4. However it ends, workers that still have the attempt are told to give it up.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.attempt import NOTHING, Finished, NewTokens, Progress, Source
from gateway.choices import ChoiceOutputs
from gateway.fleet import Fleet
from gateway.inbox import Arrival, Inbox
from gateway.metrics import GatewayMetrics
from gateway.output import Delta
from gateway.prefix_index import Chain
from gateway.prompt_logprobs import PromptLogprobs
from gateway.quarantine import MAX_STRIKES, Quarantine, WorkerLost
from gateway.router import Route, choose
from gateway.tracing import RequestTrace
from gateway.trials import Watch
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import SystemClock
from runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    LinkFailed,
    Preempted,
    TandemError,
    Unavailable,
)

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3

SETTLE_S = 0.25
"""Within this time the death of a worker's process shows at all of its streams."""

RETRY_PAUSE_S = 0.05
"""Before another attempt after a worker said no (rather than died)."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A valid request as workers understand it."""

    number: int
    """Names the request on the attach streams."""
    request_id: str
    """Names it to the client."""
    prompt_token_ids: list[int]
    """Not empty, inside the vocabulary."""
    sampling: pb.SamplingParams
    """Complete."""
    bad_words: Sequence[Sequence[int]] = ()
    """Token sequences of `sampling.bad_words`."""
    deadline: float
    """On the event loop's clock."""
    traceparent: str
    """W3C trace context; may be empty."""
    with_logprobs: bool = False
    """The client wants them, too."""
    priority: int = 0
    """The larger goes first, where the workers schedule by priority."""
    cache_salt: str = ""
    """Names who may share cached blocks; empty: everybody without a salt."""


class RequestRun:
    """The life of one request between admission and its last delta."""

    def __init__(
        self,
        request: Prepared,
        outputs: ChoiceOutputs,
        fleet: Fleet,
        metrics: GatewayMetrics,
        trace: RequestTrace,
        quarantine: Quarantine,
        watch: Watch,
        *,
        local_prefill_threshold: int,
        migration_timeout_s: float,
    ) -> None:
        self._request = request
        self._outputs = outputs
        self._fleet = fleet
        self._metrics = metrics
        self._trace = trace
        self._quarantine = quarantine
        self._watch = watch
        # As in `flow`: the loop's own time is too coarse to measure with.
        self._clock = SystemClock()
        self._local_prefill_threshold = local_prefill_threshold
        self._migration_timeout_s = migration_timeout_s
        self._progress = Progress(len(outputs.going_on))
        self._inbox = Inbox()
        self._avoid: set[str] = set()
        self.prompt_logprobs = PromptLogprobs(request.sampling)
        self._num_failures = 0

    def interrupt(self, error: TandemError) -> None:
        """End the request with an error; Cancelled ends it with finish reason ABORT."""
        self._inbox.interrupt(error)

    def _expire(self) -> None:
        self._inbox.interrupt(_deadline_passed())

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The request's output; the last delta of each choice has finish_reason, the very last one usage."""
        # One timer for the whole request: one for each wait is dear, and there is a wait for every token.
        deadline = asyncio.get_running_loop().call_at(self._request.deadline, self._expire)
        deltas: list[Delta] = []
        try:
            while self._outputs.going_on:
                for delta in deltas:
                    yield delta
                await self._watch.begin(self._request.deadline)
                start_s = self._clock.now()
                prefix = self._prefix()
                route = await self._route(prefix)
                attempt = self._begin(route)
                try:
                    self._submit(route, prefix)
                    self._trace.routed(start_s, attempt, route)
                    deltas = self._merge(self.prompt_logprobs.admit(await self._inbox.get()))
                    while not self._progress.is_over:
                        self._end_overruns(route, attempt)
                        for delta in deltas:
                            yield delta
                        deltas = self._merge(self.prompt_logprobs.admit(await self._inbox.get()))
                finally:
                    self._watch.end()
                    self._abort(route, attempt)
                if self._outputs.going_on:
                    for delta in deltas:
                        yield delta
                    deltas = await self._after_failure(route)
            self._fleet.remember(route.decode, self._prefix())
        except Cancelled:
            deltas = self._outputs.abort()
        finally:
            deadline.cancel()
            self._watch.end()
            self._metrics.dropped_frames.inc(self._progress.dropped_frames)
        *others, last = deltas
        for delta in others:
            yield delta
        yield self._with_usage(last)

    def _begin(self, route: Route) -> int:
        """Open another attempt; returns its number."""
        is_split = route.prefill is not None
        attempt = self._progress.begin(split=is_split)
        self.prompt_logprobs.begin(attempt, split=is_split)
        self._metrics.attempts.inc()
        return attempt

    def _merge(self, arrivals: list[Arrival]) -> list[Delta]:
        """What has come, as output: at most one delta for each choice."""
        new: dict[int, NewTokens] = {}
        for source, attempt, what in arrivals:
            if isinstance(what, pb.TokenFrame):
                tokens, number = self._progress.on_frame(source, what), what.choice
                new[number] = new[number].followed_by(tokens) if number in new else tokens
            elif isinstance(what, pb.AttemptEnd):
                self._progress.on_end(source, what)
            else:
                self._progress.on_lost(source, attempt, what)
        self._watch.settle()
        return self._deltas(new)

    def _deltas(self, new: Mapping[int, NewTokens]) -> list[Delta]:
        deltas = []
        choices = self._progress.choices
        for number in tuple(self._outputs.going_on):
            delta = self._outputs.push(number, new.get(number, NOTHING), choices[number].finished)
            if delta is not None:
                deltas.append(self._noted(delta))
        return deltas

    def _noted(self, delta: Delta) -> Delta:
        """A choice that has ended for the client has ended for all attempts."""
        if delta.finish_reason is not None:
            self._progress.choices[delta.choice].finished = Finished(delta.finish_reason, None)
        return delta

    def _with_usage(self, delta: Delta) -> Delta:
        usage = self._outputs.usage(self._progress.cached_tokens)
        self._progress.draft_tokens.write(usage)
        return replace(delta, usage=usage)

    @property
    def _token_ids(self) -> list[int]:
        """Of the prompt and the longest choice."""
        longest = max((choice.emitted for choice in self._progress.choices), key=len)
        return [*self._request.prompt_token_ids, *longest]

    def _prefix(self) -> Chain:
        return self._fleet.prefix(self._token_ids, self._request.cache_salt)

    async def _route(self, prefix: Chain) -> Route:
        """Workers for the next attempt. A first attempt does not wait for them, a later one does."""
        now = asyncio.get_running_loop().time
        waits_until = now() + (self._migration_timeout_s if self._progress.attempt >= 0 else 0)
        while self._left_s() > 0:
            route = choose(
                self._fleet.candidates(prefix),
                len(self._token_ids),
                local_prefill_threshold=self._local_prefill_threshold,
                avoid=self._avoid,
            )
            if route is not None:
                return route
            if now() >= waits_until:
                raise Unavailable(self._fleet.not_ready() or "no worker", retry_after_s=1.0, retryable=True)
            await asyncio.sleep(RETRY_PAUSE_S)
        raise _deadline_passed()  # expired work is not started

    def _left_s(self) -> float:
        return self._request.deadline - asyncio.get_running_loop().time()

    def _submit(self, route: Route, prefix: Chain) -> None:
        decode = self._fleet.client(route.decode)
        prefill = self._fleet.client(route.prefill) if route.prefill else None
        submit = self._submit_message()
        clients = [(Source.DECODE, decode, prefill)]
        clients += [(Source.PREFILL, prefill, decode)] if prefill else []
        for source, client, peer in clients:
            message = pb.Submit()
            message.CopyFrom(submit)
            self.prompt_logprobs.ask(source, message)
            if peer is not None:
                message.peer.CopyFrom(peer.identity)
            try:
                worker_id = client.identity.worker_id
                num_cached_tokens = self._fleet.cached_tokens(worker_id, prefix)
                client.submit(message, self._inbox, self._watch.suspicion, num_cached_tokens)
                self._fleet.remember(worker_id, prefix)
            except TandemError as error:
                self._inbox.put(Arrival(source, self._progress.attempt, error))

    def _submit_message(self) -> pb.Submit:
        submit = pb.Submit(
            request=self._request.number,
            attempt=self._progress.attempt,
            request_id=self._request.request_id,
            transfer_id=secrets.token_bytes(16),
            prompt_token_ids=self._request.prompt_token_ids,
            sampling=self._request.sampling,
            bad_words=[pb.TokenSequence(token_ids=word) for word in self._request.bad_words],
            timeout_ms=max(math.ceil(self._left_s() * 1000), 1),
            traceparent=self._request.traceparent,
            priority=self._request.priority,
            cache_salt=self._request.cache_salt,
        )
        submit.emitted.extend(self._emitted())
        return submit

    def _emitted(self) -> list[pb.ChoiceTokens]:
        """What the choices that go on have emitted; nothing as long as no choice has."""
        choices = self._progress.choices
        if self._request.sampling.use_beam_search or not any(choice.emitted for choice in choices):
            return []
        return [
            pb.ChoiceTokens(choice=number, token_ids=choices[number].emitted)
            for number in self._outputs.going_on
        ]

    def _abort(self, route: Route, attempt: int) -> None:
        for worker_id in (route.decode, route.prefill):
            if worker_id is not None:
                self._fleet.abort(worker_id, self._request.number, attempt)

    def _end_overruns(self, route: Route, attempt: int) -> None:
        """A worker does not know that a stop string has ended one of several choices."""
        for choice in self._progress.take_overruns():
            self._fleet.abort_choice(route.decode, self._request.number, attempt, choice)

    async def _after_failure(self, route: Route) -> list[Delta]:
        """Raise the error unless another attempt may succeed or none is needed; what has ended already."""
        failed = self._progress.failed
        assert failed is not None
        ends = self._judge_emitted()
        if not self._outputs.going_on:
            return ends
        if isinstance(failed.error, WorkerLost):
            await self._judge(failed.error)
        # A preempted attempt has emitted at least one token: these come to an end by themselves.
        self._num_failures += not isinstance(failed.error, Preempted)
        if not failed.error.retryable or self._num_failures >= MAX_ATTEMPTS:
            raise failed.error
        culprit = route.prefill if failed.source is Source.PREFILL else route.decode
        self._metrics.attempt_failed(failed, self._progress.num_emitted)
        self._trace.attempt_failed(self._progress.attempt, failed, culprit, self._progress.num_emitted)
        logger.info(
            "attempt %d failed on %s: %s",
            self._progress.attempt,
            culprit,
            failed.error.message,
            extra={"request_id": self._request.request_id},
        )
        suspects = (route.prefill, route.decode) if isinstance(failed.error, LinkFailed) else (culprit,)
        self._avoid.update(worker_id for worker_id in suspects if worker_id is not None)
        if not failed.worker_lost:
            await asyncio.sleep(RETRY_PAUSE_S)
        return ends

    async def _judge(self, loss: WorkerLost) -> None:
        """Raise if workers die of this request, rather than beside it."""
        suspicion = self._watch.suspicion
        if suspicion.would_convict(loss):
            await asyncio.sleep(SETTLE_S)
            if self._fleet.is_registered(loss.identity):
                return  # it lives: the stream to it broke
        if suspicion.strike(loss):
            self._quarantine.convict(self._request.prompt_token_ids, self._request.sampling)
            self._metrics.convictions.inc()
            logger.error(
                "%s and another worker died of one request: it is given up and refused from now on",
                loss.identity.worker_id,
                extra={"request_id": self._request.request_id},
            )
            raise Internal(
                f"workers died {MAX_STRIKES} times while they ran this request; it is not tried again"
            )

    def _judge_emitted(self) -> list[Delta]:
        """Complete already? A worker can be lost between its last tokens and the word that they are."""
        ends = []
        for number in list(self._outputs.going_on):
            emitted = self._progress.choices[number].emitted
            end = self._outputs.end_at(number, emitted[-1]) if emitted else None
            if end is not None:
                ends.append(self._noted(end))
        return ends


def _deadline_passed() -> DeadlineExceeded:
    return DeadlineExceeded("the request's deadline passed")
