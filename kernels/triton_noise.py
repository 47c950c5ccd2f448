"""The integer hash and the Gumbel noise of `kernels.checksums` and `kernels.sampling` inside Triton kernels.

Integers are the same bit for bit. Noise differs from the reference's by the rounding of logarithms alone;
Triton has no log1p, and what stands in for it does not need a logarithm that is accurate near 1.
"""

from typing import Final

import triton
import triton.language as tl

from kernels import checksums, sampling

UINT64_MASK = checksums.UINT64_MASK

GOLDEN_GAMMA: Final = tl.constexpr(checksums.GOLDEN_GAMMA & UINT64_MASK)
MIX_1: Final = tl.constexpr(checksums.MIX_1 & UINT64_MASK)
MIX_2: Final = tl.constexpr(checksums.MIX_2 & UINT64_MASK)
POSITION_STRIDE: Final = tl.constexpr(sampling.POSITION_STRIDE & UINT64_MASK)
CHOICE_STRIDE: Final = tl.constexpr(sampling.CHOICE_STRIDE & UINT64_MASK)
INT64_MAX: Final = tl.constexpr(2**63 - 1)
LARGEST_UNIFORM: Final = tl.constexpr(sampling.LARGEST_UNIFORM)


@triton.jit
def splitmix64(state: tl.tensor) -> tl.tensor:
    """uint64 of uint64: see kernels.checksums."""
    z = state + tl.full((), GOLDEN_GAMMA, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full((), MIX_1, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), MIX_2, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def noise_key(seed: tl.tensor, position: tl.tensor, choice: tl.tensor) -> tl.tensor:
    """uint64, what the noise of one row is drawn from; all int64."""
    key = splitmix64(seed.to(tl.uint64, bitcast=True))
    key = splitmix64(key + position.to(tl.uint64, bitcast=True) * tl.full((), POSITION_STRIDE, tl.uint64))
    return splitmix64(key + choice.to(tl.uint64, bitcast=True) * tl.full((), CHOICE_STRIDE, tl.uint64))


@triton.jit
def gumbel_noise(key: tl.tensor, token_ids: tl.tensor) -> tl.tensor:
    """Standard Gumbel noise, fp32, of a key and int64 token ids."""
    bits = splitmix64(key ^ splitmix64(token_ids.to(tl.uint64, bitcast=True)))
    positive = (bits & tl.full((), INT64_MAX, tl.uint64)).to(tl.int64, bitcast=True)
    uniform = tl.minimum((positive.to(tl.float32) + 0.5) * (2.0**-63), LARGEST_UNIFORM)
    return -tl.log(_minus_log_of_complement(uniform))


@triton.jit
def _minus_log_of_complement(u: tl.tensor) -> tl.tensor:
    """-log(1 - u) for u in (0, 1): the series of 2 atanh(u / (2 - u)) up to 1/2, where 1 - u would round."""
    s = u / (2.0 - u)
    s2 = s * s
    series = 1.0 / 9 + s2 * (1.0 / 11 + s2 * (1.0 / 13 + s2 * (1.0 / 15)))
    series = 1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * series)))
    return tl.where(u < 0.5, 2.0 * s * series, -tl.log(1.0 - tl.minimum(u, LARGEST_UNIFORM)))
