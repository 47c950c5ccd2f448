"""All lanes of one epoch of a link, of all ranks of this worker, as rank 0's pump sees them.

Rank 0 tells the other ranks what it does with its own lanes, does that, and takes their answers. Payload
moves between the ranks of the two workers alone. One lane that breaks ends them all, here and on the other
ranks: the next epoch opens them anew.
"""

from collections import defaultdict
from collections.abc import Callable

import torch

from engine.kv_pool import LocalKvPool
from engine.parallel.errors import RankLost
from engine.parallel.ranks import Ranks
from engine.parallel.wire import Op
from kvtransfer.errors import TransportBroken
from kvtransfer.lanes import fold_stripes
from kvtransfer.transport import PendingSend
from kvtransfer.transports.nccl import START_TIMEOUT_S
from runtime.limits import LINK_TIMEOUT_S
from worker.lanes.line import Line
from worker.lanes.opening import Opening
from worker.lanes.own import OwnLanes, Sends
from worker.lanes.stripes import Piece, checksums_in
from worker.lanes.transports import Exchange, open_transport

ANSWER_TIMEOUT_S = LINK_TIMEOUT_S + 1.0
"""For another rank's answer; its own waits for its peer end before."""

OPEN_TIMEOUT_S = defaultdict(lambda: 2 * LINK_TIMEOUT_S + 1.0, {"nccl": START_TIMEOUT_S + 1.0})
"""The same of a lane that it opens, by transport."""


class LinkLanes:
    """See kvtransfer.transport.Carrier; `gather` and `scatter` are for whoever owns pump and engine."""

    def __init__(self, number: int, ranks: Ranks, pool: LocalKvPool) -> None:
        """`number`: by which the other ranks know the link. `open` each lane before anything else."""
        self._number = number
        self._ranks = ranks
        self._pool = pool
        self._own = OwnLanes()
        # By rank; those without a lane are not connected.
        self._lines: dict[int, Line] = {}
        self._num_lanes = 0

    @property
    def num_slabs(self) -> int:
        """See Carrier."""
        return self._own.num_slabs

    def open(self, opening: Opening, exchange: Exchange, device: torch.device) -> None:
        """Open the next lane, in this process or in another rank's; blocks. Raises TransportBroken."""
        self._num_lanes += 1
        rank = opening.lane.rank(opening.end)
        if rank == self._ranks.shard.rank:
            self._own.add(opening, open_transport(opening, exchange, device))
            return
        line = self._line(rank)
        line.send(Op.OPEN, payload=opening.to_json())
        while (message := line.receive(OPEN_TIMEOUT_S[opening.transport])).op is Op.EXCHANGE:
            line.send(Op.EXCHANGE, payload=exchange(bytes(message.payload)))
        assert message.op is Op.OPENED, message.op

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Carrier."""
        self._own.watch(broken)
        for line in self._lines.values():
            line.watch(broken)

    def gather(self, piece: Piece, slab: int) -> int:
        """Blocks to this slab of all lanes; the frame's checksum."""
        lines = self._taking(piece.group)
        for line in lines:
            line.send(Op.GATHER, [slab, piece.first_layer, piece.num_layers], list(piece.block_ids))
        checksums = self._own.gather(self._pool, piece, slab)
        for line in lines:
            checksums |= checksums_in(line.expect(Op.GATHERED, ANSWER_TIMEOUT_S))
        return fold_stripes(checksums)

    def start_send(self, group: int, size_index: int, slab: int) -> PendingSend:
        """See Carrier."""
        lines = self._taking(group)
        for line in lines:
            line.send(Op.SEND, [slab, size_index])
        return _Sending(self._own.start_send(group, size_index, slab), lines)

    def recv(self, group: int, size_index: int, slab: int) -> None:
        """See Carrier."""
        lines = self._taking(group)
        for line in lines:
            line.send(Op.RECV, [slab, size_index])
        self._own.recv(group, size_index, slab)
        for line in lines:
            line.expect(Op.RECEIVED, ANSWER_TIMEOUT_S)

    def scatter(self, piece: Piece, slab: int) -> int | None:
        """This slab of all lanes to blocks, and the frame's checksum; None if a rank has closed its lanes.

        For the engine's thread: the other ranks do it in the order of their commands. Raises RankLost.
        """
        lines = self._taking(piece.group)
        if lines:
            numbers = [self._number, slab, piece.first_layer, piece.num_layers]
            self._ranks.tell(Op.SCATTER, numbers, piece.block_ids)
        checksums = self._own.scatter(self._pool, piece, slab)
        for message in self._ranks.answers(Op.SCATTERED) if lines else ():
            checksums |= checksums_in(message)
        num_lanes = 1 if piece.group else self._num_lanes
        return fold_stripes(checksums) if len(checksums) == num_lanes else None

    def close(self) -> None:
        """See Carrier."""
        for line in self._lines.values():
            line.close()
        self._own.close()

    def _line(self, rank: int) -> Line:
        if rank not in self._lines:
            try:
                channel = self._ranks.connect(rank, self._number)
            except RankLost as error:
                raise TransportBroken(str(error)) from error
            self._lines[rank] = Line(channel, f"rank {rank}")
        return self._lines[rank]

    def _taking(self, group: int) -> list[Line]:
        """The other ranks that a group's frames concern."""
        return [] if group else list(self._lines.values())


class _Sending:
    """A frame on its way from all ranks; see PendingSend."""

    def __init__(self, own: Sends, lines: list[Line]) -> None:
        self._own = own
        self._lines = lines

    def wait(self) -> None:
        """See PendingSend."""
        for line in self._lines:
            line.send(Op.WAIT)
        self._own.wait()
        for line in self._lines:
            line.expect(Op.SENT, ANSWER_TIMEOUT_S)
