"""The engine thread's half of the intake: reservations in the policy's order, and scatters.

That thread alone allocates and frees blocks, so a frame that is still wanted when `target` looks cannot
lose its blocks before the copy ends, and a late one finds nothing.
"""

from bisect import insort
from collections.abc import Callable

from engine.engine import Engine
from engine.request import Request
from kvtransfer.plan import Rectangle
from runtime.errors import TandemError
from worker.lanes.stripes import Piece


class Receiving:
    """Transfers between their Submit and their Commit, by transfer id; lives on the engine thread."""

    def __init__(
        self,
        reserved: Callable[[bytes, int, int], None],
        refused: Callable[[bytes, TandemError], None],
    ) -> None:
        self._reserved = reserved
        self._refused = refused
        # In the order of the scheduling policy; bounded by the attempts that gateways have open.
        self._waiting: list[tuple[bytes, Request]] = []
        self._live: dict[bytes, Request] = {}

    @property
    def num_waiting(self) -> int:
        """Reservations for which the pool has no room yet."""
        return len(self._waiting)

    def want(self, engine: Engine, transfer_id: bytes, request: Request) -> None:
        """Reserve for this request as soon as there is room."""
        engine.enter(request)
        insort(self._waiting, (transfer_id, request), key=lambda item: item[1].rank)

    def reserve_waiting(self, engine: Engine) -> None:
        """Reserve for as many waiting requests as the pool admits, in order."""
        while self._waiting:
            transfer_id, request = self._waiting[0]
            try:
                if not engine.reserve(request):
                    return
            except TandemError as error:
                self._refused(transfer_id, error)
            else:
                self._live[transfer_id] = request
                self._reserved(transfer_id, len(request.block_tables[0]), request.num_cached_tokens)
            del self._waiting[0]

    def target(self, transfer_id: bytes, rectangle: Rectangle) -> Piece | None:
        """The request's blocks that a frame is for, to be copied at once; None of a transfer that has ended,
        which leaves no trace. What was copied wrong is in blocks that only a commit shows to anybody."""
        request = self._live.get(transfer_id)
        if request is None:
            return None
        first, end = rectangle.first_block, rectangle.first_block + rectangle.num_blocks
        return Piece(
            group=rectangle.group,
            block_ids=request.block_tables[rectangle.group][first:end],
            first_layer=rectangle.first_layer,
            num_layers=rectangle.num_layers,
        )

    def take(self, transfer_id: bytes) -> Request | None:
        """The request of a transfer that is complete; None if it was dropped meanwhile."""
        return self._live.pop(transfer_id, None)

    def drop(self, engine: Engine, transfer_id: bytes) -> None:
        """Forget a transfer and free its blocks."""
        self._waiting = [item for item in self._waiting if item[0] != transfer_id]
        request = self._live.pop(transfer_id, None)
        if request is not None:
            engine.abort(request.key)
