"""A fast 64-bit checksum of KV payloads, and the integer hash under it.

Multilinear hashing over 64-bit words (Lemire and Kaser, "Strongly universal string hashing is fast",
2014), with fixed odd weights: it finds damage and mixed-up blocks, it does not withstand an adversary.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

UINT64_MASK = 2**64 - 1
WORD_BYTES = 8


def as_int64(value: int) -> int:
    """The signed 64-bit integer with the bits of `value` mod 2**64."""
    value &= UINT64_MASK
    return value - 2**64 if value >= 2**63 else value


GOLDEN_GAMMA = as_int64(0x9E3779B97F4A7C15)
MIX_1 = as_int64(0xBF58476D1CE4E5B9)
MIX_2 = as_int64(0x94D049BB133111EB)


def splitmix64(state: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) on int64 bit patterns."""
    z = state + GOLDEN_GAMMA
    z = (z ^ shift_right(z, 30)) * MIX_1
    z = (z ^ shift_right(z, 27)) * MIX_2
    return z ^ shift_right(z, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 bit patterns; torch's own shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def checksum(payload: Tensor) -> int:
    """Sum over i of word_i * weight_i mod 2**64, as an unsigned integer.

    payload: contiguous uint8 [num_bytes]; words are little-endian, the last one padded with zeros.
    """
    words = _words(payload)
    return int((words * weights(len(words), words.device)).sum()) & UINT64_MASK


def weights(num_words: int, device: torch.device) -> Tensor:
    """int64 [num_words], odd; the weight of a word depends on its position alone."""
    return _weights((max(num_words, 1) - 1).bit_length(), device)[:num_words]


def _words(payload: Tensor) -> Tensor:
    assert payload.dtype == torch.uint8
    assert payload.is_contiguous()
    padding = -payload.numel() % WORD_BYTES
    if padding:
        payload = F.pad(payload, (0, padding))
    elif payload.storage_offset() % WORD_BYTES:
        payload = payload.clone()
    return payload.view(torch.int64)


@lru_cache(maxsize=64)
def _weights(log2_size: int, device: torch.device) -> Tensor:
    """Odd weights for up to 2**log2_size words; word i has the same weight in every table."""
    return splitmix64(torch.arange(2**log2_size, dtype=torch.int64, device=device)) | 1
