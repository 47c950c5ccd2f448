"""Judges clients' grammars before any worker is bothered, in a helper process that may die of them.

One grammar at a time; verdicts are kept. A grammar that the helper does not survive is too expensive, and
that is the client's error.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path

from gateway.helper import Helper, HelperDied, HelperRefused
from runtime.errors import InvalidRequest
from runtime.grammars import FIELD, Grammar

HELPER = "gateway.grammar_helper"

JUDGE_TIMEOUT_S = 4.0
"""On the wall; the helper's own limit is CPU time."""

MAX_WAITING = 64
MAX_VERDICTS = 4096
MAX_LINE_BYTES = 1 << 20

TOO_EXPENSIVE = f"{FIELD}: takes too long or too much memory to compile"


class GrammarCheck:
    """Verdicts on grammars, and the helper that finds them; belongs to the event loop."""

    def __init__(self, tokenizer_file: Path, vocab_size: int) -> None:
        self._helper = Helper(
            HELPER,
            str(tokenizer_file),
            str(vocab_size),
            answer_timeout_s=JUDGE_TIMEOUT_S,
            max_line_bytes=MAX_LINE_BYTES,
            max_waiting=MAX_WAITING,
        )
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: Grammar) -> None:
        """Return if workers can obey the grammar; InvalidRequest says why not."""
        verdict = await self._verdict(grammar)
        if verdict is not None:
            raise InvalidRequest(verdict, field=FIELD)

    async def close(self) -> None:
        """End the helper."""
        await self._helper.close()

    async def _verdict(self, grammar: Grammar) -> str | None:
        key = hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode()).digest()
        if key not in self._verdicts:
            async with self._helper.turn():
                if key not in self._verdicts:  # somebody before us may have asked for the same
                    self._keep(key, await self._ask(grammar))
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    def _keep(self, key: bytes, verdict: str | None) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    async def _ask(self, grammar: Grammar) -> str | None:
        try:
            answer = await self._helper.ask({"kind": grammar.kind, "text": grammar.text})
        except HelperDied:
            return TOO_EXPENSIVE
        except HelperRefused as refused:
            raise InvalidRequest(str(refused), field=FIELD) from None
        error: str | None = answer["error"]
        return error
