"""Structured output: which tokens keep a text inside its grammar.

`Grammars` compiles and keeps grammars; a `Constraint` is one request's place in its grammar and a function of
the request's output tokens alone, so a request that moves replays them and goes on.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from runtime.grammars import Grammar, compile_grammar, load_tokenizer

MAX_GRAMMARS = 128
"""Compiled grammars that are kept; the least recently used one goes first."""


class Constraint:
    """One request's place in its grammar, kept by llguidance."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self._num_tokens = 0

    @property
    def failed(self) -> bool:
        """The tokens left the grammar, or a step was too expensive: no token may follow."""
        return self.matcher.is_error()

    @property
    def complete(self) -> bool:
        """The text matches and nothing may follow."""
        return self.matcher.is_stopped() and not self.failed

    def catch_up(self, output_token_ids: Sequence[int]) -> None:
        """Take in the output tokens that are new since the last call."""
        new = output_token_ids[self._num_tokens :]
        if new:
            self.matcher.consume_tokens(list(new))
            self._num_tokens = len(output_token_ids)


def fill_masks(constraints: Sequence[Constraint], masks: NDArray[np.int32]) -> None:
    """Write a row of `masks` for each constraint: one bit per token that may follow.

    masks: [len(constraints), ceil(vocab_size / 32)]. A complete text is followed by end tokens alone, a
    constraint that has failed by nothing. All rows are computed at once, without the interpreter lock.
    """
    rows = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
    fill_next_token_bitmask_par(_executor(), rows, masks)
    for row, constraint in enumerate(constraints):
        if constraint.failed:
            masks[row] = 0


class Grammars:
    """Compiled grammars of one model. Thread-safe; compiling holds no lock that `start` needs."""

    def __init__(
        self,
        tokenizer_file: Path,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_grammars: int = MAX_GRAMMARS,
    ) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_grammars = max_grammars
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def __contains__(self, grammar: Grammar) -> bool:
        """Whether `compile` returns at once."""
        with self._lock:
            return grammar in self._compiled

    def compile(self, grammar: Grammar) -> LLMatcher:
        """The grammar's matcher, at its start and never advanced; InvalidRequest if there is none."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
                return matcher
        matcher = compile_grammar(self._load_tokenizer(), grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > self._max_grammars:
                self._compiled.popitem(last=False)
        return matcher

    def start(self, grammar: Grammar) -> Constraint:
        """A constraint at the start of the grammar, compiled now if it was not before."""
        return Constraint(self.compile(grammar).deep_copy())

    def _load_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(
                    self._file, vocab_size=self._vocab_size, end_token_ids=self._eos_token_ids
                )
            return self._tokenizer


@functools.cache
def _executor() -> LLExecutor:
    return LLExecutor()
