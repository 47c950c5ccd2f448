"""What a process must know to open its end of a lane; it may be told by another rank."""

import json
from dataclasses import asdict, dataclass

from kvtransfer.head_plan import HeadRange
from kvtransfer.lanes import Lane


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One end of a lane before its transport."""

    transport: str
    """As the handshake has chosen it."""
    end: int
    """SENDER or RECEIVER of kvtransfer.lanes."""
    lane: Lane
    first_head: int
    """Of the lane's heads, among those that this process stores."""
    num_slabs: int
    """Of the receiver, and of both ends where they share them."""
    hostname: str
    """Address for sockets."""

    @property
    def heads(self) -> range:
        """The lane's, among those that this process stores."""
        return range(self.first_head, self.first_head + self.lane.heads.num_heads)

    def to_json(self) -> bytes:
        """As it travels from rank to rank."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, payload: bytes | bytearray) -> "Opening":
        """What `to_json` gave."""
        values = json.loads(payload)
        lane = values.pop("lane")
        sizes = {name: tuple(lane[name]) for name in ("stripe_sizes", "whole_sizes")}
        return cls(lane=Lane(**(lane | sizes | {"heads": HeadRange(**lane["heads"])})), **values)
