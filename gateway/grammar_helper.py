"""`python -m gateway.grammar_helper TOKENIZER_JSON VOCAB_SIZE`: the process that compiles clients' grammars.

It reads one JSON request per line and answers each with one line; the first line says that it is ready. A
grammar that takes too much time or memory (`helper_child`) kills this process and nothing else. The end of
its input ends it.
"""

import sys
from pathlib import Path

from llguidance import LLTokenizer

from gateway.helper_child import answer, limited_time, ready
from runtime.errors import InvalidRequest
from runtime.grammars import Grammar, compile_grammar, load_tokenizer


def main(argv: list[str]) -> int:
    """Answer until the input ends."""
    file, vocab_size = Path(argv[0]), int(argv[1])
    try:
        # Which token ends a text does not matter to whether a grammar is good.
        tokenizer = load_tokenizer(file, vocab_size=vocab_size, end_token_ids=(0,))
    except InvalidRequest as error:
        answer({"error": error.message})
        return 1
    for request in ready():
        answer({"error": _judge(tokenizer, request)})
    return 0


def _judge(tokenizer: LLTokenizer, request: dict[str, str]) -> str | None:
    """What is wrong with a grammar; None: nothing."""
    with limited_time():
        try:
            matcher = compile_grammar(tokenizer, Grammar(request["kind"], request["text"]))  # type: ignore[arg-type]
            matcher.compute_bitmask()
            return matcher.get_error() or None
        except InvalidRequest as error:
            return error.message


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
