"""Which cached blocks hold the draft model's KV as well: the draft may lag behind the target.

The target's KV alone decides whether a block is published. Where the draft's is missing, it is computed when
a draft is next asked for; it never decides what is emitted.
"""

from collections.abc import Iterable

from engine.request import Request


class DraftCoverage:
    """Published blocks, by their id in the target's group, whose draft KV is complete."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._covered: set[int] = set()

    @property
    def block_ids(self) -> set[int]:
        """All of them."""
        return self._covered

    def enter(self, request: Request, block_ids: Iterable[int]) -> None:
        """The request starts on these published blocks."""
        num_covered = 0
        for block_id in block_ids:
            if block_id not in self._covered:
                break
            num_covered += 1
        request.num_draft_computed_tokens = num_covered * self._block_size
        request.num_draft_published_blocks = num_covered

    def lags(self, request: Request) -> bool:
        """The draft has completed published blocks of the request that are not noted yet."""
        num_noted = request.num_draft_published_blocks
        return (
            request.num_draft_computed_tokens >= (num_noted + 1) * self._block_size
            and request.num_published_blocks > num_noted
        )

    def publish(self, request: Request) -> None:
        """Note the request's published blocks that its draft has meanwhile completed."""
        if self.lags(request):
            computed = request.num_draft_computed_tokens // self._block_size
            first, end = request.num_draft_published_blocks, min(request.num_published_blocks, computed)
            self._covered.update(request.block_tables[0][first:end])
            request.num_draft_published_blocks = end

    def exchange(self, request: Request, position: int, block_id: int) -> None:
        """The request's block at this position becomes a published one."""
        if block_id not in self._covered:
            start = position * self._block_size
            request.num_draft_computed_tokens = min(request.num_draft_computed_tokens, start)

    def arrive(self, request: Request, num_tokens: int) -> None:
        """Draft KV of the leading tokens came from outside, for the blocks that were not cached at admission.

        To be called before others are published.
        """
        if request.num_draft_computed_tokens >= request.num_published_blocks * self._block_size:
            request.num_draft_computed_tokens = num_tokens

    def drop(self, block_id: int) -> None:
        """The block is published no more."""
        self._covered.discard(block_id)
