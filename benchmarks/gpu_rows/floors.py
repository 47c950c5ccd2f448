"""What a step cannot be faster than: each weight and each key and value is read once, every multiplication is
made at the rate of a large matrix product; activations are free."""

from dataclasses import dataclass, replace
from typing import Any

BYTES = 2
"""Of a weight, and of a key or value: bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder with SwiGLU, as far as its cost goes."""

    model_type: str
    num_layers: int
    hidden: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    rope_theta: float = 500_000.0

    @property
    def body_params(self) -> int:
        """Of the linear layers between embedding and output projection."""
        attention = (2 * self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden
        return self.num_layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def streamed_params(self) -> int:
        """Read in each decode step: the body and the output projection."""
        return self.body_params + self.vocab * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES

    def config(self, max_model_len: int) -> dict[str, Any]:
        """A Hugging Face config.json of this shape."""
        architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.model_type]
        return {
            "architectures": [architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_q_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": max_model_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "8B": Shape(
        model_type="llama", num_layers=32, hidden=4096, num_q_heads=32, num_kv_heads=8, head_dim=128,
        mlp=14336, vocab=128_256, tied=False,
    ),
    "1B": Shape(
        model_type="llama", num_layers=16, hidden=2048, num_q_heads=32, num_kv_heads=8, head_dim=64,
        mlp=8192, vocab=128_256, tied=True,
    ),
    "0.6B": Shape(
        model_type="qwen3", num_layers=28, hidden=1024, num_q_heads=16, num_kv_heads=8, head_dim=128,
        mlp=3072, vocab=151_936, tied=True, rope_theta=1e6,
    ),
}  # fmt: skip
"""Llama 3 8B, Llama 3.2 1B, Qwen3 0.6B."""


def tiny(shape: Shape) -> Shape:
    """The same kind of model at a size for a rehearsal."""
    return replace(
        shape, num_layers=2, hidden=64, num_q_heads=4, num_kv_heads=2, head_dim=16, mlp=96, vocab=512
    )


def decode_bytes(shape: Shape, batch: int, context_len: float) -> float:
    """Weights once; of each request its context and the new token."""
    kv_bytes = batch * (context_len + 1) * shape.kv_bytes_per_token
    return shape.streamed_params * BYTES + kv_bytes


def decode_flops(shape: Shape, batch: int) -> float:
    """Of the linear layers."""
    return 2.0 * shape.streamed_params * batch


def prefill_flops(shape: Shape, num_tokens: int) -> float:
    """Linear layers, causal attention, and the logits of the last token."""
    attention = 4 * shape.num_layers * shape.num_q_heads * shape.head_dim
    pairs = num_tokens * (num_tokens + 1) / 2
    return 2.0 * (shape.body_params * num_tokens + shape.vocab * shape.hidden) + attention * pairs


def attention_flops(shape: Shape, num_tokens: int) -> float:
    """Of one layer over a whole prompt, causal."""
    return 4.0 * shape.num_q_heads * shape.head_dim * num_tokens * (num_tokens + 1) / 2
