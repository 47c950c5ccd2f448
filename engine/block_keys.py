"""What a full block holds, as a key: chained content hashes, as in vLLM's prefix caching."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

HashFunction = Callable[[bytes], bytes]


class BlockKey(NamedTuple):
    """Names the content of one block of a sequence.

    The digest finds it. Equal keys behind equal keys mean equal content, whatever the hash is worth.
    """

    digest: bytes
    """Hash of the preceding block's digest, `extra` and the token ids; covers the sequence up to here."""
    extra: bytes
    """What the KV depends on, or who may share it, beside the tokens: the request's salt."""
    token_ids: tuple[int, ...]


class Keyed(Protocol):
    """A sequence of tokens that has keys."""

    cache_salt: bytes
    block_keys: list[BlockKey]
    """Keys of leading full blocks, as far as they were asked for."""

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions start..end-1; they never change."""
        ...


KeyFunction = Callable[[Keyed, int], Sequence[BlockKey]]
"""Keys of the first `num_blocks` blocks of a sequence, which are full; none if it is never shared."""


def sha256(content: bytes) -> bytes:
    """The hash of block keys: nobody can make two prompts that share it."""
    return hashlib.sha256(content).digest()


def content_keys(block_size: int, hash_function: HashFunction = sha256) -> KeyFunction:
    """Keys by content. Each is computed once and kept by its sequence."""

    def keys(sequence: Keyed, num_blocks: int) -> Sequence[BlockKey]:
        known = sequence.block_keys
        for start in range(len(known) * block_size, num_blocks * block_size, block_size):
            above = known[-1].digest if known else b""
            token_ids = sequence.tokens(start, start + block_size)
            # Of fixed width, so that no two lists of tokens give the same bytes.
            content = above + sequence.cache_salt + array("q", token_ids).tobytes()
            known.append(BlockKey(hash_function(content), sequence.cache_salt, tuple(token_ids)))
        return known[:num_blocks]

    return keys


def no_keys(sequence: Keyed, num_blocks: int) -> Sequence[BlockKey]:
    """Nothing is ever found or kept: the prefix cache is off."""
    return ()
