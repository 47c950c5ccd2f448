"""The lanes of one link that end in this process: their transports, whose slabs serve a pool."""

import threading
from collections.abc import Callable, Sequence

from engine.kv_pool import LocalKvPool
from kvtransfer.errors import TransportBroken
from kvtransfer.transport import PendingSend, Transport
from worker.lanes.opening import Opening
from worker.lanes.stripes import Piece


class OwnLanes:
    """See kvtransfer.transport.Carrier for who calls what; stripes are told apart by their lane's number."""

    def __init__(self) -> None:
        self._lanes: list[tuple[Opening, Transport]] = []
        self._closing = threading.Lock()
        self._closed = False

    @property
    def num_slabs(self) -> int:
        """Of each lane; they are of one kind. There is a lane."""
        return len(self._lanes[0][1].slabs)

    def add(self, opening: Opening, transport: Transport) -> None:
        """One more, which is closed with the others. TransportBroken if they have been."""
        with self._closing:
            self._lanes.append((opening, transport))
            if not self._closed:
                return
        transport.close()
        raise TransportBroken("closed")

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Carrier."""
        for _, transport in self._lanes:
            transport.watch(broken)

    def gather(self, pool: LocalKvPool, piece: Piece, slab: int) -> dict[int, int]:
        """Blocks to this slab of the lanes; the stripes' checksums."""
        return self._copied(pool.gather, piece, slab)

    def scatter(self, pool: LocalKvPool, piece: Piece, slab: int) -> dict[int, int]:
        """This slab of the lanes to blocks; the stripes' checksums. For the engine's thread."""
        return self._copied(pool.scatter, piece, slab)

    def _copied(self, copy: Callable[..., int], piece: Piece, slab: int) -> dict[int, int]:
        blocks = (piece.group, piece.block_ids, piece.first_layer, piece.num_layers)
        return {
            opening.lane.number: copy(*blocks, transport.slabs[slab], heads)
            for opening, transport, heads in self._taking(piece.group)
        }

    def start_send(self, group: int, size_index: int, slab: int) -> "Sends":
        """See Carrier."""
        return Sends(
            [
                transport.start_send(transport.slabs[slab][: opening.lane.num_bytes(group, size_index)])
                for opening, transport, _ in self._taking(group)
            ]
        )

    def recv(self, group: int, size_index: int, slab: int) -> None:
        """See Carrier."""
        for opening, transport, _ in self._taking(group):
            transport.recv(transport.slabs[slab][: opening.lane.num_bytes(group, size_index)])

    def close(self) -> None:
        """See Carrier."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            lanes = list(self._lanes)
        for _, transport in lanes:
            transport.close()

    def _taking(self, group: int) -> list[tuple[Opening, Transport, range | None]]:
        """The lanes that a group's frames take, and the heads that they take there."""
        return [
            (opening, transport, None if group else opening.heads)
            for opening, transport in self._lanes
            if opening.lane.carries(group)
        ]


class Sends:
    """A frame's stripes on their way; see PendingSend."""

    def __init__(self, pending: Sequence[PendingSend]) -> None:
        self._pending = pending

    def wait(self) -> None:
        """See PendingSend."""
        for each in self._pending:
            each.wait()
