"""Which slab a frame has, on both ends alike: frame n of a link has slab n modulo their number.

A slab's credit goes back to the sender when its frame and all older ones are done, so that the sender knows
without being told which slab a credit is for. That is what lets both ends share the slabs' memory.
"""

from kvtransfer.actions import IncomingFrame


class SlabRing:
    """The receiver's slabs: owned by frames in the order of their headers, freed in the same order."""

    def __init__(self, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        # Frames that are not done, by number; all of them lie in [_oldest, _next).
        self._frames: dict[int, IncomingFrame] = {}
        self._oldest = 0
        self._next = 0

    @property
    def next_number(self) -> int:
        """Of the frame that comes next."""
        return self._next

    @property
    def next_slab(self) -> int:
        """The slab of the frame that comes next."""
        return self._next % self.num_slabs

    @property
    def num_free(self) -> int:
        """Slabs of which the sender has, or is owed, the credit."""
        return self.num_slabs - (self._next - self._oldest)

    @property
    def frames(self) -> tuple[IncomingFrame, ...]:
        """Those that own a slab and are not done."""
        return tuple(self._frames.values())

    def take(self, frame: IncomingFrame) -> None:
        """The next frame owns its slab from now on; there must be a free one."""
        assert self.num_free > 0
        assert (frame.number, frame.slab) == (self._next, self.next_slab)
        self._frames[frame.number] = frame
        self._next += 1

    def owns(self, frame: IncomingFrame) -> bool:
        """Whether this very frame still owns its slab."""
        return self._frames.get(frame.number) is frame

    def release(self, frame: IncomingFrame) -> int:
        """A frame is done; returns how many slabs that frees: none while an older frame is not done."""
        del self._frames[frame.number]
        before = self._oldest
        while self._oldest < self._next and self._oldest not in self._frames:
            self._oldest += 1
        return self._oldest - before

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self._next - self._oldest <= self.num_slabs
        assert all(self._oldest <= number < self._next for number in self._frames)
        assert self._oldest == self._next or self._oldest in self._frames
        assert all(frame.slab == number % self.num_slabs for number, frame in self._frames.items())
