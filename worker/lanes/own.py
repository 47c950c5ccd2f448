"""The lanes of one link that end in this process: their transports, whose slabs serve a pool."""

import threading
from collections.abc import Callable, Sequence

from engine.kv_pool import LocalKvPool
from kvtransfer.errors import TransportBroken
from kvtransfer.transport import PendingSend, Transport
from worker.lanes.opening import Opening
from worker.lanes.stripes import Piece


class OwnLanes:
    """See kvtransfer.transport.Carrier for who calls what; stripes are told apart by their lane's number.

    Closed, it holds no slabs: their memory goes with the last thread that is about to use it.
    """

    def __init__(self) -> None:
        self.num_slabs = 0
        """Of each lane; they are of one kind."""
        # Guards the others.
        self._lock = threading.Lock()
        self._lanes: list[tuple[Opening, Transport]] = []
        self._closed = False

    def add(self, opening: Opening, transport: Transport) -> None:
        """One more, which is closed with the others. TransportBroken if they have been."""
        self.num_slabs = len(transport.slabs)
        with self._lock:
            if not self._closed:
                self._lanes.append((opening, transport))
                return
        transport.close()
        raise TransportBroken("closed")

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Carrier."""
        for _, transport in self._open_lanes(0):
            transport.watch(broken)

    def gather(self, pool: LocalKvPool, piece: Piece, slab: int) -> dict[int, int]:
        """Blocks to this slab of the lanes; the stripes' checksums."""
        return _copied(pool.gather, self._open_lanes(piece.group), piece, slab)

    def scatter(self, pool: LocalKvPool, piece: Piece, slab: int) -> dict[int, int]:
        """This slab of the lanes to blocks; the stripes' checksums, and none of closed lanes.

        For the engine's thread.
        """
        return _copied(pool.scatter, self._lanes_of(piece.group), piece, slab)

    def start_send(self, group: int, size_index: int, slab: int) -> "Sends":
        """See Carrier."""
        return Sends(
            [
                transport.start_send(transport.slabs[slab][: opening.lane.num_bytes(group, size_index)])
                for opening, transport in self._open_lanes(group)
            ]
        )

    def recv(self, group: int, size_index: int, slab: int) -> None:
        """See Carrier."""
        for opening, transport in self._open_lanes(group):
            transport.recv(transport.slabs[slab][: opening.lane.num_bytes(group, size_index)])

    def close(self) -> None:
        """See Carrier."""
        with self._lock:
            self._closed = True
            lanes, self._lanes = self._lanes, []
        for _, transport in lanes:
            transport.close()

    def _open_lanes(self, group: int) -> list[tuple[Opening, Transport]]:
        lanes = self._lanes_of(group)
        if self._closed:
            raise TransportBroken("closed")
        return lanes

    def _lanes_of(self, group: int) -> list[tuple[Opening, Transport]]:
        """The lanes that a group's frames take; none if closed."""
        with self._lock:
            return [lane for lane in self._lanes if lane[0].lane.carries(group)]


def _copied(
    copy: Callable[..., int], lanes: list[tuple[Opening, Transport]], piece: Piece, slab: int
) -> dict[int, int]:
    blocks = (piece.group, piece.block_ids, piece.first_layer, piece.num_layers)
    return {
        opening.lane.number: copy(*blocks, transport.slabs[slab], None if piece.group else opening.heads)
        for opening, transport in lanes
    }


class Sends:
    """A frame's stripes on their way; see PendingSend."""

    def __init__(self, pending: Sequence[PendingSend]) -> None:
        self._pending = pending

    def wait(self) -> None:
        """See PendingSend."""
        for each in self._pending:
            each.wait()
