"""What a generated text must match, compiled by llguidance: the one place that knows its notation and limits.

Gateways compile to judge a client's grammar, workers to obey it; both get the same verdict.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from runtime.errors import InvalidRequest

FIELD = "structured_output"

GrammarKind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]

LIMITS = LLParserLimits(
    max_lexer_states=50_000,  # 1 to 2 kB each
    step_lexer_fuel=200_000,  # 14k per millisecond
    step_max_items=50_000,  # 20k per millisecond
    verbose_errors=False,
)
"""llguidance's own bounds on compiling and on a single mask; what runs into one fails alone."""

ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint as the client wrote it."""

    kind: GrammarKind
    text: str
    """JSON schema, regular expression, Lark or GBNF grammar, or a JSON list of choices."""

    @classmethod
    def of(cls, kind: GrammarKind, value: str | bool | Sequence[str]) -> "Grammar":
        """From what stands on the wire: a text, the flag of `json_object`, or the choices."""
        if isinstance(value, bool):
            return cls(kind, "")
        return cls(kind, value if isinstance(value, str) else json.dumps(list(value)))


def load_tokenizer(file: Path, *, vocab_size: int, end_token_ids: tuple[int, ...]) -> LLTokenizer:
    """llguidance's view of a tokenizer.json. It takes about a second for 100,000 tokens.

    InvalidRequest if the tokenizer is none that llguidance can use.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(end_token_ids))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{FIELD}: not available for this model ({error})", field=FIELD) from error


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the start of the grammar; InvalidRequest says what is wrong with the grammar."""
    try:
        matcher = LLMatcher(tokenizer, _notation(grammar), limits=LIMITS, log_level=0)
    except ValueError as error:
        raise _refusal(str(error)) from None
    if matcher.is_error():
        raise _refusal(matcher.get_error())
    return matcher


def _notation(grammar: Grammar) -> str:
    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema(ANY_OBJECT)
    if grammar.kind == "choice":
        texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark("start: " + " | ".join(texts))
    return grammar_from(grammar.kind, grammar.text)


def _refusal(reason: str) -> InvalidRequest:
    first_line = (reason.strip().splitlines() or ["not usable"])[0]
    return InvalidRequest(f"{FIELD}: {first_line[:300]}", field=FIELD)
