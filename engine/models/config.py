"""What a Llama-family config.json says, checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.json_reader import JsonReader
from engine.models.rope import RopeParams, parse_rope
from runtime.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a model_type means where config.json is silent."""

    architecture: str
    qkv_bias: bool = False
    """The query, key and value projections always have a bias, the output projection never has."""
    qk_norm: bool = False
    """Each query and key head is normalised before its rotation."""
    head_dim: int | None = None
    """Where config.json has none; None: hidden_size / num_attention_heads."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(architecture="MistralForCausalLM"),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}
"""By model_type. Mistral without a sliding window is Llama with an explicit head_dim."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of a Llama-family decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Of attention's output projection."""
    qk_norm: bool
    """Each query and key head has an RMS norm before its rotation."""
    mlp_bias: bool
    rope: RopeParams
    eos_token_ids: tuple[int, ...]

    @property
    def max_supported_len(self) -> int:
        """Longest context that the rotary embedding is made for."""
        return self.rope.max_supported_len(self.max_position_embeddings)


def read_config(path: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """Parse `config.json` (and the end tokens of `generation_config.json`) of a checkpoint directory.

    Returns the config and the raw JSON object; raises CheckpointError.
    """
    reader = JsonReader.open(path / "config.json")
    _check_supported(reader)
    return _parse(reader, _eos_token_ids(path, reader)), dict(reader.values)


def canonical_json(value: Any) -> str:
    """The same text for equal JSON values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _check_supported(reader: JsonReader) -> None:
    model_type = reader.text("model_type")
    if model_type not in FAMILIES:
        raise reader.error("model_type", f"expected one of {sorted(FAMILIES)}, got {model_type!r}")
    expected = [FAMILIES[model_type].architecture]
    architectures = reader.values.get("architectures") or expected
    if architectures != expected:
        raise reader.error("architectures", f"expected {expected!r}, got {architectures!r}")
    unsupported = ["quantization_config", "partial_rotary_factor"]
    # Qwen's configurations name a window that is not in use.
    if reader.flag("use_sliding_window", True):
        unsupported.append("sliding_window")
    for key in unsupported:
        if reader.values.get(key) not in (None, 1.0):
            raise reader.error(key, f"not supported, expected none, got {reader.values[key]!r}")
    activation = reader.values.get("hidden_act", "silu")
    if activation != "silu":
        raise reader.error("hidden_act", f"expected 'silu', got {activation!r}")


def _parse(reader: JsonReader, eos_token_ids: tuple[int, ...]) -> LlamaConfig:
    family = FAMILIES[reader.text("model_type")]
    hidden_size = reader.size("hidden_size")
    num_q_heads = reader.size("num_attention_heads")
    num_kv_heads = reader.size("num_key_value_heads", num_q_heads)
    head_dim = reader.size("head_dim", family.head_dim or hidden_size // num_q_heads)
    if num_q_heads % num_kv_heads:
        raise reader.error("num_key_value_heads", f"expected a divisor of {num_q_heads}, got {num_kv_heads}")
    if head_dim % 2 or head_dim == 0:
        raise reader.error("head_dim", f"expected an even number, got {head_dim}")
    max_position_embeddings = reader.size("max_position_embeddings")
    attention_bias = reader.flag("attention_bias", False)
    return LlamaConfig(
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or family.qkv_bias,
        output_bias=attention_bias and not family.qkv_bias,
        qk_norm=family.qk_norm,
        mlp_bias=reader.flag("mlp_bias", False),
        rope=parse_rope(reader, max_position_embeddings),
        eos_token_ids=eos_token_ids,
    )


def _eos_token_ids(path: Path, config: JsonReader) -> tuple[int, ...]:
    """generation_config.json's word counts, as in transformers; config.json's if it is silent."""
    reader = config
    if (path / "generation_config.json").is_file():
        generation = JsonReader.open(path / "generation_config.json")
        if generation.values.get("eos_token_id") is not None:
            reader = generation
    value = reader.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise CheckpointError(reader.file, "eos_token_id", f"expected token ids, got {value!r}")
    return tuple(ids)
