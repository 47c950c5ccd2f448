"""Which running requests get a token in a step, and who makes room when blocks run out."""

from bisect import insort
from collections import deque
from collections.abc import Callable

from engine.block_tables import BlockTables
from engine.plan import Scheduled
from engine.policy import by_rank
from engine.request import Request, RequestState


class DecodeQueue:
    """Every running request in the policy's order, one token per step."""

    def __init__(self) -> None:
        self.running: list[Request] = []

    def start(self, request: Request) -> None:
        """The request decodes from the next step on."""
        request.move(RequestState.RUNNING)
        insort(self.running, request, key=by_rank)

    def remove(self, request: Request) -> None:
        """Forget a request that is done, aborted or preempted."""
        self.running.remove(request)

    def sort(self) -> None:
        """Ranks have changed."""
        self.running.sort(key=by_rank)

    def schedule(
        self, tables: BlockTables, seats: int, displace: Callable[[Request], None]
    ) -> list[Scheduled]:
        """Grow the first `seats` running requests by one token.

        Blocks go to the first; `displace` takes those of the last and removes it from here.
        """
        scheduled: list[Scheduled] = []
        pending = deque(self.running)
        while pending and len(scheduled) < seats:
            request = pending.popleft()
            num_tokens = request.num_tokens
            while (needed := tables.missing(request, num_tokens)) and needed > tables.num_free:
                victim = pending.pop() if pending else request
                displace(victim)
                if victim is request:
                    break
            else:
                if needed:
                    tables.grow(request, num_tokens)
                scheduled.append(Scheduled(request, num_tokens - request.num_computed_tokens))
        return scheduled
