"""What a Llama-family config.json says, checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.json_reader import JsonReader
from engine.models.rope import RopeParams, parse_rope
from runtime.errors import CheckpointError

ARCHITECTURES: Mapping[str, str] = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""model_type -> architecture. Mistral without a sliding window is Llama with an explicit head_dim."""


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
    attention_bias: bool
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
    if model_type not in ARCHITECTURES:
        raise reader.error("model_type", f"expected one of {sorted(ARCHITECTURES)}, got {model_type!r}")
    architectures = reader.values.get("architectures") or [ARCHITECTURES[model_type]]
    if architectures != [ARCHITECTURES[model_type]]:
        expected = f"expected [{ARCHITECTURES[model_type]!r}], got {architectures!r}"
        raise reader.error("architectures", expected)
    for key in ("quantization_config", "sliding_window", "partial_rotary_factor"):
        if reader.values.get(key) not in (None, 1.0):
            raise reader.error(key, f"not supported, expected none, got {reader.values[key]!r}")
    activation = reader.values.get("hidden_act", "silu")
    if activation != "silu":
        raise reader.error("hidden_act", f"expected 'silu', got {activation!r}")


def _parse(reader: JsonReader, eos_token_ids: tuple[int, ...]) -> LlamaConfig:
    hidden_size = reader.size("hidden_size")
    num_q_heads = reader.size("num_attention_heads")
    num_kv_heads = reader.size("num_key_value_heads", num_q_heads)
    head_dim = reader.size("head_dim", hidden_size // num_q_heads)
    if num_q_heads % num_kv_heads:
        raise reader.error("num_key_value_heads", f"expected a divisor of {num_q_heads}, got {num_kv_heads}")
    if head_dim % 2 or head_dim == 0:
        raise reader.error("head_dim", f"expected an even number, got {head_dim}")
    max_position_embeddings = reader.size("max_position_embeddings")
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
        attention_bias=reader.flag("attention_bias", False),
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
