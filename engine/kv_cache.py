"""The preallocated KV tensors of a worker, one per group, and the tables that hand out their blocks."""

import torch
from torch import Tensor

from engine.block_keys import content_keys, no_keys
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.host_kv import HostKv
from engine.loader import KvGroupSpec, ModelFacts
from engine.swap_space import SwapSpace
from kernels import ops
from runtime.errors import StartupError


class KvCache:
    """Memory for keys and values; nobody but the engine's thread writes into it."""

    def __init__(self, config: EngineConfig, facts: ModelFacts) -> None:
        num_blocks, block_bytes = pool_size(config, facts), bytes_per_block(config, facts)
        device = torch.device(config.device)
        self.groups = [_allocate(spec, num_blocks, config.block_size, device) for spec in facts.kv_groups]
        """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] each, contiguous."""
        self.tables = BlockTables(
            num_groups=len(self.groups),
            num_blocks=num_blocks,
            block_size=config.block_size,
            keys=content_keys(config.block_size) if config.prefix_cache else no_keys,
            copy_blocks=lambda group, *blocks: ops.copy_blocks(self.groups[group], *blocks),
        )
        num_slots = 0 if config.preemption_mode == "recompute" else config.swap_space_bytes // block_bytes
        self.swap_space = SwapSpace(self.tables, HostKv(self.groups, num_slots), num_slots=num_slots)


def bytes_per_block(config: EngineConfig, facts: ModelFacts) -> int:
    """Bytes of one block in all groups together."""
    return config.block_size * sum(spec.bytes_per_token for spec in facts.kv_groups)


def pool_size(config: EngineConfig, facts: ModelFacts) -> int:
    """Blocks of the pool; StartupError if it does not hold one request of the model's longest length."""
    block_bytes = bytes_per_block(config, facts)
    num_blocks = config.num_blocks or config.kv_cache_memory_bytes // block_bytes
    needed = -(-facts.max_model_len // config.block_size)
    if num_blocks < needed:
        raise StartupError(
            f"--kv-cache-memory: {num_blocks} blocks hold {num_blocks * config.block_size} tokens, but one "
            f"request of --max-model-len {facts.max_model_len} needs {needed * block_bytes} bytes"
        )
    return num_blocks


def _allocate(spec: KvGroupSpec, num_blocks: int, block_size: int, device: torch.device) -> Tensor:
    """Not filled: a CPU maps memory when it is touched, and slots are read only after they are written."""
    shape = (spec.num_layers, 2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
