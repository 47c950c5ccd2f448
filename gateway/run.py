"""One admitted request on the workers, over at most 1 + 2 attempts, preempted ones apart.

1. Choose a route; submit to the decode worker and, unless it prefills for itself, to the prefill worker at
   once, with one fresh transfer id.
2. Merge what both say (`attempt.Progress`), turn tokens into text (`output.TextOutput`), yield deltas.
3. An attempt that fails retryably is followed by another one that starts behind the emitted tokens,
   elsewhere if possible. What was emitted is never sent again.
4. However it ends, workers that still have the attempt are told to give it up.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from gateway.attach import Arrival, Inbox
from gateway.attempt import NOTHING, Failed, Finished, NewTokens, Progress, Source
from gateway.fleet import Fleet
from gateway.metrics import GatewayMetrics
from gateway.output import Delta, TextOutput
from gateway.prefix_index import Chain
from gateway.prompt_logprobs import PromptLogprobs
from gateway.router import Route, choose
from gateway.tracing import RequestTrace
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import SystemClock
from runtime.errors import Cancelled, DeadlineExceeded, Preempted, TandemError, Unavailable

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3

WAIT_FOR_WORKER_S = 2.0
"""A request that has lost its workers waits for others this long."""

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
    priority: int = 0
    """The larger goes first, where the workers schedule by priority."""
    cache_salt: str = ""
    """Names who may share cached blocks; empty: everybody without a salt."""


class RequestRun:
    """The life of one request between admission and its last delta."""

    def __init__(
        self,
        request: Prepared,
        output: TextOutput,
        fleet: Fleet,
        metrics: GatewayMetrics,
        trace: RequestTrace,
        *,
        local_prefill_threshold: int,
    ) -> None:
        self._request = request
        self._output = output
        self._fleet = fleet
        self._metrics = metrics
        self._trace = trace
        # As in `flow`: the loop's own time is too coarse to measure with.
        self._clock = SystemClock()
        self._local_prefill_threshold = local_prefill_threshold
        self._progress = Progress()
        self._inbox = Inbox()
        self._avoid: set[str] = set()
        self.prompt_logprobs = PromptLogprobs(request.sampling)
        self._num_failures = 0

    def interrupt(self, error: TandemError) -> None:
        """End the request with an error; Cancelled ends it with finish reason ABORT."""
        self._inbox.interrupt(error)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The request's output; the last delta has finish_reason and usage."""
        try:
            async with aclosing(self._all_attempts()) as attempts:
                async for delta in attempts:
                    yield delta
        except Cancelled:
            yield self._last(Delta(finish_reason=pb.FINISH_REASON_ABORT))
        finally:
            self._metrics.dropped_frames.inc(self._progress.dropped_frames)

    async def _all_attempts(self) -> AsyncGenerator[Delta, None]:
        last = None
        while last is None:
            start_s = self._clock.now()
            prefix = self._prefix()
            route = await self._route(prefix)
            attempt = self._progress.begin(split=route.prefill is not None)
            self.prompt_logprobs.begin(attempt, split=route.prefill is not None)
            self._metrics.attempts.inc()
            try:
                self._submit(route, prefix)
                self._trace.routed(start_s, attempt, route)
                while (delta := await self._next_delta()) is not None:
                    if delta.finish_reason is not None:
                        last = delta
                        break
                    yield delta
            finally:
                self._abort(route, attempt)
            last = last or await self._after_failure(route)
        self._fleet.remember(route.decode, self._prefix())
        yield last

    async def _next_delta(self) -> Delta | None:
        """The attempt's next output; None if it has failed and everything of it is out."""
        while self._progress.outcome is None:
            new = self._merge(await self._arrivals())
            outcome = self._outcome()
            if isinstance(outcome, Finished):
                return self._finish(outcome, new)
            if new.token_ids:
                piece = self._output.push(new)
                delta = Delta(token_ids=piece.token_ids, text=piece.text, logprobs=piece.logprobs)
                return delta if piece.stop is None else self._stopped(delta, piece.stop)
        return None

    def _outcome(self) -> Finished | Failed | None:
        return self._progress.outcome

    async def _arrivals(self) -> list[Arrival]:
        try:
            async with asyncio.timeout_at(self._request.deadline):
                return self.prompt_logprobs.admit(await self._inbox.get())
        except TimeoutError:
            raise DeadlineExceeded("the request's deadline passed") from None

    def _merge(self, arrivals: list[Arrival]) -> NewTokens:
        token_ids: list[int] = []
        logprobs: list[pb.TokenLogprob] = []
        for source, attempt, what in arrivals:
            if isinstance(what, pb.TokenFrame):
                new = self._progress.on_frame(source, what)
                token_ids += new.token_ids
                logprobs += new.logprobs
            elif isinstance(what, pb.AttemptEnd):
                self._progress.on_end(source, what)
            else:
                self._progress.on_lost(source, attempt, what)
        return NewTokens(token_ids, logprobs)

    def _finish(self, outcome: Finished, new: NewTokens) -> Delta:
        """The last delta of a generation that a worker ended; a stop string in it ends it earlier."""
        piece = self._output.push(new)
        delta = Delta(token_ids=piece.token_ids, text=piece.text, logprobs=piece.logprobs)
        if piece.stop is not None:
            return self._stopped(delta, piece.stop)
        text, stop = self._output.finish()
        reason = pb.FINISH_REASON_STOP if stop is not None else outcome.reason
        stop_reason = stop if stop is not None else self._output.stop_reason(outcome.stop_token_id)
        return self._last(
            replace(delta, text=delta.text + text, finish_reason=reason, stop_reason=stop_reason)
        )

    def _stopped(self, delta: Delta, stop: str) -> Delta:
        return self._last(replace(delta, finish_reason=pb.FINISH_REASON_STOP, stop_reason=stop))

    def _last(self, delta: Delta) -> Delta:
        usage = pb.Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=self._output.num_tokens,
            cached_tokens=self._progress.cached_tokens,
        )
        return replace(delta, usage=usage)

    def _prefix(self) -> Chain:
        token_ids = [*self._request.prompt_token_ids, *self._progress.emitted]
        return self._fleet.prefix(token_ids, self._request.cache_salt)

    async def _route(self, prefix: Chain) -> Route:
        """Workers for the next attempt. A first attempt does not wait for them, a later one a little."""
        now = asyncio.get_running_loop().time
        waits_until = now() + (WAIT_FOR_WORKER_S if self._progress.attempt >= 0 else 0)
        while True:
            route = choose(
                self._fleet.candidates(prefix),
                len(self._request.prompt_token_ids) + len(self._progress.emitted),
                local_prefill_threshold=self._local_prefill_threshold,
                avoid=self._avoid,
            )
            if route is not None:
                return route
            if now() >= min(waits_until, self._request.deadline):
                raise Unavailable(self._fleet.not_ready() or "no worker", retry_after_s=1.0, retryable=True)
            await asyncio.sleep(RETRY_PAUSE_S)

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
                client.submit(message, self._inbox, self._fleet.cached_tokens(worker_id, prefix))
                self._fleet.remember(worker_id, prefix)
            except TandemError as error:
                self._inbox.put(Arrival(source, self._progress.attempt, error))

    def _submit_message(self) -> pb.Submit:
        left_s = self._request.deadline - asyncio.get_running_loop().time()
        submit = pb.Submit(
            request=self._request.number,
            attempt=self._progress.attempt,
            request_id=self._request.request_id,
            transfer_id=secrets.token_bytes(16),
            prompt_token_ids=self._request.prompt_token_ids,
            sampling=self._request.sampling,
            bad_words=[pb.TokenSequence(token_ids=word) for word in self._request.bad_words],
            timeout_ms=max(int(left_s * 1000), 1),
            traceparent=self._request.traceparent,
            priority=self._request.priority,
            cache_salt=self._request.cache_salt,
        )
        if self._progress.emitted:
            submit.emitted.add(choice=0, token_ids=self._progress.emitted)
        return submit

    def _abort(self, route: Route, attempt: int) -> None:
        for worker_id in (route.decode, route.prefill):
            if worker_id is not None:
                self._fleet.abort(worker_id, self._request.number, attempt)

    async def _after_failure(self, route: Route) -> Delta | None:
        """Raise the error unless another attempt may succeed; the last delta if none is needed."""
        failed = self._outcome()
        assert isinstance(failed, Failed)
        if (end := self._judge_emitted()) is not None:
            return self._finish(end, NOTHING)
        # A preempted attempt has emitted at least one token: these come to an end by themselves.
        self._num_failures += not isinstance(failed.error, Preempted)
        if not failed.error.retryable or self._num_failures >= MAX_ATTEMPTS:
            raise failed.error
        culprit = route.prefill if failed.source is Source.PREFILL else route.decode
        self._metrics.attempt_failed(failed, len(self._progress.emitted))
        self._trace.attempt_failed(self._progress.attempt, failed, culprit, len(self._progress.emitted))
        logger.info(
            "attempt %d failed on %s: %s",
            self._progress.attempt,
            culprit,
            failed.error.message,
            extra={"request_id": self._request.request_id},
        )
        if culprit is not None:
            self._avoid.add(culprit)
        if not failed.worker_lost:
            await asyncio.sleep(RETRY_PAUSE_S)
        return None

    def _judge_emitted(self) -> Finished | None:
        """Complete already? A worker can be lost between its last tokens and the word that they are."""
        if not self._progress.emitted:
            return None
        token_id = self._progress.emitted[-1]
        reason = self._output.end_at(token_id)
        return None if reason is None else Finished(reason, token_id)
