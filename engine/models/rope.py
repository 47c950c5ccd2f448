"""Rotary position embeddings: the scalings that Llama checkpoints name, as tables of cos and sin."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.models.json_reader import JsonReader

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class RopeParams:
    """A rope type with its numbers, defaults filled in."""

    rope_type: str
    theta: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Of the type: factor, low_freq_factor, attention_factor, …"""

    def max_supported_len(self, max_position_embeddings: int) -> int:
        """Longest context; scaled types reach `factor` times the length of their training."""
        if self.rope_type not in ("linear", "dynamic", "yarn"):
            return max_position_embeddings
        original = self.numbers.get("original_max_position_embeddings", max_position_embeddings)
        return max(max_position_embeddings, int(self.numbers["factor"] * original))

    def facts(self, head_dim: int, max_position_embeddings: int, max_model_len: int) -> dict[str, Any]:
        """Everything that the tables are made of, as JSON; equal facts mean KV that fits together."""
        facts = {"rope_type": self.rope_type, "rope_theta": self.theta, "head_dim": head_dim, **self.numbers}
        if self.rope_type == "dynamic":
            facts |= {"max_model_len": max_model_len, "max_position_embeddings": max_position_embeddings}
        return facts


@dataclass(frozen=True, kw_only=True)
class RopeTables:
    """cos and sin of every position, scaled by the attention factor; fp32 [max_model_len, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


def parse_rope(config: JsonReader, max_position_embeddings: int) -> RopeParams:
    """From `rope_parameters`, or the older `rope_scaling` with `rope_theta` beside it."""
    reader = config.nested("rope_scaling") or config.nested("rope_parameters")
    theta = config.number("rope_theta", DEFAULT_THETA)
    if reader is None:
        return RopeParams(rope_type="default", theta=theta)
    rope_type = reader.values.get("rope_type") or reader.values.get("type") or "default"
    if rope_type not in NUMBERS:
        raise reader.error("rope_type", f"expected one of {sorted(NUMBERS)}, got {rope_type!r}")
    numbers = NUMBERS[rope_type](reader)
    if rope_type in ("llama3", "yarn"):
        trained = reader.size("original_max_position_embeddings", max_position_embeddings)
        numbers["original_max_position_embeddings"] = config.size("original_max_position_embeddings", trained)
    return RopeParams(rope_type=rope_type, theta=reader.number("rope_theta", theta), numbers=numbers)


def _no_numbers(reader: JsonReader) -> dict[str, float]:
    return {}


def _factor(reader: JsonReader) -> dict[str, float]:
    return {"factor": reader.number("factor")}


def _llama3_numbers(reader: JsonReader) -> dict[str, float]:
    low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
    if low >= high:
        raise reader.error("high_freq_factor", f"expected more than low_freq_factor {low}, got {high}")
    return {**_factor(reader), "low_freq_factor": low, "high_freq_factor": high}


def _yarn_numbers(reader: JsonReader) -> dict[str, float]:
    factor = reader.number("factor")
    return {
        "factor": factor,
        "attention_factor": reader.number("attention_factor", _yarn_attention_factor(reader, factor)),
        "beta_fast": reader.number("beta_fast", 32),
        "beta_slow": reader.number("beta_slow", 1),
        "truncate": float(reader.flag("truncate", True)),
    }


def _yarn_attention_factor(reader: JsonReader, factor: float) -> float:
    """DeepSeek's mscale pair if both are there, else the paper's 0.1 ln(factor) + 1."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if reader.values.get("mscale") and reader.values.get("mscale_all_dim"):
        return mscale(reader.number("mscale")) / mscale(reader.number("mscale_all_dim"))
    return mscale(1.0)


NUMBERS: Mapping[str, Callable[[JsonReader], dict[str, float]]] = {
    "default": _no_numbers,
    "linear": _factor,
    "dynamic": _factor,
    "llama3": _llama3_numbers,
    "yarn": _yarn_numbers,
}
"""rope_type -> reader of its numbers."""


def rope_tables(
    params: RopeParams, *, head_dim: int, max_position_embeddings: int, max_model_len: int
) -> RopeTables:
    """Tables for positions 0..max_model_len-1, on the CPU."""
    if params.rope_type == "dynamic":
        theta = _dynamic_theta(params, head_dim, max_position_embeddings, max_model_len)
        inv_freq = _inv_freq(theta, head_dim)
    else:
        inv_freq = SCALINGS[params.rope_type](_inv_freq(params.theta, head_dim), params, head_dim)
    angles = torch.arange(max_model_len, dtype=torch.float32).unsqueeze(1) * inv_freq
    scale = params.numbers.get("attention_factor", 1.0)
    return RopeTables(cos=angles.cos() * scale, sin=angles.sin() * scale)


def _inv_freq(theta: float, head_dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def _dynamic_theta(
    params: RopeParams, head_dim: int, max_position_embeddings: int, max_model_len: int
) -> float:
    """NTK-aware base, fixed for the longest context: one that grows with the sequence spoils cached KV."""
    factor = params.numbers["factor"]
    stretch = factor * max(max_model_len, max_position_embeddings) / max_position_embeddings - (factor - 1)
    return float(params.theta * stretch ** (head_dim / (head_dim - 2)))


def _unscaled(inv_freq: Tensor, params: RopeParams, head_dim: int) -> Tensor:
    return inv_freq


def _linear(inv_freq: Tensor, params: RopeParams, head_dim: int) -> Tensor:
    """Position interpolation (Chen et al. 2023)."""
    return inv_freq / params.numbers["factor"]


def _llama3(inv_freq: Tensor, params: RopeParams, head_dim: int) -> Tensor:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended."""
    numbers = params.numbers
    original, factor = numbers["original_max_position_embeddings"], numbers["factor"]
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    kept = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


def _yarn(inv_freq: Tensor, params: RopeParams, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): interpolate by the number of rotations within the trained length."""
    numbers = params.numbers

    def dimension_of(rotations: float) -> float:
        ratio = numbers["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(params.theta))

    low, high = dimension_of(numbers["beta_fast"]), dimension_of(numbers["beta_slow"])
    if numbers["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inv_freq / numbers["factor"] * interpolated + inv_freq * (1 - interpolated)


SCALINGS: Mapping[str, Callable[[Tensor, RopeParams, int], Tensor]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""rope_type -> what it does to the inverse frequencies; "dynamic" changes the base instead."""
