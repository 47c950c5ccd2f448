"""The co-located scheduler: a prefill queue and a decode queue over the same blocks."""

from collections.abc import Hashable

from engine.block_tables import BlockTables
from engine.decode_queue import DecodeQueue
from engine.plan import Scheduled
from engine.prefill_queue import PrefillQueue
from engine.request import Request, RequestState


class Scheduler:
    """All live requests, by state. Decodes go first; prompt chunks take the rest of the token budget.

    A request is admitted, or reserved, if its blocks and one more for each running request are free.
    Nothing waits in a circle: a prefilling request has all its blocks; the oldest running request takes the
    blocks of younger ones; a pool holds one longest request; reserved and held ones end from outside.
    """

    def __init__(self, tables: BlockTables, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.tables = tables
        self.prefill = PrefillQueue()
        self.decode = DecodeQueue()
        self.live: dict[Hashable, Request] = {}
        self._reserved: set[Request] = set()
        self._token_budget = max_num_batched_tokens
        # Never more running requests than budget: whoever is prefilling takes one of these seats, so at
        # least one token of every step is left for it.
        self._max_active = min(max_num_seqs, max_num_batched_tokens)
        self._num_arrivals = 0

    def submit(self, request: Request) -> None:
        """Queue for local prefill."""
        self._arrive(request)
        self.prefill.push(request)

    def reserve(self, request: Request) -> bool:
        """Allocate for KV that comes from outside; False: not now.

        What the head of the prefill queue needs is spoken for: no reservation starves a preempted request.
        """
        head = self.prefill.waiting[0] if self.prefill.waiting else None
        promised = self.tables.cost(head, _reusable(head)) if head else 0
        if not self._fits(request, request.num_tokens, promised):
            return False
        self._arrive(request)
        request.move(RequestState.RESERVED)
        self._reserved.add(request)
        self.tables.admit(request, request.num_tokens)
        return True

    def commit(self, request: Request) -> None:
        """A reserved request's KV is complete: all its tokens are computed."""
        self._reserved.remove(request)
        request.num_computed_tokens = request.num_tokens
        self.decode.start(request)

    def schedule(self) -> list[Scheduled]:
        """The next step; decodes come first, each request at most once."""
        decodes, preempted = self.decode.schedule(self.tables)
        for request in preempted:
            self.prefill.push_front(request)
        return decodes + self.prefill.schedule(self._token_budget - len(decodes), self._admit)

    def start_decoding(self, request: Request) -> None:
        """A request's prompt is computed and its first token sampled."""
        self.prefill.remove(request)
        self.decode.start(request)

    def hold(self, request: Request) -> None:
        """A prefill-only request is computed: its blocks stay until it is finished."""
        self.prefill.remove(request)
        request.move(RequestState.HELD)

    def finish(self, request: Request) -> None:
        """Forget a live request, whatever it does, and free its blocks."""
        if request.state in (RequestState.WAITING, RequestState.PREFILLING):
            self.prefill.remove(request)
        elif request.state is RequestState.RUNNING:
            self.decode.remove(request)
        self._reserved.discard(request)
        request.move(RequestState.FINISHED)
        self.tables.free(request)
        del self.live[request.key]

    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        waiting = self.prefill.waiting
        return bool(
            self.decode.running
            or self.prefill.prefilling
            or (waiting and self._fits(waiting[0], _reusable(waiting[0])))
        )

    def check(self) -> None:
        """Assert that every live request is in the one place of its state and holds its blocks."""
        self.tables.check(self.live.values())
        places = [*self.prefill.waiting, *self.prefill.prefilling, *self.decode.running, *self._reserved]
        held = [request for request in self.live.values() if request.state is RequestState.HELD]
        assert sorted(map(id, places + held)) == sorted(map(id, self.live.values()))
        assert all(request.state is RequestState.WAITING for request in self.prefill.waiting)
        assert not any(request.block_tables for request in self.prefill.waiting)
        assert all(request.state is RequestState.PREFILLING for request in self.prefill.prefilling)
        assert all(request.state is RequestState.RUNNING for request in self.decode.running)
        assert self._num_active <= self._max_active

    @property
    def _num_active(self) -> int:
        return len(self.decode.running) + len(self.prefill.prefilling) + len(self._reserved)

    def _arrive(self, request: Request) -> None:
        assert request.key not in self.live, f"{request.key!r} is live already"
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self.live[request.key] = request

    def _fits(self, request: Request, max_cached_tokens: int, promised_blocks: int = 0) -> bool:
        if self._num_active >= self._max_active:
            return False
        free = self.tables.num_free - promised_blocks - len(self.decode.running)
        needed = self.tables.blocks_for(request.num_tokens)
        return needed <= free or self.tables.cost(request, max_cached_tokens) <= free

    def _admit(self, request: Request) -> bool:
        fits = self._fits(request, _reusable(request))
        if fits:
            self.tables.admit(request, _reusable(request))
        return fits


def _reusable(request: Request) -> int:
    """Tokens whose KV may come from the prefix cache; the last one is computed for its logits."""
    return request.num_tokens - 1
