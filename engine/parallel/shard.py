"""What one rank of a tensor-parallel group computes and stores. Arithmetic only.

Query heads, columns of the MLP and rows of the vocabulary are dealt out in equal runs, rank after rank. A KV
head goes with its query heads; with fewer KV heads than ranks, consecutive ranks store the same one.
"""

from dataclasses import dataclass, replace

from engine.facts import KvGroupSpec
from engine.models.config import LlamaConfig
from runtime.errors import StartupError


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`; the default is the whole model."""

    rank: int = 0
    size: int = 1

    def of(self, total: int) -> range:
        """This rank's run of `total` equal things; the last run may be shorter."""
        step = self.step(total)
        return range(min(self.rank * step, total), min((self.rank + 1) * step, total))

    def step(self, total: int) -> int:
        """Length of every run but the last."""
        return -(-total // self.size)

    def kv_heads(self, num_kv_heads: int) -> range:
        """KV heads that this rank stores."""
        first = self.rank * num_kv_heads // self.size
        return range(first, first + max(num_kv_heads // self.size, 1))

    def config(self, config: LlamaConfig) -> LlamaConfig:
        """Sizes of this rank's module, but for the rows of its embedding and of its output."""
        if self.size == 1:
            return config
        return replace(
            config,
            num_q_heads=len(self.of(config.num_q_heads)),
            num_kv_heads=len(self.kv_heads(config.num_kv_heads)),
            intermediate_size=len(self.of(config.intermediate_size)),
        )

    def kv_spec(self, spec: KvGroupSpec) -> KvGroupSpec:
        """Shape of the KV that this rank stores of a group."""
        return replace(spec, num_kv_heads=len(self.kv_heads(spec.num_kv_heads)))


WHOLE = Shard()


def require_divisible(config: LlamaConfig, size: int) -> None:
    """StartupError unless `size` ranks can share the model."""
    larger, smaller = max(config.num_kv_heads, size), min(config.num_kv_heads, size)
    without_rows = [rank for rank in range(size) if not Shard(rank, size).of(config.vocab_size)]
    checks = {
        f"num_attention_heads {config.num_q_heads} is no multiple of it": config.num_q_heads % size,
        f"intermediate_size {config.intermediate_size} is no multiple of it": config.intermediate_size % size,
        f"num_key_value_heads {config.num_kv_heads} is neither a multiple nor a divisor of it": larger
        % smaller,
        f"vocab_size {config.vocab_size} is too small for it": len(without_rows),
    }
    wrong = [reason for reason, remainder in checks.items() if remainder]
    if wrong:
        raise StartupError(f"--tensor-parallel-size {size}: {'; '.join(wrong)}")
