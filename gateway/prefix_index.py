"""Which worker has probably computed which prefix. Pure; a hint for the router, never a promise.

A prefix is a chain of hashes, one per full block, each over everything up to that block's end. The index
remembers the chains that were sent to a worker, least recently sent forgotten first, as the worker's own
cache does. It may be wrong both ways: workers evict by other rules, and serve other gateways too.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

MAX_BLOCKS = 1 << 16
"""Most blocks that are remembered of one worker; about 8 MB."""

HASH_BYTES = 8

Chain = Sequence[bytes]


def prefix_chain(token_ids: Sequence[int], salt: str, block_size: int) -> list[bytes]:
    """A hash for each full block of a sequence; sequences with different salts share none."""
    above, chain = salt.encode(), []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        content = above + array("q", token_ids[start : start + block_size]).tobytes()
        above = hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
        chain.append(above)
    return chain


class PrefixIndex:
    """The chains of each boot of a worker, bounded."""

    def __init__(self) -> None:
        self._known: dict[str, OrderedDict[bytes, None]] = {}

    def add(self, boot_id: str, chain: Chain, max_blocks: int = MAX_BLOCKS) -> None:
        """A worker computes, or receives, this prefix; its pool holds `max_blocks` blocks."""
        known = self._known.setdefault(boot_id, OrderedDict())
        # The first block last: what is forgotten is always the end of a chain.
        for block_hash in reversed(chain):
            known[block_hash] = None
            known.move_to_end(block_hash)
        while len(known) > min(max_blocks, MAX_BLOCKS):
            known.popitem(last=False)

    def overlap(self, boot_id: str, chain: Chain) -> int:
        """How many leading blocks of the chain the worker probably has."""
        known = self._known.get(boot_id, OrderedDict())
        return next((n for n, block_hash in enumerate(chain) if block_hash not in known), len(chain))

    def forget(self, boot_id: str) -> None:
        """The worker's process has ended, and its cache with it."""
        self._known.pop(boot_id, None)

    def check(self) -> None:
        """Assert the bound."""
        assert all(len(known) <= MAX_BLOCKS for known in self._known.values())
