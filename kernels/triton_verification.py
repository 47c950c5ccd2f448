"""Which draft tokens the target keeps, as Triton kernels: see kernels.verification.

Rejection verification is at most five launches for a batch of any lengths, and nothing waits for the host:
peak and weight of every row's softmax, target's and draft's; one program per request for the coins; programs
for parts of the vocabulary for the token behind; and the best of these.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import verification
from kernels.triton_launch import Launch
from kernels.triton_noise import gumbel_noise, noise_key
from kernels.triton_sampling import LARGEST_ID, load_logits, split, store_best

ACCEPT_STREAM: Final = tl.constexpr(verification.ACCEPT_STREAM)
SOFTMAX_TILE: Final = 4096
COUNT_TILE: Final = 1024
ROW_KEYS: Final = ("seeds_ptr", "positions_ptr", "choices_ptr")


@triton.jit
def count_accepted_kernel(
    draft_ids_ptr: tl.tensor, target_ids_ptr: tl.tensor, counts_ptr: tl.tensor,
    draft_stride: tl.tensor, target_stride: tl.tensor, num_drafts: tl.tensor,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One request per program, all of its places at once."""
    request = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    mask = place < num_drafts
    draft_ids = tl.load(draft_ids_ptr + request * draft_stride + place, mask=mask, other=0)
    target_ids = tl.load(target_ids_ptr + request * target_stride + place, mask=mask, other=0)
    first_wrong = tl.min(tl.where(mask & (draft_ids == target_ids), TILE, place), 0)
    tl.store(counts_ptr + request, tl.minimum(first_wrong, num_drafts).to(tl.int64))


@triton.jit
def softmax_facts_kernel(
    logits_ptr: tl.tensor, facts_ptr: tl.tensor, row_stride: tl.tensor, vocab_size: tl.tensor,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Of each row (largest logit, sum of exp(logit - largest)); NaN where the softmax is."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, TILE):
        logits = load_logits(row_ptr, start + tl.arange(0, TILE), vocab_size)
        largest = tl.where(logits > largest, logits, largest)
    peak = tl.max(largest, 0)
    weights = tl.zeros((TILE,), tl.float32)
    for start in range(0, vocab_size, TILE):
        weights += tl.exp(load_logits(row_ptr, start + tl.arange(0, TILE), vocab_size) - peak)
    tl.store(facts_ptr + 2 * row, peak)
    tl.store(facts_ptr + 2 * row + 1, tl.sum(weights, 0))


@triton.jit(do_not_specialize=[*ROW_KEYS, "num_places"])
def judge_kernel(
    target_ptr: tl.tensor, target_facts_ptr: tl.tensor, draft_ptr: tl.tensor, draft_facts_ptr: tl.tensor,
    draft_ids_ptr: tl.tensor, seeds_ptr: tl.tensor, positions_ptr: tl.tensor, choices_ptr: tl.tensor,
    counts_ptr: tl.tensor, rows_ptr: tl.tensor,
    target_stride: tl.tensor, draft_stride: tl.tensor, num_places: tl.tensor,
    HAS_DRAFT: tl.constexpr, TILE: tl.constexpr, COUNT_TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Per request the number of accepted draft tokens, and where the token behind them is drawn from:
    (row of the target, row of the draft, -1 if none was rejected)."""
    request = tl.program_id(0).to(tl.int64)
    first_draft = _num_proposed(draft_ids_ptr, request * num_places, COUNT_TILE)
    first_row = first_draft + request
    place = tl.arange(0, TILE)
    token_ids = tl.load(draft_ids_ptr + request * num_places + place, mask=place < num_places, other=-1)
    proposed = token_ids >= 0
    rows = first_row + place
    target = _prob(target_ptr + rows * target_stride + token_ids, target_facts_ptr + 2 * rows, proposed)
    key = noise_key(
        tl.load(seeds_ptr + request),
        tl.load(positions_ptr + request) + place,
        tl.load(choices_ptr + request) + ACCEPT_STREAM,
    )
    coins = tl.exp(-tl.exp(-gumbel_noise(key, tl.zeros_like(token_ids))))
    if HAS_DRAFT:
        rows = first_draft + place
        coins *= _prob(draft_ptr + rows * draft_stride + token_ids, draft_facts_ptr + 2 * rows, proposed)
    num_accepted = tl.min(tl.where(proposed & (coins < target), TILE, place), 0)
    num_drafts = tl.sum(proposed.to(tl.int32), 0)
    tl.store(counts_ptr + request, num_accepted.to(tl.int64))
    tl.store(rows_ptr + 2 * request, first_row + num_accepted)
    tl.store(rows_ptr + 2 * request + 1, tl.where(num_accepted < num_drafts, first_draft + num_accepted, -1))


@triton.jit
def _num_proposed(draft_ids_ptr: tl.tensor, end: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Draft tokens among the first `end` ids."""
    counts = tl.zeros((TILE,), tl.int64)
    for start in range(0, end, TILE):
        ids = start + tl.arange(0, TILE)
        counts += (tl.load(draft_ids_ptr + ids, mask=ids < end, other=-1) >= 0).to(tl.int64)
    return tl.sum(counts, 0)


@triton.jit
def _prob(logit_ptrs: tl.tensor, facts_ptrs: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Probability of each logit under the softmax with these facts."""
    logits = tl.load(logit_ptrs, mask=mask, other=float("-inf"))
    peaks = tl.load(facts_ptrs, mask=mask, other=0.0)
    return tl.exp(logits - peaks) / tl.load(facts_ptrs + 1, mask=mask, other=1.0)


@triton.jit(do_not_specialize=[*ROW_KEYS, "num_places", "part_size", "num_requests"])
def redraw_kernel(
    target_ptr: tl.tensor, target_facts_ptr: tl.tensor, draft_ptr: tl.tensor, draft_facts_ptr: tl.tensor,
    draft_ids_ptr: tl.tensor, seeds_ptr: tl.tensor, positions_ptr: tl.tensor, choices_ptr: tl.tensor,
    counts_ptr: tl.tensor, rows_ptr: tl.tensor, best_ptr: tl.tensor, best_ids_ptr: tl.tensor,
    target_stride: tl.tensor, draft_stride: tl.tensor, num_places: tl.tensor,
    vocab_size: tl.tensor, part_size: tl.tensor, num_requests: tl.tensor,
    HAS_DRAFT: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The best token of a part of the vocabulary, drawn from the residual and from the target itself."""
    request = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part_size
    num_accepted = tl.load(counts_ptr + request)
    row = tl.load(rows_ptr + 2 * request)
    draft_row = tl.load(rows_ptr + 2 * request + 1)
    rejected = draft_row >= 0
    draft_row = tl.maximum(draft_row, 0)
    rejected_id = tl.load(draft_ids_ptr + request * num_places + num_accepted, mask=rejected, other=-1)
    peak, weight = tl.load(target_facts_ptr + 2 * row), tl.load(target_facts_ptr + 2 * row + 1)
    key = noise_key(
        tl.load(seeds_ptr + request),
        tl.load(positions_ptr + request) + num_accepted,
        tl.load(choices_ptr + request),
    )
    from_residual = tl.full((TILE,), float("-inf"), tl.float32)
    from_target = tl.full((TILE,), float("-inf"), tl.float32)
    residual_ids = begin + tl.arange(0, TILE)
    target_ids = begin + tl.arange(0, TILE)
    for start in range(begin, tl.minimum(begin + part_size, vocab_size), TILE):
        token_ids = start + tl.arange(0, TILE)
        target = tl.exp(load_logits(target_ptr + row * target_stride, token_ids, vocab_size) - peak) / weight
        residual = target
        if rejected:
            if HAS_DRAFT:
                draft_peak = tl.load(draft_facts_ptr + 2 * draft_row)
                draft_weight = tl.load(draft_facts_ptr + 2 * draft_row + 1)
                draft = load_logits(draft_ptr + draft_row * draft_stride, token_ids, vocab_size)
                residual = target - tl.exp(draft - draft_peak) / draft_weight
            else:
                residual = tl.where(token_ids == rejected_id, 0.0, target)
        noise = gumbel_noise(key, token_ids.to(tl.int64))
        scores = _log(residual) + noise
        residual_ids = tl.where(scores > from_residual, token_ids, residual_ids)
        from_residual = tl.maximum(scores, from_residual)
        scores = _log(target) + noise
        target_ids = tl.where(scores > from_target, token_ids, target_ids)
        from_target = tl.maximum(scores, from_target)
    place = request * tl.num_programs(1) + tl.program_id(1)
    store_best(from_residual, residual_ids, best_ptr, best_ids_ptr, place)
    place += num_requests * tl.num_programs(1)
    store_best(from_target, target_ids, best_ptr, best_ids_ptr, place)


@triton.jit
def _log(weights: tl.tensor) -> tl.tensor:
    """-inf of what is not above 0, also of NaN."""
    return tl.where(weights > 0.0, tl.log(tl.where(weights > 0.0, weights, 1.0)), float("-inf"))


@triton.jit(do_not_specialize=["num_requests", "num_parts"])
def recover_kernel(
    best_ptr: tl.tensor, best_ids_ptr: tl.tensor, token_ids_ptr: tl.tensor,
    num_requests: tl.tensor, num_parts: tl.tensor,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The best of the parts of the residual, or of the target where rounding leaves no residual."""
    place = tl.program_id(0).to(tl.int64) * num_parts + tl.arange(0, TILE)
    mask = tl.arange(0, TILE) < num_parts
    best = tl.load(best_ptr + place, mask=mask, other=float("-inf"))
    if tl.max(best, 0) == float("-inf"):
        place += num_requests * num_parts
        best = tl.load(best_ptr + place, mask=mask, other=float("-inf"))
    best_ids = tl.load(best_ids_ptr + place, mask=mask, other=LARGEST_ID)
    tl.store(
        token_ids_ptr + tl.program_id(0), tl.min(tl.where(best == tl.max(best, 0), best_ids, LARGEST_ID), 0)
    )


def count_accepted(draft_ids: Tensor, target_ids: Tensor) -> Tensor:
    """See kernels.verification."""
    counts = torch.empty(draft_ids.shape[0], dtype=torch.int64, device=draft_ids.device)
    count_accepted_launch(draft_ids, target_ids, counts).run()
    return counts


def rejection_verify(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_ids: Tensor,
    seeds: Tensor,
    positions: Tensor,
    choices: Tensor,
) -> tuple[Tensor, Tensor]:
    """See kernels.verification."""
    launches, num_accepted, behind = rejection_launches(
        target_logits, draft_logits, draft_ids, seeds, positions, choices
    )
    for launch in launches:
        launch.run()
    return num_accepted, behind


def count_accepted_launch(draft_ids: Tensor, target_ids: Tensor, counts: Tensor) -> Launch:
    """`count_accepted` into `counts`."""
    num_requests, num_drafts = draft_ids.shape
    assert draft_ids.dtype == target_ids.dtype == torch.int64
    assert target_ids.shape[0] == num_requests
    assert target_ids.shape[1] >= num_drafts
    assert draft_ids.stride(1) == target_ids.stride(1) == 1
    return Launch(
        kernel=count_accepted_kernel,
        grid=(num_requests,),
        args={
            "draft_ids_ptr": draft_ids,
            "target_ids_ptr": target_ids,
            "counts_ptr": counts,
            "draft_stride": draft_ids.stride(0),
            "target_stride": target_ids.stride(0),
            "num_drafts": num_drafts,
        },
        constexprs={"TILE": triton.next_power_of_2(max(num_drafts, 1))},
        num_warps=1,
    )


def softmax_facts_launch(logits: Tensor, facts: Tensor) -> Launch:
    """Peak and weight of each row of fp32 logits [num_rows, vocab_size] into `facts` [num_rows, 2]."""
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    return Launch(
        kernel=softmax_facts_kernel,
        grid=(num_rows,),
        args={
            "logits_ptr": logits,
            "facts_ptr": facts,
            "row_stride": logits.stride(0),
            "vocab_size": vocab_size,
        },
        constexprs={"TILE": min(SOFTMAX_TILE, triton.next_power_of_2(vocab_size))},
        num_warps=8,
    )


def rejection_launches(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_ids: Tensor,
    seeds: Tensor,
    positions: Tensor,
    choices: Tensor,
) -> tuple[list[Launch], Tensor, Tensor]:
    """`rejection_verify`: (what is launched one after the other, number of accepted tokens, token behind)."""
    num_requests, num_places = draft_ids.shape
    assert all(each.is_contiguous() for each in (draft_ids, seeds, positions, choices))
    assert draft_ids.dtype == seeds.dtype == positions.dtype == choices.dtype == torch.int64
    target_facts = target_logits.new_empty(len(target_logits), 2)
    launches = [softmax_facts_launch(target_logits, target_facts)]
    draft, draft_facts = target_logits, target_facts
    if draft_logits is not None:
        draft, draft_facts = draft_logits, target_logits.new_empty(len(draft_logits), 2)
        launches.append(softmax_facts_launch(draft, draft_facts))
    num_accepted = torch.empty_like(seeds)
    judged: dict[str, Tensor | float] = {
        "target_ptr": target_logits,
        "target_facts_ptr": target_facts,
        "draft_ptr": draft,
        "draft_facts_ptr": draft_facts,
        "draft_ids_ptr": draft_ids,
        "seeds_ptr": seeds,
        "positions_ptr": positions,
        "choices_ptr": choices,
        "counts_ptr": num_accepted,
        "rows_ptr": torch.empty(num_requests, 2, dtype=torch.int64, device=seeds.device),
        "target_stride": target_logits.stride(0),
        "draft_stride": draft.stride(0),
        "num_places": num_places,
    }
    has_draft = draft_logits is not None
    judge = Launch(
        kernel=judge_kernel,
        grid=(num_requests,),
        args=judged,
        constexprs={
            "HAS_DRAFT": has_draft,
            "TILE": triton.next_power_of_2(num_places + 1),
            "COUNT_TILE": COUNT_TILE,
        },
        num_warps=1,
    )
    behind = torch.empty_like(seeds)
    redraw, recover = _redraw_launches(judged, target_logits, behind, has_draft=has_draft)
    return [*launches, judge, redraw, recover], num_accepted, behind


def _redraw_launches(
    judged: dict[str, Tensor | float], target_logits: Tensor, behind: Tensor, *, has_draft: bool
) -> tuple[Launch, Launch]:
    """The token behind the accepted ones, drawn in parts of the vocabulary; the best part's into `behind`."""
    num_requests, vocab_size = len(behind), target_logits.shape[1]
    tile, part_size, num_parts = split(num_requests, vocab_size)
    parts: dict[str, Tensor | float] = {
        "best_ptr": target_logits.new_empty(2, num_requests, num_parts),
        "best_ids_ptr": behind.new_empty(2, num_requests, num_parts),
        "num_requests": num_requests,
    }
    redraw = Launch(
        kernel=redraw_kernel,
        grid=(num_requests, num_parts),
        args={**judged, **parts, "vocab_size": vocab_size, "part_size": part_size},
        constexprs={"HAS_DRAFT": has_draft, "TILE": tile},
    )
    recover = Launch(
        kernel=recover_kernel,
        grid=(num_requests,),
        args={**parts, "token_ids_ptr": behind, "num_parts": num_parts},
        constexprs={"TILE": triton.next_power_of_2(num_parts)},
        num_warps=1,
    )
    return redraw, recover
