"""The prefix cache's index: a radix tree over full blocks.

Sources: RadixAttention (Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model
Programs") for the tree, vLLM for content keys of blocks and for eviction in the order of release.

The tree owns no memory. Who uses a block, and when a block goes, is the business of BlockTables; the tree
relies on two of its rules:

* a request that uses a block of the tree uses all blocks above it;
* a request lets go of its last blocks first.

So blocks without users become idle children first, and the block that has been idle longest is a leaf.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Optional

from engine.block_keys import BlockKey

BlockIds = tuple[int, ...]
"""The block of one position, in each KV group."""


class CachedBlock(NamedTuple):
    """One block of the tree."""

    key: BlockKey
    block_ids: BlockIds


@dataclass(eq=False, slots=True)
class Node:
    """A run of blocks of which only the last may have more than one successor."""

    parent: Optional["Node"]
    depth: int
    """Blocks above the run."""
    run: list[CachedBlock]
    """Empty in the root only."""
    children: dict[bytes, "Node"] = field(default_factory=dict)
    """By digest of the first block of their run."""

    @property
    def end(self) -> int:
        """Blocks from the root to the end of the run."""
        return self.depth + len(self.run)


class RadixCache:
    """Finds blocks by the content of the sequence that they end. Every block is in it at most once."""

    def __init__(self) -> None:
        self._root = Node(None, 0, [])
        self._owners: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, block_id: int) -> bool:
        """Whether this block of the first group is in the tree."""
        return block_id in self._owners

    def match(self, keys: Sequence[BlockKey]) -> list[BlockIds]:
        """The longest known prefix: the blocks of the first keys."""
        node, found = self._root, list[BlockIds]()
        for position, key in enumerate(keys):
            candidate = self._candidate(node, position, key.digest)
            if candidate is None or candidate.key != key:
                break
            found.append(candidate.block_ids)
            node = self._owners[candidate.block_ids[0]]
        return found

    def insert(self, position: int, above: int | None, key: BlockKey, block_ids: BlockIds) -> BlockIds | None:
        """The tree's block for this content: the one that is known, else the given one, now recorded.

        `above` is the block (of the first group) at position - 1, which is in the tree; None at the root.
        None if the digest names other content there: the first comer stays.
        """
        node = self._root if above is None else self._owners[above]
        candidate = self._candidate(node, position, key.digest)
        if candidate is None:
            self._add(node, position, CachedBlock(key, block_ids))
            return block_ids
        return candidate.block_ids if candidate.key == key else None

    def remove_leaf(self, block_id: int) -> BlockIds:
        """Forget a block without successors; its ids in all groups."""
        node = self._owners.pop(block_id)
        assert not node.children, f"block {block_id} has successors"
        removed = node.run.pop()
        assert removed.block_ids[0] == block_id, f"block {block_id} has successors"
        if not node.run:
            self._unhook(node, removed.key.digest)
        return removed.block_ids

    def remove_family(self, block_id: int) -> list[BlockIds]:
        """Forget all sequences that share the first block of this block's sequence; their blocks."""
        top = self._owners[block_id]
        while top.depth > 0:
            assert top.parent is not None
            top = top.parent
        self._unhook(top, top.run[0].key.digest)
        removed = [cached.block_ids for node in _subtree(top) for cached in node.run]
        for block_ids in removed:
            del self._owners[block_ids[0]]
        return removed

    def _candidate(self, node: Node, position: int, digest: bytes) -> CachedBlock | None:
        """The block at this position, in or below the node, whose digest is the given one."""
        if position < node.end:
            cached = node.run[position - node.depth]
            return cached if cached.key.digest == digest else None
        child = node.children.get(digest)
        return None if child is None else child.run[0]

    def _add(self, node: Node, position: int, cached: CachedBlock) -> None:
        if position < node.end:
            node = self._split(node, position)
        if node.run and not node.children:
            node.run.append(cached)
        else:
            child = Node(node, position, [cached])
            node.children[cached.key.digest] = child
            node = child
        self._owners[cached.block_ids[0]] = node

    def _split(self, node: Node, position: int) -> Node:
        """Give the blocks of the run before `position` to a new node above; the new node."""
        num_upper = position - node.depth
        assert node.parent is not None
        assert 0 < num_upper < len(node.run)
        upper = Node(node.parent, node.depth, node.run[:num_upper])
        node.parent.children[upper.run[0].key.digest] = upper
        node.parent, node.depth, node.run = upper, position, node.run[num_upper:]
        upper.children[node.run[0].key.digest] = node
        for cached in upper.run:
            self._owners[cached.block_ids[0]] = upper
        return upper

    def _unhook(self, node: Node, digest: bytes) -> None:
        assert node.parent is not None
        del node.parent.children[digest]

    def check(self) -> None:
        """Assert that runs, depths, parents and owners agree and that siblings differ."""
        owners: dict[int, Node] = {}
        for node in _subtree(self._root):
            assert bool(node.run) == (node is not self._root), "an empty run"
            owners |= {cached.block_ids[0]: node for cached in node.run}
            for digest, child in node.children.items():
                assert child.parent is node
                assert child.depth == node.end
                assert child.run[0].key.digest == digest
        assert owners == self._owners, "owners disagree with the tree"

    def links(self) -> Iterator[tuple[int, int]]:
        """Every block (of the first group) that has one above it, as (above, below)."""
        for node in _subtree(self._root):
            first = node.parent.run[-1:] if node.parent else []
            for above, below in pairwise([*first, *node.run]):
                yield above.block_ids[0], below.block_ids[0]


def _subtree(top: Node) -> Iterator[Node]:
    stack = [top]
    while stack:
        node = stack.pop()
        stack += node.children.values()
        yield node
