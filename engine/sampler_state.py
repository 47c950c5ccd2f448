"""What the sampler remembers of a request between two steps, so that no step looks at old tokens again.

It is a function of the request's parameters and tokens alone: a request that moves, or is computed anew,
finds the same state.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.request import Request
from engine.structured import Constraint, Grammars
from engine.token_counts import TokenCounts

Ids = NDArray[np.int64]

NO_IDS: Ids = np.zeros(0, dtype=np.int64)


class SamplerState:
    """Of one request whose parameters edit logits."""

    def __init__(
        self,
        request: Request,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        grammars: Grammars | None = None,
    ) -> None:
        params = request.sampling
        self.bias_ids = as_ids(tuple(params.logit_bias))
        self.biases = np.array(tuple(params.logit_bias.values()), dtype=np.float32)
        self.counts: TokenCounts | None = None
        """Kept if a penalty needs it; of the prompt, only a repetition penalty asks."""
        if params.repetition_penalty != 1 or params.penalizes_output:
            self.counts = TokenCounts(request.prompt_token_ids if params.repetition_penalty != 1 else ())
        self.allowed = pack_mask(params.allowed_token_ids, vocab_size) if params.allowed_token_ids else None
        """Bit mask of the tokens that may be sampled, int32 [mask_words(vocab_size)]; None: all."""
        self.constraint: Constraint | None = None
        """Set if there is a grammar."""
        if params.grammar is not None:
            assert grammars is not None
            self.constraint = grammars.start(params.grammar)
        self._end_ids = as_ids(params.stop_token_ids + (() if params.ignore_eos else tuple(eos_token_ids)))
        ends = {(token_id,) for token_id in eos_token_ids}
        words = [word for word in params.bad_words if word not in ends]
        self._bad_ids = as_ids([word[0] for word in words if len(word) == 1])
        self._bad_words: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        """Longer ones, by the token before their last."""
        for word in words:
            if len(word) > 1:
                self._bad_words[word[-2]].append(word)
        self._num_outputs = 0

    @property
    def is_masked(self) -> bool:
        """Only some tokens may be sampled."""
        return self.allowed is not None or self.constraint is not None

    def catch_up(self, request: Request) -> None:
        """Take in the output tokens that are new since the last call."""
        if self.counts is not None:
            self.counts.emit(request.output_token_ids[self._num_outputs :])
        if self.constraint is not None:
            self.constraint.catch_up(request.output_token_ids)
        self._num_outputs = len(request.output_token_ids)

    def forbidden(self, request: Request) -> list[Ids]:
        """Tokens that would complete a bad word, or end the request before min_tokens."""
        found = [self._bad_ids] if len(self._bad_ids) else []
        if len(request.output_token_ids) < request.sampling.min_tokens:
            found.append(self._end_ids)
        if self._bad_words:
            [latest] = request.tokens(request.num_tokens - 1, request.num_tokens)
            words = self._bad_words.get(latest, ())
            found.append(as_ids([word[-1] for word in words if _is_begun(word, request)]))
        return found


def _is_begun(word: tuple[int, ...], request: Request) -> bool:
    """All but the last token of the word are the sequence's latest tokens."""
    start = request.num_tokens - len(word) + 1
    return start >= 0 and tuple(request.tokens(start, request.num_tokens)) == word[:-1]


def as_ids(token_ids: Sequence[int]) -> Ids:
    """int64 array of token ids."""
    return np.array(token_ids, dtype=np.int64) if token_ids else NO_IDS


def mask_words(vocab_size: int) -> int:
    """32-bit words of a bit mask over the vocabulary."""
    return -(-vocab_size // 32)


def pack_mask(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """Bit mask with these tokens' bits set, int32 [mask_words(vocab_size)]; token 0 is the lowest bit."""
    bits = np.zeros(mask_words(vocab_size) * 32, dtype=np.uint8)
    bits[as_ids(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
