"""Which part of each stored tensor a rank reads: a pass over the weight table.

Column-parallel weights are cut by output rows (q, k and v by heads, gate and up each by the same columns of
the MLP); row-parallel ones (o, down) by input columns. Embedding and lm_head are cut by the same rows of the
vocabulary, so that they may be one tensor. A row-parallel bias is added once, by rank 0. The norms are whole
on every rank.
"""

from collections.abc import Sequence
from dataclasses import replace

from engine.models.config import LlamaConfig
from engine.models.llama_weights import Part, SourceTensor, WeightSpec
from engine.parallel.shard import Shard

ROW_PARALLEL = ("o", "down")


def cut(table: Sequence[WeightSpec], config: LlamaConfig, shard: Shard) -> list[WeightSpec]:
    """The weights of one rank, in the order of the table."""
    kept = [spec for spec in table if shard.rank == 0 or not _is_row_parallel_bias(spec)]
    return [replace(spec, sources=_parts(spec, config, shard)) for spec in kept]


def _is_row_parallel_bias(spec: WeightSpec) -> bool:
    return spec.kind in ROW_PARALLEL and len(spec.sources[0].shape) == 1


def _parts(spec: WeightSpec, config: LlamaConfig, shard: Shard) -> tuple[SourceTensor, ...]:
    ranges = _ranges(spec.kind, config, shard)
    if not ranges or _is_row_parallel_bias(spec):
        return spec.sources
    dim = 1 if spec.kind in ROW_PARALLEL else 0
    return tuple(
        replace(source, part=Part(dim, piece.start, piece.stop)) if len(piece) < source.shape[dim] else source
        for source, piece in zip(spec.sources, ranges, strict=True)
    )


def _ranges(kind: str, config: LlamaConfig, shard: Shard) -> list[range]:
    """Along the cut dimension, one for each source; none for a weight that is not cut."""
    q = _elements(shard.of(config.num_q_heads), config.head_dim)
    kv = _elements(shard.kv_heads(config.num_kv_heads), config.head_dim)
    mlp, vocab = shard.of(config.intermediate_size), shard.of(config.vocab_size)
    return {
        "qkv": [q, kv, kv],
        "o": [q],
        "gate_up": [mlp, mlp],
        "down": [mlp],
        "embed": [vocab],
        "lm_head": [vocab],
    }.get(kind, [])


def _elements(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
