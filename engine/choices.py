"""Several continuations of one prompt: the prompt is computed once, its blocks are shared by reference.

1. `fan_out` gives a request its forks before it is submitted. It leads them: it computes the prompt, or its
   KV comes from outside, and takes as many seats as it has forks.
2. With its prompt computed, the first tokens of all forks are drawn from the one row of logits, each with
   the noise of its own choice; `Scheduler` starts the forks on the leader's blocks and frees the leader's.
3. A block that several forks hold is never written: `BlockTables.grow` copies the one at the cursor.
4. Forks are scheduled, preempted and finished one by one; aborting the leader's key ends them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.block_table import BlockTable
from engine.block_tables import BlockTables
from engine.request import Request, RequestState


def fan_out(leader: Request, emitted: Mapping[int, Sequence[int]]) -> None:
    """Let choices go on from a request's prompt: by choice, the tokens that earlier attempts emitted."""
    assert not leader.output_token_ids, "what a leader has emitted belongs to its choices"
    leader.forks = [
        replace(
            leader,
            output_token_ids=list(token_ids),
            prefill_only=False,
            choice=choice,
            forks=[],
            leader=leader,
            search=None,
            block_tables=[],
            block_keys=[],
            state=RequestState.NEW,
        )
        for choice, token_ids in emitted.items()
    ]


def share_blocks(tables: BlockTables, source: Request, target: Request) -> None:
    """Let a request that holds nothing hold the same blocks, computed alike."""
    assert not target.block_tables
    for pool, table in zip(tables.pools, source.block_tables, strict=True):
        pool.share(table)
    target.block_tables = [BlockTable(table) for table in source.block_tables]
    target.num_computed_tokens = source.num_computed_tokens
    target.num_cached_tokens = source.num_cached_tokens
    target.num_published_blocks = source.num_published_blocks
    target.num_draft_computed_tokens = source.num_draft_computed_tokens
    target.num_draft_published_blocks = source.num_draft_published_blocks
    target.block_keys = list(source.block_keys)


def select_blocks(tables: BlockTables, requests: Sequence[Request], sources: Sequence[int]) -> None:
    """Let each request hold the blocks of requests[source] for its source instead of its own, all at once."""
    before = [replace(request) for request in requests]
    for request, source in zip(requests, sources, strict=True):
        request.block_tables = []
        share_blocks(tables, before[source], request)
    for request in before:
        tables.free(request)
