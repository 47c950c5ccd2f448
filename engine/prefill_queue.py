"""Which prompts are computed in a step."""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator

from engine.plan import Scheduled
from engine.policy import by_rank
from engine.request import Request, RequestState


class PrefillQueue:
    """In the policy's order, within a token budget.

    `waiting` requests hold no blocks: new ones, and preempted ones among them. A request is admitted with all
    the blocks of its tokens at once, so a `prefilling` one never waits for memory.
    """

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.prefilling: list[Request] = []

    def head(self, *, newcomers: bool = True) -> Request | None:
        """Who is admitted next; without `newcomers` only a preempted request."""
        return next((each for each in self.waiting if newcomers or each.output_token_ids), None)

    def granted_head(self) -> Request | None:
        """The first whose receiver has room for its KV."""
        return next((each for each in self.waiting if each.granted), None)

    def push(self, request: Request, state: RequestState) -> None:
        """The request waits at its rank, WAITING or SWAPPED."""
        request.move(state)
        insort(self.waiting, request, key=by_rank)

    def start(self, request: Request) -> None:
        """A request that holds all its blocks is computed from its cursor on."""
        request.move(RequestState.PREFILLING)
        insort(self.prefilling, request, key=by_rank)

    def sort(self) -> None:
        """Ranks have changed."""
        self.waiting.sort(key=by_rank)
        self.prefilling.sort(key=by_rank)

    def schedule(
        self, budget: int, seats: int, head: Callable[[], Request | None], admit: Callable[[Request], bool]
    ) -> list[Scheduled]:
        """Chunks of at most `seats` requests and `budget` tokens in all.

        `admit` gives the `head`, one of the waiting, its blocks, and if it is swapped its KV, or says no.
        """
        chunks: list[Scheduled] = []
        candidates = self._candidates(head, admit)
        while budget > 0 and len(chunks) < seats and (request := next(candidates, None)):
            chunks.append(Scheduled(request, min(budget, request.num_tokens - request.num_computed_tokens)))
            budget -= chunks[-1].query_len
        return chunks

    def _candidates(
        self, head: Callable[[], Request | None], admit: Callable[[Request], bool]
    ) -> Iterator[Request]:
        """Requests that hold their blocks; the next one is admitted only when it is asked for."""
        started = deque(self.prefilling)
        while first := head():
            if started and started[0].rank < first.rank:
                yield started.popleft()
            elif admit(first):
                yield self._leave_queue(first)
            else:
                break
        yield from started

    def _leave_queue(self, request: Request) -> Request:
        """A waiting request was admitted; if it was swapped, it is running already."""
        self.waiting.remove(request)
        if request.state is RequestState.WAITING:
            self.start(request)
        return request

    def remove(self, request: Request) -> None:
        """Forget a request that is done or aborted."""
        (self.prefilling if request.state is RequestState.PREFILLING else self.waiting).remove(request)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that are to be computed before their requests can decode."""
        return sum(
            request.num_tokens - request.num_computed_tokens for request in self.prefilling + self.waiting
        )
