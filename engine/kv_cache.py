"""The preallocated KV tensors of a worker, one per group, and the tables that hand out their blocks."""

import torch

from engine.block_keys import content_keys, no_keys
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.facts import ModelFacts
from engine.kv_pool import LocalKvPool
from engine.parallel.ranks import ONE_RANK, Ranks
from engine.parallel.shard import WHOLE, Shard
from engine.swap_space import SwapSpace
from runtime.errors import StartupError

CPU_POOL_BYTES = 1 << 30
"""Memory of a pool on a CPU whose size nobody names."""


class KvCache:
    """Memory for keys and values; nobody but the engine's thread writes into it."""

    def __init__(self, config: EngineConfig, facts: ModelFacts, ranks: Ranks = ONE_RANK) -> None:
        num_blocks = pool_size(config, facts, ranks.shard)
        num_slots = 0
        if config.preemption_mode != "recompute":
            num_slots = config.swap_space_bytes // bytes_per_block(config, facts, ranks.shard)
        target, *others = facts.kv_groups
        local = LocalKvPool(
            [ranks.shard.kv_spec(target), *others],
            num_blocks=num_blocks,
            block_size=config.block_size,
            num_host_blocks=num_slots,
            device=torch.device(config.device),
        )
        self.pool = ranks.lead_pool(local)
        self.groups = self.pool.groups
        """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] each, contiguous; of the first, the
        heads of this rank."""
        self.tables = BlockTables(
            num_groups=len(self.groups),
            num_blocks=num_blocks,
            block_size=config.block_size,
            keys=content_keys(config.block_size) if config.prefix_cache else no_keys,
            copy_blocks=self.pool.copy,
        )
        self.swap_space = SwapSpace(self.tables, self.pool, num_slots=num_slots)


def bytes_per_block(config: EngineConfig, facts: ModelFacts, shard: Shard = WHOLE) -> int:
    """Bytes of one block in all groups and on all ranks together."""
    target, *others = facts.kv_groups
    token_bytes = shard.size * shard.kv_spec(target).bytes_per_token
    return config.block_size * (token_bytes + sum(spec.bytes_per_token for spec in others))


def pool_size(config: EngineConfig, facts: ModelFacts, shard: Shard = WHOLE) -> int:
    """Blocks of the pool; StartupError if it does not hold one request of the model's longest length."""
    block_bytes = bytes_per_block(config, facts, shard)
    num_blocks = config.num_blocks or (config.kv_cache_memory_bytes or CPU_POOL_BYTES) // block_bytes
    needed = -(-facts.max_model_len // config.block_size)
    if num_blocks < needed:
        raise StartupError(
            f"--kv-cache-memory: {num_blocks} blocks hold {num_blocks * config.block_size} tokens, but one "
            f"request of --max-model-len {facts.max_model_len} needs {needed * block_bytes} bytes"
        )
    return num_blocks
