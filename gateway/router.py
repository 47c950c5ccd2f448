"""Which workers take a request. Pure: a snapshot in, a choice out.

A prefill worker costs the tokens that have to be computed before this request's first token: those that
wait there already, and those of the sequence that its prefix cache probably lacks. So a warm cache is worth
exactly the work that it saves, and a queue longer than that sends the request elsewhere.

A decode worker costs its requests, since each of them slows every step; among equals, the one that has most
of the sequence, because what it has does not travel; then the one with most free blocks.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from gateway.attempt import Source


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One worker that is ready, with its load as this gateway sees it."""

    worker_id: str
    """Names the worker."""
    role: Source
    """Which part of a request it takes."""
    queued_prefill_tokens: int = 0
    """Prompt tokens that wait there."""
    num_requests: int = 0
    """Running and waiting there."""
    blocks_free: int = 0
    """Not held by requests or transfers."""
    cached_tokens: int = 0
    """Of the sequence that is routed, probably in its prefix cache."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """The workers of one attempt."""

    decode: str
    """Worker id."""
    prefill: str | None
    """Worker id; None: the decode worker prefills for itself."""


def choose(
    candidates: Iterable[Candidate],
    num_tokens: int,
    *,
    local_prefill_threshold: int,
    avoid: Collection[str] = (),
) -> Route | None:
    """The least loaded pair for a sequence of `num_tokens`; None if no decode worker is there.

    Workers in `avoid` (they failed this request before) are taken only for decode and only if no other
    is left: a decode worker can always prefill for itself.
    """
    pool = list(candidates)
    decodes = [worker for worker in pool if worker.role is Source.DECODE]
    if not decodes:
        return None
    decode = min(decodes, key=lambda worker: (worker.worker_id in avoid, *_decode_cost(worker)))
    if num_tokens < local_prefill_threshold:
        return Route(decode=decode.worker_id, prefill=None)
    prefills = [w for w in pool if w.role is Source.PREFILL and w.worker_id not in avoid]
    prefill = min(prefills, key=lambda worker: _prefill_cost(worker, num_tokens), default=None)
    return Route(decode=decode.worker_id, prefill=prefill.worker_id if prefill else None)


def _decode_cost(worker: Candidate) -> tuple[int, int, int, str]:
    return worker.num_requests, -worker.cached_tokens, -worker.blocks_free, worker.worker_id


def _prefill_cost(worker: Candidate, num_tokens: int) -> tuple[int, int, str]:
    uncached = num_tokens - worker.cached_tokens
    return worker.queued_prefill_tokens + uncached, worker.num_requests, worker.worker_id
