"""Slabs in host memory of two processes of one user on one host."""

from collections.abc import Sequence

from torch import Tensor

from kvtransfer.errors import TransportBroken
from kvtransfer.transports.segment import Segment, SegmentRefused


class HostSlabs:
    """See kvtransfer.transports.mapped.Exported. A write is seen by whoever was told of it after it."""

    def __init__(self, segment: Segment, num_slabs: int) -> None:
        self._segment = segment
        self.slabs: Sequence[Tensor] = segment.payload.view(num_slabs, -1).unbind()

    @property
    def address(self) -> bytes:
        """See Exported."""
        return self._segment.address

    def hide(self) -> None:
        """See Exported."""
        self._segment.hide()

    def written(self, slab: int) -> None:
        """See Memory: the header is posted after the write."""

    def readable(self, slab: int) -> bool:
        """See Memory: the header is read before the slab."""
        return True


class HostSharing:
    """See kvtransfer.transports.mapped.Sharing."""

    def export(self, num_slabs: int, slab_bytes: int) -> HostSlabs:
        """See Sharing."""
        try:
            return HostSlabs(Segment.create(num_slabs * slab_bytes), num_slabs)
        except OSError as error:
            raise TransportBroken(f"no memory to share: {error}") from error

    def open(self, address: bytes, num_slabs: int, slab_bytes: int) -> HostSlabs:
        """See Sharing."""
        try:
            return HostSlabs(Segment.open(address, num_slabs * slab_bytes), num_slabs)
        except SegmentRefused as error:
            raise TransportBroken(str(error)) from error
