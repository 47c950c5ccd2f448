"""Which prompts are computed in a step."""

from collections import deque
from collections.abc import Callable, Iterator

from engine.plan import Scheduled
from engine.request import Request, RequestState


class PrefillQueue:
    """First come, first served, within a token budget.

    `waiting` requests hold no blocks. A request is admitted with all the blocks of its tokens at once, so a
    `prefilling` one never waits for memory.
    """

    def __init__(self) -> None:
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []

    def push(self, request: Request) -> None:
        """A new request waits behind all others."""
        request.move(RequestState.WAITING)
        self.waiting.append(request)

    def push_front(self, request: Request) -> None:
        """A preempted request goes before all that have not started."""
        request.move(RequestState.WAITING)
        self.waiting.appendleft(request)

    def start(self, request: Request) -> None:
        """A request that holds all its blocks is computed from its cursor on."""
        request.move(RequestState.PREFILLING)
        self.prefilling.append(request)

    def schedule(self, budget: int, admit: Callable[[Request], bool]) -> list[Scheduled]:
        """Chunks of at most `budget` tokens in all; `admit` allocates a request's blocks or says no."""
        chunks: list[Scheduled] = []
        candidates = self._candidates(admit)
        while budget > 0 and (request := next(candidates, None)):
            chunks.append(Scheduled(request, min(budget, request.num_tokens - request.num_computed_tokens)))
            budget -= chunks[-1].query_len
        return chunks

    def _candidates(self, admit: Callable[[Request], bool]) -> Iterator[Request]:
        """Requests that hold their blocks; the next one is admitted only when it is asked for."""
        yield from tuple(self.prefilling)
        while self.waiting and admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.start(request)
            yield request

    def remove(self, request: Request) -> None:
        """Forget a request that is done or aborted."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        else:
            self.prefilling.remove(request)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that are to be computed before their requests can decode."""
        started = sum(request.num_tokens - request.num_computed_tokens for request in self.prefilling)
        return started + sum(request.num_tokens for request in self.waiting)
