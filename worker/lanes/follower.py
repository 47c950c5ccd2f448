"""A rank other than 0 of a worker with KV links: it opens lanes of its own, and moves its heads over them.

What it does for a link is told over that link's channel, and done by one thread; another one reads, and
closes the lanes when the channel ends, which ends whatever the first is blocked in. Only scatters come over
the channel of the engine's commands, between the forward passes where rank 0 has put them.

A gather needs no order with the forward passes: blocks may leave when rank 0 knows that they are written, and
rank 0 knows it from sums over all ranks, which each one joins behind its own writes. On a GPU such a sum is
done only when every rank's stream has come there, so those writes are complete, whatever stream then reads.

    python -m worker.lanes.follower COMMANDS_FD LINKS_FD
"""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from engine.parallel import follower
from engine.parallel.follower import Follower
from engine.parallel.wire import Channel, Message, Op, encode
from kvtransfer.errors import TransportBroken
from runtime import logs
from runtime.errors import TandemError
from worker.devices import use_apart
from worker.lanes.line import Line
from worker.lanes.opening import Opening
from worker.lanes.own import OwnLanes, Sends
from worker.lanes.stripes import Piece, to_arrays
from worker.lanes.transports import open_transport

logger = logging.getLogger(__name__)


class FollowerLinks:
    """See engine.parallel.follower.LinkService. `scatter` is the computing thread's."""

    def __init__(self, rank: Follower) -> None:
        self._rank = rank
        # By the number that rank 0 gave; added by the thread that takes links, removed by a link's own.
        self._links: dict[int, OwnLanes] = {}

    def begin(self, link: int, channel: Channel) -> None:
        """See LinkService."""
        lanes = self._links[link] = OwnLanes()
        served = FollowerLink(channel, lanes, self._rank, lambda: self._links.pop(link))
        threading.Thread(target=served.run, name=f"kv-lanes-{link}", daemon=True).start()

    def scatter(self, message: Message) -> bytes:
        """See LinkService."""
        (link, slab, first_layer, num_layers), block_ids = message.lists
        lanes = self._links.get(link)
        piece = Piece(group=0, block_ids=block_ids, first_layer=first_layer, num_layers=num_layers)
        checksums = {} if lanes is None else lanes.scatter(self._rank.pool, piece, slab)
        return encode(Op.SCATTERED, *to_arrays(checksums))


class FollowerLink:
    """One link's lanes on this rank, and the thread that does with them what rank 0 says."""

    def __init__(
        self, channel: Channel, lanes: OwnLanes, rank: Follower, on_end: Callable[[], object]
    ) -> None:
        self._lanes = lanes
        self._rank = rank
        self._on_end = on_end
        self._sends: deque[Sends] = deque()
        self._line = Line(channel, "tensor-parallel rank 0")
        self._line.watch(lambda reason: lanes.close())
        self._handlers: dict[Op, Callable[[Message], None]] = {
            Op.OPEN: self._open,
            Op.GATHER: self._gather,
            Op.SEND: self._send,
            Op.WAIT: self._wait,
            Op.RECV: self._recv,
        }

    def run(self) -> None:
        """Serve until the line ends or a lane breaks."""
        try:
            use_apart(self._rank.device)
            while True:
                message = self._line.receive(None)
                self._handlers[message.op](message)
        except TandemError as error:
            self._fail(error.message)
        except Exception:
            # A bug ends this link and nothing else; silence would hang it.
            logger.exception("a KV link's lanes failed")
            self._fail("internal error in a rank's lanes")
        finally:
            self._lanes.close()
            self._sends.clear()
            self._on_end()

    def _fail(self, reason: str) -> None:
        """Rank 0 closes the line then, which is what ends this link; from any thread."""
        with suppress(TransportBroken):
            self._line.send(Op.FAILED, payload=reason.encode())
        self._line.close()

    def _open(self, message: Message) -> None:
        opening = Opening.from_json(message.payload)
        transport = open_transport(opening, self._exchange, self._rank.device)
        self._lanes.add(opening, transport)
        transport.watch(self._fail)
        self._line.send(Op.OPENED)

    def _exchange(self, blob: bytes) -> bytes:
        self._line.send(Op.EXCHANGE, payload=blob)
        message = self._line.receive(None)
        assert message.op is Op.EXCHANGE, message.op
        return bytes(message.payload)

    def _gather(self, message: Message) -> None:
        (slab, first_layer, num_layers), block_ids = message.lists
        piece = Piece(group=0, block_ids=block_ids, first_layer=first_layer, num_layers=num_layers)
        self._line.send(Op.GATHERED, *to_arrays(self._lanes.gather(self._rank.pool, piece, slab)))

    def _send(self, message: Message) -> None:
        [(slab, size_index)] = message.lists
        self._sends.append(self._lanes.start_send(0, size_index, slab))

    def _wait(self, message: Message) -> None:
        self._sends.popleft().wait()
        self._line.send(Op.SENT)

    def _recv(self, message: Message) -> None:
        [(slab, size_index)] = message.lists
        self._lanes.recv(0, size_index, slab)
        self._line.send(Op.RECEIVED)


if __name__ == "__main__":
    code = follower.main(sys.argv[1:], FollowerLinks)
    logs.last_words()
    os._exit(code)  # threads that wait inside gloo cannot be joined
