"""How many tokens are drafted for each request in a step.

With acceptance rate a, a draft of k tokens is expected to emit (1 - a^(k+1)) / (1 - a) tokens (Leviathan et
al. 2022, arXiv 2211.17192). `AdaptiveLengths` asks what that costs here and now: the target's pass over all
rows and k passes of the draft, both as measured. It drafts only where that is worth more tokens a second than
not to draft, so no load makes it slower than no speculation, but for a probe now and then.
"""

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

from engine.plan import Scheduled
from engine.request import Request
from engine.speculative.costs import CostTable

PRIOR_ACCEPTANCE = 0.7
"""Assumed of the first request."""
PRIOR_WEIGHT = 4.0
"""Draft tokens that the prior counts for, in a new request's rate."""
MEMORY_TOKENS = 48.0
"""Draft tokens that a rate remembers."""
MIN_GAIN = 1.03
"""Tokens a second, by the estimate, for which it is worth to draft."""
FIRST_PROBE_STEPS = 128
"""Steps without a draft after which one is tried again; doubled each time it does not pay."""
MAX_PROBE_STEPS = 1024
MIN_PLAIN_STEPS = 4
"""Steps without a draft, of a size, before one with drafts is compared with them."""
RECONSIDER_STEPS = 8
"""A batch for which drafts do not pay is asked again after so many steps: asking costs time, too."""
REFRESH_STEPS = 64
"""Steps with drafts after which one has none: what it costs must not be an old story."""


class AcceptanceRate:
    """Running share of draft tokens that were accepted, of those that were judged.

    Behind the first rejection nothing is judged: k tokens with m accepted are min(m + 1, k) judgements.
    """

    __slots__ = ("_accepted", "_judged")

    def __init__(self, prior: float) -> None:
        self._accepted = prior * PRIOR_WEIGHT
        self._judged = PRIOR_WEIGHT

    @property
    def value(self) -> float:
        """In (0, 1)."""
        return (self._accepted + 0.01) / (self._judged + 0.02)

    def observe(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Take in one draft."""
        fade = max(1.0 - num_draft_tokens / MEMORY_TOKENS, 0.0)
        self._accepted = self._accepted * fade + num_accepted
        self._judged = self._judged * fade + min(num_accepted + 1, num_draft_tokens)


class Lengths(Protocol):
    """Decides how much is drafted."""

    def choose(self, plan: Sequence[Scheduled]) -> list[int]:
        """Draft tokens of each decoding request."""
        ...

    def observe(self, request: Request, num_draft_tokens: int, num_accepted: int) -> None:
        """What became of a draft."""
        ...


class FixedLengths:
    """The same number for everybody."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens

    def choose(self, plan: Sequence[Scheduled]) -> list[int]:
        """Draft tokens of each decoding request."""
        return [self._num_draft_tokens] * len(plan)

    def observe(self, request: Request, num_draft_tokens: int, num_accepted: int) -> None:
        """Nothing depends on it."""


class AdaptiveLengths:
    """Per request and step, from acceptance rates and measured costs."""

    def __init__(self, target: CostTable, draft: CostTable, *, max_draft_tokens: int) -> None:
        self._target = target
        self._draft = draft
        self._max = max_draft_tokens
        self._overall = AcceptanceRate(PRIOR_ACCEPTANCE)
        self._rates: WeakKeyDictionary[Request, AcceptanceRate] = WeakKeyDictionary()
        self._idle_steps = 0
        self._probe_after = FIRST_PROBE_STEPS
        self._drafted_steps = 0
        self._not_worth_it = 0
        """Size of the batch for which drafts were last found not to pay; 0: they paid."""

    def observe(self, request: Request, num_draft_tokens: int, num_accepted: int) -> None:
        """What became of a draft."""
        self._overall.observe(num_draft_tokens, num_accepted)
        self._rate(request).observe(num_draft_tokens, num_accepted)

    def choose(self, plan: Sequence[Scheduled]) -> list[int]:
        """Draft tokens of each decoding request."""
        if not plan:
            return []
        if self._must_refresh(len(plan)):
            return [0] * len(plan)
        if self._not_worth_it == len(plan) and self._idle_steps % RECONSIDER_STEPS:
            return [self._probe()] * len(plan)
        rates = [self._rate(item.request).value for item in plan]
        mean = sum(rates) / len(rates)
        longest = self._worthwhile(len(plan), mean)
        if longest:
            self._drafted_steps += 1
            self._idle_steps, self._probe_after = 0, FIRST_PROBE_STEPS
            self._not_worth_it = 0
            return [self._cut(longest, rate, len(plan)) for rate in rates]
        self._not_worth_it = len(plan)
        return [self._probe()] * len(plan)

    def expected_speedup(self, num_requests: int, rate: float, num_draft_tokens: int) -> float:
        """Tokens a second with drafts of this length over without, by the measured costs; 1 if unknown."""
        plain = self._target.estimate(num_requests)
        drafted = self._target.estimate(num_requests * (num_draft_tokens + 1))
        cost = drafted + num_draft_tokens * self._draft.estimate(num_requests)
        return expected_tokens(rate, num_draft_tokens) * plain / cost if cost else 1.0

    def _must_refresh(self, num_requests: int) -> bool:
        """Whether too little is known of what a step without drafts costs."""
        if self._target.num_observed(num_requests) < MIN_PLAIN_STEPS:
            return True
        if self._drafted_steps < REFRESH_STEPS:
            return False
        self._drafted_steps = 0
        return True

    def _worthwhile(self, num_requests: int, rate: float) -> int:
        """The length with the best speed-up; 0 if none is worth it."""
        if not self._target.estimate(num_requests):
            return 0
        gains = [self.expected_speedup(num_requests, rate, k) for k in range(1, self._max + 1)]
        best = max(gains, default=0.0)
        return gains.index(best) + 1 if best >= MIN_GAIN else 0

    def _cut(self, longest: int, rate: float, num_requests: int) -> int:
        """Shorter where a request's own rate makes the last tokens cost more than they bring."""
        plain = self._target.estimate(num_requests)
        row_s = (self._target.estimate(num_requests * (longest + 1)) - plain) / (num_requests * longest)
        length = longest
        while length > 0 and rate**length * plain < row_s * num_requests:
            length -= 1
        return length

    def _probe(self) -> int:
        """Nothing, or now and then one token for everybody: rates and costs may have changed."""
        self._idle_steps += 1
        if self._idle_steps < self._probe_after:
            return 0
        self._idle_steps, self._probe_after = 0, min(2 * self._probe_after, MAX_PROBE_STEPS)
        return min(1, self._max)

    def _rate(self, request: Request) -> AcceptanceRate:
        rate = self._rates.get(request)
        if rate is None:
            rate = self._rates[request] = AcceptanceRate(self._overall.value)
        return rate


def expected_tokens(rate: float, num_draft_tokens: int) -> float:
    """Tokens that a draft emits, the target's own included."""
    return (1 - rate ** (num_draft_tokens + 1)) / (1 - rate) if rate < 1 else num_draft_tokens + 1.0
