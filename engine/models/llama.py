"""Llama, Mistral and Qwen as one plain module: packed tokens in, hidden states out.

It knows nothing of checkpoints' names, of requests or of policy. Shapes: n rows of the batch, h hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.models.config import LlamaConfig
from engine.models.embedding import Embedding, PlainEmbedding
from engine.models.inputs import FinalRows
from engine.models.linear import Linear, linear
from engine.models.rope import RopeTables
from kernels import ops
from kernels.attention import AttentionBatch
from kernels.rope_store import HeadNorms


class LlamaLayer:
    """One decoder layer over the residual stream."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self._config = config
        self._attention_norm = weights[f"{prefix}.attention_norm"]
        self._mlp_norm = weights[f"{prefix}.mlp_norm"]
        self._head_norms: HeadNorms | None = None
        if config.qk_norm:
            q_norm, k_norm = weights[f"{prefix}.q_norm"], weights[f"{prefix}.k_norm"]
            self._head_norms = HeadNorms(q_norm, k_norm, config.rms_norm_eps)
        self.qkv, self.o, self.gate_up, self.down = (
            linear(weights[f"{prefix}.{name}.weight"], weights.get(f"{prefix}.{name}.bias"))
            for name in ("qkv", "o", "gate_up", "down")
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        rope: RopeTables,
        kv_layer: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        final: FinalRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, residual: [n, h], summed on entry. Returns this layer's output and the residual behind it.

        `final`: all rows leave their keys and values, only these rows go on.
        """
        eps = self._config.rms_norm_eps
        x = ops.add_rms_norm(x, residual, self._attention_norm, eps)
        q = self._project(x, positions, rope, kv_layer, slot_mapping)
        if final is not None:
            attention = final.attention
            q, residual = q.index_select(0, final.rows), residual.index_select(0, final.rows)
        attended = ops.paged_attention(q, kv_layer, attention, self._config.head_dim**-0.5)
        x = self.o.apply(attended.view(len(q), -1))
        x = ops.add_rms_norm(x, residual, self._mlp_norm, eps)
        return self.down.apply(ops.silu_mul(self.gate_up.apply(x))), residual

    def _project(
        self, x: Tensor, positions: Tensor, rope: RopeTables, kv_layer: Tensor, slot_mapping: Tensor
    ) -> Tensor:
        """Queries [n, num_q_heads, head_dim]; keys and values go into their slots."""
        heads = self.qkv.apply(x).view(len(x), -1, self._config.head_dim)
        ops.rope_store_kv(heads, positions, rope.cos, rope.sin, kv_layer, slot_mapping, self._head_norms)
        return heads[:, : self._config.num_q_heads]


class Llama:
    """Embedding, layers, final norm and output projection."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Tensor], rope: RopeTables) -> None:
        self.config = config
        self._rope = rope
        self.embed: Embedding = PlainEmbedding(weights["embed"])
        self._norm = weights["norm"]
        self.lm_head: Linear = linear(weights["embed" if config.tie_word_embeddings else "lm_head"])
        self.layers = [LlamaLayer(config, weights, f"layers.{i}") for i in range(config.num_layers)]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_group: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        final: FinalRows | None = None,
    ) -> Tensor:
        """Hidden states [n, h] after the final norm; writes the new tokens' KV into their slots.

        token_ids, positions: int64 [n]; kv_group: [num_layers, 2, num_blocks, block_size, num_kv_heads,
        head_dim]; slot_mapping: int64 [num_tokens <= n], rows beyond it, or with a negative slot,
        are padding. With `final` the result is [len(final.rows), h].
        """
        x = self.embed.lookup(token_ids)
        residual = torch.zeros_like(x)
        finals = [*[None] * (len(self.layers) - 1), final]
        for layer, kv_layer, only in zip(self.layers, kv_group, finals, strict=True):
            x, residual = layer.forward(
                x, residual, positions, self._rope, kv_layer, slot_mapping, attention, only
            )
        return ops.add_rms_norm(x, residual, self._norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [n, vocab_size] of hidden states [n, h]."""
        return self.lm_head.apply(hidden).float()
