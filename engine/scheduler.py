"""The co-located scheduler: a prefill queue and a decode queue over the same blocks."""

from collections.abc import Hashable

from engine.block_tables import BlockTables
from engine.choices import share_blocks
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
        self.max_active = min(max_num_seqs, max_num_batched_tokens)
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
        self._go_on(request)

    def schedule(self) -> list[Scheduled]:
        """The next step; decodes come first, each request at most once."""
        decodes, preempted = self.decode.schedule(self.tables)
        for request in preempted:
            self.prefill.push_front(request)
        chunks = self.prefill.schedule(self._token_budget - len(decodes), self._admit)
        self.tables.run_copies()
        return decodes + chunks

    def start_decoding(self, request: Request) -> None:
        """A request's prompt is computed: it decodes, or its choices do."""
        self.prefill.remove(request)
        self._go_on(request)

    def _go_on(self, request: Request) -> None:
        if not request.forks:
            self.decode.start(request)
            return
        request.move(RequestState.FORKED)
        for fork in request.forks:
            fork.arrival = request.arrival
            share_blocks(self.tables, request, fork)
        self.tables.free(request)
        for fork in request.forks:
            self._start_fork(fork)
        self.tables.run_copies()

    def _start_fork(self, fork: Request) -> None:
        """A fork decodes; one that was continued before computes those tokens first, if they have room."""
        free = self.tables.num_free - len(self.decode.running)
        if fork.num_computed_tokens == fork.num_tokens:
            self.decode.start(fork)
        elif self.tables.missing(fork, fork.num_tokens) <= free:
            self.tables.grow(fork, fork.num_tokens)
            self.prefill.start(fork)
        else:
            self.tables.free(fork)
            self.prefill.push_front(fork)

    def start_over(self, leader: Request) -> None:
        """End the forks; their leader computes the prompt again, before all that have not started."""
        for fork in leader.live_forks:
            self._drop(fork)
        self.prefill.push_front(leader)

    def hold(self, request: Request) -> None:
        """A prefill-only request is computed: its blocks stay until it is finished."""
        self.prefill.remove(request)
        request.move(RequestState.HELD)

    def finish(self, request: Request) -> None:
        """Forget a live request, whatever it does, and free its blocks; a leader goes with its forks."""
        for fork in request.live_forks:
            self._drop(fork)
        self._drop(request)
        if request.leader is None:
            del self.live[request.key]
        elif not request.leader.live_forks:
            self.finish(request.leader)

    def _drop(self, request: Request) -> None:
        if request.state in (RequestState.WAITING, RequestState.PREFILLING):
            self.prefill.remove(request)
        elif request.state is RequestState.RUNNING:
            self.decode.remove(request)
        self._reserved.discard(request)
        request.move(RequestState.FINISHED)
        self.tables.free(request)

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
        requests = [each for leader in self.live.values() for each in (leader, *leader.live_forks)]
        self.tables.check(requests)
        places = [*self.prefill.waiting, *self.prefill.prefilling, *self.decode.running, *self._reserved]
        held = [request for request in requests if request.state is RequestState.HELD]
        forked = [request for request in requests if request.state is RequestState.FORKED]
        assert sorted(map(id, places + held + forked)) == sorted(map(id, requests))
        assert all(leader.live_forks and not leader.block_tables for leader in forked)
        assert all(request.state is RequestState.WAITING for request in self.prefill.waiting)
        assert not any(request.block_tables for request in self.prefill.waiting)
        assert all(request.state is RequestState.PREFILLING for request in self.prefill.prefilling)
        assert all(request.state is RequestState.RUNNING for request in self.decode.running)
        assert self._num_active <= self.max_active

    @property
    def _num_active(self) -> int:
        starting = (*self.prefill.prefilling, *self._reserved)
        return len(self.decode.running) + sum(request.num_seats for request in starting)

    def _arrive(self, request: Request) -> None:
        assert request.key not in self.live, f"{request.key!r} is live already"
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self.live[request.key] = request

    def _fits(self, request: Request, max_cached_tokens: int, promised_blocks: int = 0) -> bool:
        if self._num_active + request.num_seats > self.max_active:
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
