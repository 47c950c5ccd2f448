"""Names and shapes of a Llama checkpoint's tensors, and which of them make up each weight of the module.

Fused projections are rows of one matrix: q, k and v; gate and up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.models.config import LlamaConfig

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Tensors that some checkpoints carry and nobody needs: they follow from config.json."""


class Part(NamedTuple):
    """[start, stop) along one dimension of a tensor."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that the checkpoint must have."""

    name: str
    shape: tuple[int, ...]
    part: Part | None = None
    """What is read of it; None: everything."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of what is read."""
        if self.part is None:
            return self.shape
        dim, start, stop = self.part
        return (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])

    @property
    def indices(self) -> tuple[slice, ...]:
        """The part as indices of the tensor; none: everything."""
        if self.part is None:
            return ()
        dim, start, stop = self.part
        return (*[slice(None)] * dim, slice(start, stop))


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the module: its sources, stacked along dimension 0."""

    name: str
    sources: tuple[SourceTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stacked weight."""
        shapes = [source.part_shape for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def kind(self) -> str:
        """Its name without layer number, "weight" and "bias": "qkv", "o", "norm", …"""
        return self.name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def weight_table(config: LlamaConfig) -> list[WeightSpec]:
    """Every weight of `Llama`, in the order of loading."""
    vocab, hidden = config.vocab_size, config.hidden_size
    table = [_single("embed", "model.embed_tokens.weight", vocab, hidden)]
    for layer in range(config.num_layers):
        table += _layer(config, f"layers.{layer}", f"model.layers.{layer}")
    table.append(_single("norm", "model.norm.weight", hidden))
    if not config.tie_word_embeddings:
        table.append(_single("lm_head", "lm_head.weight", vocab, hidden))
    return table


def is_ignored(name: str, config: LlamaConfig) -> bool:
    """Whether an extra tensor is harmless: derived values, or the copy of tied embeddings."""
    return name.endswith(IGNORED_SUFFIXES) or (name == "lm_head.weight" and config.tie_word_embeddings)


def _single(name: str, source: str, *shape: int) -> WeightSpec:
    return WeightSpec(name, (SourceTensor(source, shape),))


def _layer(config: LlamaConfig, name: str, source: str) -> Iterator[WeightSpec]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp_bias = config.mlp_bias
    yield _single(f"{name}.attention_norm", f"{source}.input_layernorm.weight", hidden)
    yield _single(f"{name}.mlp_norm", f"{source}.post_attention_layernorm.weight", hidden)
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    yield from _linear(f"{name}.qkv", source, qkv, hidden, config.qkv_bias)
    if config.qk_norm:
        for head in ("q_norm", "k_norm"):
            yield _single(f"{name}.{head}", f"{source}.self_attn.{head}.weight", config.head_dim)
    yield from _linear(f"{name}.o", source, {"self_attn.o_proj": hidden}, q, config.output_bias)
    yield from _linear(
        f"{name}.gate_up", source, {"mlp.gate_proj": mlp, "mlp.up_proj": mlp}, hidden, mlp_bias
    )
    yield from _linear(f"{name}.down", source, {"mlp.down_proj": hidden}, mlp, mlp_bias)


def _linear(
    name: str, source: str, out_features: dict[str, int], in_features: int, bias: bool
) -> Iterator[WeightSpec]:
    weights = [SourceTensor(f"{source}.{p}.weight", (out, in_features)) for p, out in out_features.items()]
    yield WeightSpec(f"{name}.weight", tuple(weights))
    if bias:
        biases = [SourceTensor(f"{source}.{p}.bias", (out,)) for p, out in out_features.items()]
        yield WeightSpec(f"{name}.bias", tuple(biases))
