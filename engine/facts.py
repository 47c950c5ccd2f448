"""What is known of a model before its weights are read, and what two workers must share."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class KvGroupSpec:
    """Layers whose KV has one shape."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values in all layers."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What peers compare before KV moves between them, and what a gateway must know."""

    model_hash: str
    """Hex; see `engine.safetensors_dir.content_hash` for what it covers."""
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    rope: str
    """Canonical JSON of everything that the rotary tables are made of."""
    kv_groups: tuple[KvGroupSpec, ...]
