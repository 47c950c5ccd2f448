"""Which running requests get a token in a step, and who makes room when blocks run out."""

from bisect import insort
from collections import deque

from engine.block_tables import BlockTables
from engine.plan import Scheduled
from engine.request import Request, RequestState


class DecodeQueue:
    """Every running request, oldest first, one token per step."""

    def __init__(self) -> None:
        self.running: list[Request] = []

    def start(self, request: Request) -> None:
        """The request decodes from the next step on."""
        request.move(RequestState.RUNNING)
        insort(self.running, request, key=lambda each: each.arrival)

    def remove(self, request: Request) -> None:
        """Forget a request that is done or aborted."""
        self.running.remove(request)

    def schedule(self, tables: BlockTables) -> tuple[list[Scheduled], list[Request]]:
        """Grow every running request by one token; (scheduled, preempted), the youngest preempted first.

        Blocks go to the oldest first. Preempted requests have lost their blocks and are no longer running.
        """
        scheduled: list[Scheduled] = []
        preempted: list[Request] = []
        pending = deque(self.running)
        while pending:
            request = pending.popleft()
            while tables.missing(request, request.num_tokens) > tables.num_free:
                victim = pending.pop() if pending else request
                tables.free(victim)
                self.running.remove(victim)
                preempted.append(victim)
                if victim is request:
                    break
            else:
                tables.grow(request, request.num_tokens)
                scheduled.append(Scheduled(request, request.num_tokens - request.num_computed_tokens))
        return scheduled, preempted
