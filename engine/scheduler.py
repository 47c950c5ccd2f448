"""The co-located scheduler: a prefill queue and a decode queue over the same blocks."""

import heapq
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import chain, islice

from engine.block_tables import BlockTables
from engine.choices import share_blocks
from engine.decode_queue import DecodeQueue
from engine.outputs import Preempted, PreemptionMode
from engine.plan import Scheduled
from engine.policy import Fcfs, Policy, by_rank
from engine.preemption import Preemption, PreemptionChoice
from engine.prefill_queue import PrefillQueue
from engine.request import Request, RequestState
from engine.swap_space import NoMover, SwapSpace

Extend = Callable[[list[Scheduled], BlockTables, int], list[Scheduled]]
"""Gives decodes slots for draft tokens, from the blocks and the token budget that a step has left."""


class Scheduler:
    """All live requests, by state. Decodes go first; prompt chunks take the rest of the token budget.

    A request is admitted, or reserved, if its blocks and one more for each running request are free.
    Nothing waits in a circle: a prefilling request has all its blocks; the first running request takes the
    blocks of later ones; a pool holds one longest request, of `longest` tokens; reserved and held ones end
    from outside. A held one ends when its receiver has room, which may first want others: those that are
    not granted leave room for a longest request, and a granted one passes them.
    """

    def __init__(
        self,
        tables: BlockTables,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: Policy | None = None,
        preemption: PreemptionChoice = "recompute",
        swap_space: SwapSpace | None = None,
        extend: Extend | None = None,
        longest: int = 0,
    ) -> None:
        self.tables = tables
        self.policy = policy or Fcfs()
        self.swap_space = swap_space or SwapSpace(tables, NoMover(), num_slots=0)
        self.prefill = PrefillQueue()
        self.decode = DecodeQueue()
        self.live: dict[Hashable, Request] = {}
        self._preemption = Preemption(preemption, self.swap_space, max_step_tokens=max_num_batched_tokens)
        self._preempted: list[Preempted] = []
        self._reserved: set[Request] = set()
        self._token_budget = max_num_batched_tokens
        self._extend = extend or (lambda decodes, tables, budget: decodes)
        self._longest_blocks = tables.blocks_for(longest)
        # Never more seats than budget: unless the policy pauses requests, whoever is prefilling takes one of
        # them, so at least one token of every step is left for it.
        self.max_active = min(max_num_seqs, max_num_batched_tokens)
        self._num_arrivals = 0

    def enter(self, request: Request, num_prefill_tokens: int) -> None:
        """Give a request its place in the policy's order, once; so many tokens will be computed here."""
        if request.arrival:
            return
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self.policy.arrive(request, num_prefill_tokens)

    def submit(self, request: Request) -> None:
        """Queue for local prefill."""
        self._arrive(request, request.num_tokens)
        self.prefill.push(request, RequestState.WAITING)

    def reserve(self, request: Request) -> bool:
        """Allocate for KV that comes from outside; False: not now.

        What the head of the prefill queue needs is spoken for, if it ranks before this one: no reservation
        starves a preempted request.
        """
        self.enter(request, 0)
        head = self.prefill.head()
        if self._is_crowded:
            return False
        ranks_first = head is not None and head.rank < request.rank
        promised = self.tables.cost(head, _reusable(head)) if head and ranks_first else 0
        self._make_room(request, request.num_tokens, promised)
        if not self._fits(request, request.num_tokens, promised):
            return False
        self._arrive(request, 0)
        request.transferred = True
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
        self.policy.begin()
        # Judged before anybody is displaced for the head: displacing must not make another one the head.
        head = partial(self._head, newcomers=not self._is_crowded)
        if first := head():
            self._make_room(first, _reusable(first))
        decodes = self.decode.schedule(self.tables, self._decode_seats(head()), self._displace)
        self._swap_ahead(len(decodes))
        budget, seats = self._token_budget - len(decodes), self.max_active - len(decodes)
        chunks = self.prefill.schedule(budget, seats, head, self._admit)
        budget -= sum(chunk.query_len for chunk in chunks)
        decodes = self._extend(decodes, self.tables, budget)
        self.tables.run_copies()
        return decodes + chunks

    def charge(self, plan: Sequence[Scheduled]) -> None:
        """The step is computed; ranks may follow from the time it took."""
        queued = chain(self.decode.running, self.prefill.prefilling, self.prefill.waiting)
        if self.policy.charge(plan, queued):
            self.decode.sort()
            self.prefill.sort()

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
            _take_place(fork, request)
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
            self.prefill.push(fork, RequestState.WAITING)

    def start_over(self, leader: Request) -> None:
        """End the forks; their leader computes the prompt again, in its old place."""
        for fork in leader.live_forks:
            self._drop(fork)
        self.prefill.push(leader, RequestState.WAITING)

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
        if request.state in (RequestState.WAITING, RequestState.SWAPPED, RequestState.PREFILLING):
            self.prefill.remove(request)
        elif request.state is RequestState.RUNNING:
            self.decode.remove(request)
        self._reserved.discard(request)
        request.move(RequestState.FINISHED)
        self.swap_space.drop(request)
        self.tables.free(request)

    def take_preempted(self) -> list[Preempted]:
        """Preemptions that nobody has been told of, once."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def has_work(self) -> bool:
        """Whether a step would compute, or tell, anything."""
        return bool(self.decode.running or self._preempted or self.may_start_prompts)

    @property
    def may_start_prompts(self) -> bool:
        """A prompt is being computed, or the next step starts or resumes one, if need be by displacing."""
        if self.prefill.prefilling:
            return True
        head = self._head(newcomers=not self._is_crowded)
        if head is None:
            return False
        running = self.decode.running
        ranks_before = bool(running) and head.rank[0] < running[-1].rank[0]
        return ranks_before or self._fits(head, _reusable(head))

    def check(self) -> None:
        """Assert that every live request is in the one place of its state and holds its blocks."""
        requests = [each for leader in self.live.values() for each in (leader, *leader.live_forks)]
        self.tables.check(requests)
        self.swap_space.check(requests)
        places = [*self.prefill.waiting, *self.prefill.prefilling, *self.decode.running, *self._reserved]
        held = [request for request in requests if request.state is RequestState.HELD]
        forked = [request for request in requests if request.state is RequestState.FORKED]
        assert sorted(map(id, places + held + forked)) == sorted(map(id, requests))
        assert all(leader.live_forks and not leader.block_tables for leader in forked)
        without_blocks = (RequestState.WAITING, RequestState.SWAPPED)
        assert all(request.state in without_blocks for request in self.prefill.waiting)
        assert not any(request.block_tables for request in self.prefill.waiting)
        assert all(request.state is RequestState.PREFILLING for request in self.prefill.prefilling)
        assert all(request.state is RequestState.RUNNING for request in self.decode.running)
        for queue in (self.prefill.waiting, self.prefill.prefilling, self.decode.running):
            assert queue == sorted(queue, key=by_rank)
        assert self.policy.pauses or self._num_active <= self.max_active

    @property
    def _num_active(self) -> int:
        starting = (*self.prefill.prefilling, *self._reserved)
        return len(self.decode.running) + sum(request.num_seats for request in starting)

    def _arrive(self, request: Request, num_prefill_tokens: int) -> None:
        assert request.key not in self.live, f"{request.key!r} is live already"
        self.enter(request, num_prefill_tokens)
        self.live[request.key] = request

    @property
    def _is_crowded(self) -> bool:
        """Nobody new starts: where requests are paused, host memory must be able to take them."""
        return self.policy.pauses and self.swap_space.is_crowded

    def _head(self, *, newcomers: bool) -> Request | None:
        """Who is admitted next: the first, or if that is a prompt whose receiver has no room yet, and too
        little is left beside it, the first granted one."""
        first = self.prefill.head(newcomers=newcomers)
        if first is None or first.granted or self._fits(first, _reusable(first)):
            return first
        return self.prefill.granted_head()

    def _fits(self, request: Request, max_cached_tokens: int, promised_blocks: int = 0) -> bool:
        if not self.policy.pauses and self._num_active + request.num_seats > self.max_active:
            return False
        free = self.tables.num_free - promised_blocks - len(self.decode.running)
        if not request.granted:
            free -= self._longest_blocks
        needed = self.tables.blocks_for(request.num_tokens)
        return needed <= free or self.tables.cost(request, max_cached_tokens) <= free

    def _admit(self, request: Request) -> bool:
        """Give the head of the queue its blocks, and its KV back if it was swapped."""
        if not self._fits(request, _reusable(request)):
            return False
        if request.state is RequestState.SWAPPED:
            # A block that it gets may be one that is still to be copied from.
            self.tables.run_copies()
            self.swap_space.swap_in(request)
            self.decode.start(request)
        else:
            self.tables.admit(request, _reusable(request))
        return True

    def _decode_seats(self, head: Request | None) -> int:
        """Seats of the step for running requests; those that prompts of better rank will take are left."""
        if not self.policy.pauses:
            return self.max_active
        newcomers = [head] if head and self._fits(head, _reusable(head)) else []
        contenders = heapq.merge(self.decode.running, self.prefill.prefilling, newcomers, key=by_rank)
        first = islice(contenders, self.max_active)
        seats = sum(request.state is RequestState.RUNNING for request in first)
        return _whole_groups(self.decode.running, seats)

    def _make_room(self, request: Request, max_cached_tokens: int, promised_blocks: int = 0) -> None:
        """Displace running requests of later bands, the last first, if that lets the request in.

        What lands is as good as free here: until then the request waits, and nobody else need go for it.
        """
        running = self.decode.running
        if not running or running[-1].rank[0] <= request.rank[0]:
            return
        later = [each for each in running if each.rank[0] > request.rank[0]]
        gain = sum(len(each.block_tables[0]) + 1 for each in later)
        free = self.tables.num_free + self.tables.num_landing - promised_blocks - len(running)
        num_active = self._num_active - len(later) + request.num_seats
        has_seat = self.policy.pauses or num_active <= self.max_active
        if not has_seat or self.tables.cost(request, max_cached_tokens) > free + gain:
            return
        while later and not self._fits(request, max_cached_tokens, promised_blocks - self.tables.num_landing):
            if self.policy.pauses and self._preemption.mode(later[-1]) is not PreemptionMode.SWAP:
                return
            self._displace(later.pop())

    def _swap_ahead(self, num_decodes: int) -> None:
        """Paused requests leave, the last first, until each scheduled one has a block for its next growth."""
        for request in reversed(self.decode.running[num_decodes:]):
            if self.tables.num_free >= num_decodes:
                return
            if self._preemption.mode(request) is PreemptionMode.SWAP:
                self._displace(request)

    def _displace(self, request: Request) -> None:
        """Take a running request's blocks."""
        mode = self._preemption.mode(request)
        self._preempted.append(Preempted(request, mode))
        if mode is PreemptionMode.HAND_BACK:
            self.finish(request)
            return
        self.decode.remove(request)
        if mode is PreemptionMode.SWAP:
            self.swap_space.swap_out(request)
            self.prefill.push(request, RequestState.SWAPPED)
        else:
            self.tables.free(request)
            self.prefill.push(request, RequestState.WAITING)


def _take_place(fork: Request, leader: Request) -> None:
    """In the order of requests a fork stands where its leader stood."""
    fork.arrival, fork.rank, fork.transferred = leader.arrival, leader.rank, leader.transferred
    fork.served_s, fork.served_at = leader.served_s, leader.served_at


def _whole_groups(running: Sequence[Request], num_requests: int) -> int:
    """At most so many of the first requests, without a part of a beam search: beams advance together."""
    while 0 < num_requests < len(running):
        leader = running[num_requests].leader
        if leader is None or leader.search is None or running[num_requests - 1].leader is not leader:
            break
        num_requests -= 1
    return num_requests


def _reusable(request: Request) -> int:
    """Tokens whose KV may come from the prefix cache; the last one is computed for its logits."""
    return request.num_tokens - 1
