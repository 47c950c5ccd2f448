"""What a step tells the world."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from engine.plan import Scheduled
from engine.request import FinishReason, Request, TokenLogprob


@dataclass(kw_only=True, slots=True)
class StepOutput:
    """New tokens of one choice of a request."""

    request: Request
    choice: int = 0
    start_index: int
    """Index in output_token_ids of the first new token."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token; None if the request asked for none."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """With the first output after the prompt was computed, if the request asked for them."""
    num_draft_tokens: int = 0
    """Draft tokens that were judged; all of `token_ids` but the last one were accepted."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended the request, if one did; it is the last of `token_ids`."""
    score: float | None = None
    """Of a beam that is returned; they come best first, with their rank as `choice`."""
    error: str | None = None
    """Why the request ended with FinishReason.ERROR; its batch-mates are not affected."""

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, found in a prefix cache."""
        return (self.request.leader or self.request).num_cached_tokens


class PreemptionMode(Enum):
    """What becomes of a preempted request."""

    SWAP = "swap"
    """Its KV waits in host memory."""
    RECOMPUTE = "recompute"
    """It waits for blocks and is prefilled again."""
    HAND_BACK = "hand_back"
    """It leaves this engine; whoever sent it runs it again, behind the tokens it has."""


class Preempted(NamedTuple):
    """One preemption."""

    request: Request
    mode: PreemptionMode


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Everything that changed in one step."""

    batch: Sequence[Scheduled] = ()
    """What was computed."""
    outputs: list[StepOutput] = field(default_factory=list)
    computed: list[Request] = field(default_factory=list)
    """Prefill-only requests whose num_computed_tokens advanced, by the last chunk included."""
    preempted: list[Preempted] = field(default_factory=list)
    """Who lost its blocks since the last step; those that are handed back are no longer live."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """How busy an engine is."""

    requests_running: int
    """Decoding or being prefilled."""
    requests_waiting: int
    """Without blocks, swapped ones included."""
    queued_prefill_tokens: int
    """To be computed before their requests can decode."""
    blocks_total: int
    blocks_used: int
    """Held by requests, reserved and held ones included."""
    blocks_cached: int
    """Held by nothing but a prefix cache."""
    blocks_swapped: int
    """In host memory, of preempted requests."""
    blocks_taken: int
    """Users that blocks have got since the start, in all groups."""
    blocks_returned: int
    """Users that have gone."""


@dataclass(kw_only=True, slots=True)
class PrefixCacheStats:
    """Counts since the start. The engine's thread adds; any thread may read."""

    queries: int = 0
    """Tokens of the sequences that were looked up, one time per admission."""
    hits: int = 0
    """Of these, found."""
    evicted_blocks: int = 0
    """Cached blocks that gave way to new ones."""


def judge(
    request: Request, eos_token_ids: Collection[int], max_model_len: int, *, is_complete: bool = False
) -> tuple[FinishReason | None, int | None]:
    """Whether the last output token ends the request: (finish reason, stop token id).

    `is_complete`: nothing may follow it in the request's grammar.
    """
    params, last = request.sampling, request.output_token_ids[-1]
    num_outputs = len(request.output_token_ids)
    stops = last in params.stop_token_ids or (not params.ignore_eos and last in eos_token_ids)
    if stops and num_outputs > params.min_tokens:
        return FinishReason.STOP, last
    if is_complete:
        return FinishReason.STOP, None
    if num_outputs >= params.max_tokens or request.num_tokens >= max_model_len:
        return FinishReason.LENGTH, None
    return None, None
