"""Speculative decoding around the engine's step.

1. `extend`: what a step has left of budget and blocks goes to slots for draft tokens (policy, no tensors).
2. `propose`: the proposer fills some of them.
3. The target computes sequence ends and draft tokens in one pass, each draft token like a decode row.
4. `sample`: the verifier keeps a prefix of each draft and adds the target's own next token.

A slot whose draft token was not kept lies behind `num_computed_tokens`: it is overwritten, it never enters
the prefix cache, and its block is the request's next one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Protocol

from torch import Tensor

from engine.block_tables import BlockTables
from engine.plan import Scheduled
from engine.request import Request, RequestState
from engine.sampler import Sample, Sampler
from engine.speculative.costs import CostTable
from engine.speculative.lengths import Lengths
from engine.speculative.proposer import NO_DRAFT, Draft, Proposer
from engine.speculative.verifier import Verifier

MAX_POSITIONS = 16
"""Places in a draft that are counted apart."""


@dataclass
class SpeculationStats:
    """Counts since the engine began; any thread may read them."""

    num_drafts: int = 0
    draft_tokens: int = 0
    """Proposed and verified."""
    accepted_tokens: int = 0
    emitted_tokens: int = 0
    """By steps with a draft: accepted ones and the target's own."""
    accepted_by_position: list[int] = field(default_factory=lambda: [0] * MAX_POSITIONS)
    draft_s: float = 0.0
    """Seconds spent to propose."""
    verify_s: float = 0.0
    """Seconds of the target's passes that verified."""


@dataclass(frozen=True)
class Proposal:
    """A plan with its draft tokens, and how they were drawn, item by item."""

    plan: list[Scheduled]
    drafts: list[Draft]
    """None at all if nobody speculates."""

    def arranged(self, order: Sequence[int]) -> "Proposal":
        """The same in another order: of each place, the index of its item."""
        drafts = [self.drafts[index] for index in order] if self.drafts else []
        return Proposal([self.plan[index] for index in order], drafts)


class Speculation(Protocol):
    """What scheduler and runner ask for."""

    stats: SpeculationStats

    @property
    def reads_hidden(self) -> bool:
        """`follow` needs the target's final hidden states, of all rows."""
        ...

    def extend(self, decodes: list[Scheduled], tables: BlockTables, budget: int) -> list[Scheduled]:
        """The decodes with slots for draft tokens behind them, of at most `budget` tokens in all."""
        ...

    def propose(self, plan: list[Scheduled]) -> Proposal:
        """Fill the slots."""
        ...

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None:
        """The target has computed the plan."""
        ...

    def sample(self, logits: Tensor, proposal: Proposal) -> list[Sample]:
        """One sample for each of `Request.samplers`, in plan order."""
        ...


class NoSpeculation:
    """One token a step."""

    reads_hidden = False

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.stats = SpeculationStats()

    def extend(self, decodes: list[Scheduled], tables: BlockTables, budget: int) -> list[Scheduled]:
        """As they are."""
        return decodes

    def propose(self, plan: list[Scheduled]) -> Proposal:
        """Nothing."""
        return Proposal(plan, [])

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None:
        """Nobody wants to know."""

    def sample(self, logits: Tensor, proposal: Proposal) -> list[Sample]:
        """One sample for each of `Request.samplers`, in plan order."""
        requests = [each for item in proposal.plan if item.samples for each in item.request.samplers]
        return self._sampler.sample(logits, requests)


class DraftAndVerify:
    """Speculation with one proposer."""

    def __init__(
        self,
        proposer: Proposer,
        verifier: Verifier,
        lengths: Lengths,
        *,
        target_costs: CostTable,
        draft_costs: CostTable,
        max_model_len: int,
        now: Callable[[], float] = perf_counter,
    ) -> None:
        self._proposer = proposer
        self._verifier = verifier
        self._lengths = lengths
        self._target_costs = target_costs
        self._draft_costs = draft_costs
        self._max_model_len = max_model_len
        self._now = now
        self._began = 0.0
        self.stats = SpeculationStats()

    @property
    def reads_hidden(self) -> bool:
        """As the proposer does."""
        return self._proposer.reads_hidden

    def extend(self, decodes: list[Scheduled], tables: BlockTables, budget: int) -> list[Scheduled]:
        """Drafts take what is left: no request waits or loses its blocks for another one's draft.

        A draft leaves room for the token behind it, and each decoding request a block to grow into.
        """
        extended: list[Scheduled] = []
        for item, wanted in zip(decodes, self._lengths.choose(decodes), strict=True):
            request = item.request
            num = min(wanted, budget, _room(request, self._max_model_len)) if wanted else 0
            if num > 0 and tables.missing(request, request.num_tokens + num) <= tables.num_free - len(
                decodes
            ):
                tables.grow(request, request.num_tokens + num)
                budget -= num
                item = replace(item, num_draft_tokens=num)
            extended.append(item)
        return extended

    def propose(self, plan: list[Scheduled]) -> Proposal:
        """Fill the slots; some may stay empty."""
        if any(item.num_draft_tokens for item in plan):
            start = self._now()
            drafts = self._proposer.propose(plan)
            self._charge(drafts, self._now() - start)
        else:
            drafts = [NO_DRAFT] * len(plan)
        self._began = self._now()
        filled = [
            replace(item, draft_token_ids=draft.token_ids) if draft.token_ids else item
            for item, draft in zip(plan, drafts, strict=True)
        ]
        return Proposal(filled, drafts)

    def _charge(self, drafts: Sequence[Draft], seconds: float) -> None:
        """A draft's tokens are drawn one after the other, each for all requests at once."""
        self.stats.draft_s += seconds
        lengths = [len(draft.token_ids) for draft in drafts if draft.token_ids]
        if lengths:
            self._draft_costs.observe(len(lengths), seconds / max(lengths))

    def follow(self, plan: Sequence[Scheduled], hidden: Tensor) -> None:
        """The target has computed the plan."""
        self._proposer.follow(plan, hidden)

    def sample(self, logits: Tensor, proposal: Proposal) -> list[Sample]:
        """One sample for each of `Request.samplers`, in plan order."""
        samples = self._verifier.sample(logits, proposal.plan, proposal.drafts)
        seconds = self._now() - self._began
        if all(item.request.state is RequestState.RUNNING for item in proposal.plan):
            self._target_costs.observe(len(logits), seconds)
        drafted = [item for item in proposal.plan if item.draft_token_ids]
        if drafted:
            self.stats.verify_s += seconds
            outcomes = (sample for sample in samples if sample.num_draft_tokens)
            for item, sample in zip(drafted, outcomes, strict=True):
                self._learn(item, len(sample.then))
        return samples

    def _learn(self, item: Scheduled, num_accepted: int) -> None:
        num_draft_tokens, stats = len(item.draft_token_ids), self.stats
        self._proposer.rewind(item.request, num_accepted)
        self._lengths.observe(item.request, num_draft_tokens, num_accepted)
        stats.num_drafts += 1
        stats.draft_tokens += num_draft_tokens
        stats.accepted_tokens += num_accepted
        stats.emitted_tokens += num_accepted + 1
        for position in range(min(num_accepted, MAX_POSITIONS)):
            stats.accepted_by_position[position] += 1


def _room(request: Request, max_model_len: int) -> int:
    """Draft tokens that can matter: the token behind the last one is the last that the limits allow."""
    if (request.leader or request).search is not None:
        return 0
    outputs_left = request.sampling.max_tokens - len(request.output_token_ids)
    return min(outputs_left, max_model_len - request.num_tokens) - 1
