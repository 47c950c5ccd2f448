"""Draws of tokens as Triton kernels: `sample` of kernels.sampling and `draw` of kernels.truncation.

Nothing is sorted. A program for each row finds where the kept tokens begin: one value, and among the tokens
of that very value one id. Then programs for parts of a row add the noise and leave their best token, and one
for each row takes the best of these. Every sum is added up in a fixed order: results do not depend on the
batch nor on how rows are split.

The search is for the smallest value in the row such that what lies above it weighs less than a limit: k
tokens, or the probability p. Each pass over the row tries two pivots, halfway between the bounds by value and
by the number of floats between, and the bounds move to values which are there: 4 to 20 passes for 128k
tokens, at most 32 (compare the pivots of Qrita, Park et al. 2026, arXiv 2602.01518, and of FlashInfer).
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import Launch
from kernels.triton_noise import gumbel_noise, noise_key
from kernels.truncation import Truncation

LARGEST_ID: Final = tl.constexpr(2**31 - 1)
SEARCH_TILE: Final = 2048
SEARCH_STAGES: Final = tl.constexpr(6)
"""Tiles on their way while one is searched: a pass has little to compute and would wait for each of them."""
DRAW_TILE: Final = 1024
NUM_PROGRAMS: Final = 512
"""Enough programs for any GPU: a row is split into no more parts than give this many in all."""


@triton.jit(do_not_specialize=["temperatures_ptr", "top_ks_ptr", "top_ps_ptr", "min_ps_ptr"])
def truncate_kernel(
    logits_ptr: tl.tensor, temperatures_ptr: tl.tensor, top_ks_ptr: tl.tensor, top_ps_ptr: tl.tensor,
    min_ps_ptr: tl.tensor, thresholds_ptr: tl.tensor, first_ids_ptr: tl.tensor,
    row_stride: tl.tensor, vocab_size: tl.tensor,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Per row the smallest kept value, and the lowest kept id among the tokens that have it."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperatures_ptr + row)
    top_k = tl.load(top_ks_ptr + row)
    top_p = tl.load(top_ps_ptr + row)
    min_p = tl.load(min_ps_ptr + row)
    threshold = float("-inf")
    first_id = 0
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    if (temperature > 0.0) & (has_top_k | (top_p < 1.0) | (min_p > 0.0)):
        lowest, peak = _extremes(row_ptr, temperature, vocab_size, TILE)
        if has_top_k:
            threshold, _ = _search(
                row_ptr, temperature, vocab_size, lowest, peak, top_k.to(tl.float32), peak, False, TILE
            )
            # Fewer than k tokens have a finite logit: the search ends at the lowest, and all are kept.
        if top_p < 1.0:
            low = tl.maximum(threshold, lowest)
            total = _weight_from(row_ptr, temperature, vocab_size, low, peak, TILE)
            limit = total - (1.0 - top_p) * total
            threshold, above = _search(row_ptr, temperature, vocab_size, low, peak, limit, peak, True, TILE)
            room = (limit - above) / tl.maximum(tl.exp(threshold - peak), 1e-37)
            first_id = _first_kept_tie(row_ptr, temperature, vocab_size, threshold, room, TILE)
        if min_p > 0.0:
            least = peak + tl.log(min_p)
            first_id = tl.where(least > threshold, 0, first_id)
            threshold = tl.maximum(least, threshold)
    tl.store(thresholds_ptr + row, threshold)
    tl.store(first_ids_ptr + row, first_id)


@triton.jit
def load_logits(row_ptr: tl.tensor, token_ids: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    """-inf behind the vocabulary."""
    return tl.load(row_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf"))


@triton.jit
def _scores(
    row_ptr: tl.tensor, token_ids: tl.tensor, temperature: tl.tensor, vocab_size: tl.tensor
) -> tl.tensor:
    """Logits over temperature, divided as torch divides."""
    return tl.div_rn(load_logits(row_ptr, token_ids, vocab_size), tl.zeros_like(token_ids) + temperature)


@triton.jit
def _extremes(
    row_ptr: tl.tensor, temperature: tl.tensor, vocab_size: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(smallest, largest) score above -inf."""
    lowest = tl.full((TILE,), float("inf"), tl.float32)
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    for start in tl.range(0, vocab_size, TILE, num_stages=SEARCH_STAGES):
        scores = _scores(row_ptr, start + tl.arange(0, TILE), temperature, vocab_size)
        peak = tl.where(scores > peak, scores, peak)
        lowest = tl.where((scores > float("-inf")) & (scores < lowest), scores, lowest)
    return tl.min(lowest, 0), tl.max(peak, 0)


@triton.jit
def _search(
    row_ptr: tl.tensor, temperature: tl.tensor, vocab_size: tl.tensor,
    low: tl.tensor, high: tl.tensor, limit: tl.tensor, peak: tl.tensor,
    WEIGHTED: tl.constexpr, TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """(smallest score t of the row in low … high with weight(scores > t) < limit, that weight).

    low and high are scores of the row, nothing lies above high, which is t if no smaller one is; a score
    weighs exp(score - peak) if WEIGHTED, else 1.
    """
    above = 0.0
    while low < high:
        middle = _between(low, high)
        halfway = 0.5 * low + 0.5 * high
        halfway = tl.where(halfway < high, halfway, middle)
        pivot_1, pivot_2 = tl.minimum(middle, halfway), tl.maximum(middle, halfway)
        weight_1 = tl.zeros((TILE,), tl.float32)
        weight_2 = tl.zeros((TILE,), tl.float32)
        under_1 = tl.full((TILE,), float("-inf"), tl.float32)
        under_2 = tl.full((TILE,), float("-inf"), tl.float32)
        over_1 = tl.full((TILE,), float("inf"), tl.float32)
        over_2 = tl.full((TILE,), float("inf"), tl.float32)
        for start in tl.range(0, vocab_size, TILE, num_stages=SEARCH_STAGES):
            scores = _scores(row_ptr, start + tl.arange(0, TILE), temperature, vocab_size)
            weights = tl.exp(scores - peak) if WEIGHTED else tl.full((TILE,), 1.0, tl.float32)
            weight_1 += tl.where(scores > pivot_1, weights, 0.0)
            weight_2 += tl.where(scores > pivot_2, weights, 0.0)
            under_1 = tl.where((scores <= pivot_1) & (scores > under_1), scores, under_1)
            under_2 = tl.where((scores <= pivot_2) & (scores > under_2), scores, under_2)
            over_1 = tl.where((scores > pivot_1) & (scores < over_1), scores, over_1)
            over_2 = tl.where((scores > pivot_2) & (scores < over_2), scores, over_2)
        above_1, above_2 = tl.sum(weight_1, 0), tl.sum(weight_2, 0)
        light_1, light_2 = above_1 < limit, above_2 < limit
        low = tl.where(light_1, low, tl.where(light_2, tl.min(over_1, 0), tl.min(over_2, 0)))
        high = tl.where(light_1, tl.max(under_1, 0), tl.where(light_2, tl.max(under_2, 0), high))
        above = tl.where(light_1, above_1, tl.where(light_2, above_2, above))
    return high, above


@triton.jit
def _between(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The float with as many floats between it and low as between it and high; below high."""
    a, b = _ordinal(low.to(tl.int32, bitcast=True)), _ordinal(high.to(tl.int32, bitcast=True))
    return _ordinal((a >> 1) + (b >> 1) + (a & b & 1)).to(tl.float32, bitcast=True)


@triton.jit
def _ordinal(bits: tl.tensor) -> tl.tensor:
    """Between the bits of floats and integers in the order of the floats, either way."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weight_from(
    row_ptr: tl.tensor, temperature: tl.tensor, vocab_size: tl.tensor, low: tl.tensor, peak: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Sum of exp(score - peak) over the scores from low on."""
    weight = tl.zeros((TILE,), tl.float32)
    for start in tl.range(0, vocab_size, TILE, num_stages=SEARCH_STAGES):
        scores = _scores(row_ptr, start + tl.arange(0, TILE), temperature, vocab_size)
        weight += tl.where(scores >= low, tl.exp(scores - peak), 0.0)
    return tl.sum(weight, 0)


@triton.jit
def _first_kept_tie(
    row_ptr: tl.tensor, temperature: tl.tensor, vocab_size: tl.tensor, value: tl.tensor, room: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Lowest id of the last ceil(room) tokens, at least one, with this score; 0 if all of them are kept."""
    counts = tl.zeros((TILE,), tl.int32)
    for start in tl.range(0, vocab_size, TILE, num_stages=SEARCH_STAGES):
        scores = _scores(row_ptr, start + tl.arange(0, TILE), temperature, vocab_size)
        counts += (scores == value).to(tl.int32)
    num_ties = tl.sum(counts, 0)
    num_kept = tl.maximum(tl.ceil(tl.minimum(room, num_ties.to(tl.float32))), 1.0).to(tl.int32)
    num_dropped = num_ties - num_kept
    first_id = 0
    if num_dropped > 0:
        num_seen = 0
        for start in tl.range(0, vocab_size, TILE, num_stages=SEARCH_STAGES):
            token_ids = start + tl.arange(0, TILE)
            tied = (_scores(row_ptr, token_ids, temperature, vocab_size) == value).to(tl.int32)
            is_first = (tied > 0) & (num_seen + tl.cumsum(tied, 0) == num_dropped + 1)
            first_id += tl.sum(tl.where(is_first, token_ids, 0), 0)
            num_seen += tl.sum(tied, 0)
    return first_id


@triton.jit(do_not_specialize=["temperatures_ptr", "seeds_ptr", "positions_ptr", "choices_ptr", "part_size"])
def draw_kernel(
    logits_ptr: tl.tensor, temperatures_ptr: tl.tensor, thresholds_ptr: tl.tensor, first_ids_ptr: tl.tensor,
    seeds_ptr: tl.tensor, positions_ptr: tl.tensor, choices_ptr: tl.tensor,
    best_ptr: tl.tensor, best_ids_ptr: tl.tensor,
    row_stride: tl.tensor, vocab_size: tl.tensor, part_size: tl.tensor,
    TRUNCATED: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The best token of a part of a row; without TRUNCATED the logits are those that are drawn from."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part_size
    row_ptr = logits_ptr + row * row_stride
    if TRUNCATED:
        temperature = tl.load(temperatures_ptr + row)
        threshold = tl.load(thresholds_ptr + row)
        first_id = tl.load(first_ids_ptr + row)
        is_random = temperature > 0.0
        divisor = tl.where(is_random, temperature, 1.0)
    key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), tl.load(choices_ptr + row))
    best = tl.full((TILE,), float("-inf"), tl.float32)
    best_ids = begin + tl.arange(0, TILE)
    for start in range(begin, tl.minimum(begin + part_size, vocab_size), TILE):
        token_ids = start + tl.arange(0, TILE)
        if TRUNCATED:
            scores = _scores(row_ptr, token_ids, divisor, vocab_size)
            kept = (scores > threshold) | ((scores == threshold) & (token_ids >= first_id))
            scores = tl.where(kept, scores, float("-inf"))
            if is_random & (tl.max(scores, 0) > float("-inf")):
                scores += gumbel_noise(key, token_ids.to(tl.int64))
        else:
            scores = load_logits(row_ptr, token_ids, vocab_size)
            scores += gumbel_noise(key, token_ids.to(tl.int64))
        better = scores > best
        best = tl.where(better, scores, best)
        best_ids = tl.where(better, token_ids, best_ids)
    store_best(best, best_ids, best_ptr, best_ids_ptr, row * tl.num_programs(1) + tl.program_id(1))


@triton.jit(do_not_specialize=["num_parts"])
def best_part_kernel(
    best_ptr: tl.tensor, best_ids_ptr: tl.tensor, token_ids_ptr: tl.tensor, num_parts: tl.tensor,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The best of the parts of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, TILE)
    mask = part < num_parts
    best = tl.load(best_ptr + row * num_parts + part, mask=mask, other=float("-inf"))
    best_ids = tl.load(best_ids_ptr + row * num_parts + part, mask=mask, other=LARGEST_ID)
    tl.store(token_ids_ptr + row, tl.min(tl.where(best == tl.max(best, 0), best_ids, LARGEST_ID), 0))


@triton.jit
def store_best(
    values: tl.tensor, token_ids: tl.tensor, best_ptr: tl.tensor, best_ids_ptr: tl.tensor, place: tl.tensor
) -> None:
    """The largest value, and the lowest id that has it."""
    largest = tl.max(values, 0)
    tl.store(best_ptr + place, largest)
    tl.store(best_ids_ptr + place, tl.min(tl.where(values == largest, token_ids, LARGEST_ID), 0))


def sample(logits: Tensor, seeds: Tensor, positions: Tensor, choices: Tensor) -> Tensor:
    """See kernels.sampling."""
    return _run(*draw_launches(logits, None, seeds, positions, choices))


def draw(logits: Tensor, truncation: Truncation, seeds: Tensor, positions: Tensor, choices: Tensor) -> Tensor:
    """See kernels.truncation."""
    return _run(*draw_launches(logits, truncation, seeds, positions, choices))


def _run(launches: list[Launch], token_ids: Tensor) -> Tensor:
    for launch in launches:
        launch.run()
    return token_ids


def draw_launches(
    logits: Tensor, truncation: Truncation | None, seeds: Tensor, positions: Tensor, choices: Tensor
) -> tuple[list[Launch], Tensor]:
    """`draw`, or without truncation `sample`: (what is launched one after the other, the token ids)."""
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    for values in (seeds, positions, choices):
        assert values.shape == (num_rows,)
        assert values.dtype == torch.int64
        assert values.is_contiguous()
    borders = (logits.new_empty(num_rows), torch.empty(num_rows, dtype=torch.int32, device=logits.device))
    launches = [truncate_launch(logits, truncation, *borders)] if truncation else []
    tile, part_size, num_parts = split(num_rows, vocab_size)
    best = logits.new_empty(num_rows, num_parts)
    best_ids = torch.empty(num_rows, num_parts, dtype=torch.int64, device=logits.device)
    draw_part = Launch(
        kernel=draw_kernel,
        grid=(num_rows, num_parts),
        args={
            "logits_ptr": logits,
            "temperatures_ptr": truncation.temperatures if truncation else borders[0],
            "thresholds_ptr": borders[0],
            "first_ids_ptr": borders[1],
            "seeds_ptr": seeds,
            "positions_ptr": positions,
            "choices_ptr": choices,
            "best_ptr": best,
            "best_ids_ptr": best_ids,
            "row_stride": logits.stride(0),
            "vocab_size": vocab_size,
            "part_size": part_size,
        },
        constexprs={"TRUNCATED": truncation is not None, "TILE": tile},
    )
    launches.append(draw_part)
    if num_parts == 1:
        return launches, best_ids.squeeze(1)
    token_ids = torch.empty_like(seeds)
    launches.append(best_part_launch(best, best_ids, token_ids))
    return launches, token_ids


def split(num_rows: int, vocab_size: int) -> tuple[int, int, int]:
    """(tile, tokens of a part of a row in whole tiles, number of parts)."""
    tile = min(DRAW_TILE, triton.next_power_of_2(vocab_size))
    num_tiles = triton.cdiv(vocab_size, tile)
    tiles_per_part = triton.cdiv(num_tiles, max(NUM_PROGRAMS // max(num_rows, 1), 1))
    return tile, tile * tiles_per_part, triton.cdiv(num_tiles, tiles_per_part)


def truncate_launch(logits: Tensor, truncation: Truncation, thresholds: Tensor, first_ids: Tensor) -> Launch:
    """Each row's smallest kept value into `thresholds`, the first id that it is kept of into `first_ids`."""
    num_rows, vocab_size = logits.shape
    for values in truncation:
        assert values.shape == (num_rows,)
        assert values.is_contiguous()
    tile = min(SEARCH_TILE, triton.next_power_of_2(vocab_size))
    return Launch(
        kernel=truncate_kernel,
        grid=(num_rows,),
        args={
            "logits_ptr": logits,
            "temperatures_ptr": truncation.temperatures,
            "top_ks_ptr": truncation.top_ks,
            "top_ps_ptr": truncation.top_ps,
            "min_ps_ptr": truncation.min_ps,
            "thresholds_ptr": thresholds,
            "first_ids_ptr": first_ids,
            "row_stride": logits.stride(0),
            "vocab_size": vocab_size,
        },
        constexprs={"TILE": tile},
        num_warps=16,
    )


def best_part_launch(best: Tensor, best_ids: Tensor, token_ids: Tensor) -> Launch:
    """The id of the largest value of each row of `best` [num_rows, num_parts] into `token_ids`."""
    num_rows, num_parts = best.shape
    return Launch(
        kernel=best_part_kernel,
        grid=(num_rows,),
        args={"best_ptr": best, "best_ids_ptr": best_ids, "token_ids_ptr": token_ids, "num_parts": num_parts},
        constexprs={"TILE": triton.next_power_of_2(num_parts)},
        num_warps=1,
    )
