"""`python -m gateway.grammar_helper TOKENIZER_JSON VOCAB_SIZE`: the process that compiles clients' grammars.

It reads one JSON request per line and answers each with one line; the first line says that it is ready. A
grammar that takes more than MAX_CPU_S or MAX_BYTES kills this process and nothing else: the kernel sees to
it, whatever the library is doing. The end of its input ends it.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from llguidance import LLTokenizer

from runtime.errors import InvalidRequest
from runtime.grammars import Grammar, compile_grammar, load_tokenizer

MAX_CPU_S = 1.0
MAX_BYTES = 256 << 20
"""Beyond what the process takes with its tokenizer loaded."""

READY = {"ready": True}


def main(argv: list[str]) -> int:
    """Answer until the input ends."""
    file, vocab_size = Path(argv[0]), int(argv[1])
    try:
        # Which token ends a text does not matter to whether a grammar is good.
        tokenizer = load_tokenizer(file, vocab_size=vocab_size, end_token_ids=(0,))
    except InvalidRequest as error:
        _answer({"error": error.message})
        return 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _address_space() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _silence()
    _answer(READY)
    for line in sys.stdin:
        _answer({"error": _judge(tokenizer, json.loads(line))})
    return 0


def _judge(tokenizer: LLTokenizer, request: dict[str, str]) -> str | None:
    """What is wrong with a grammar; None: nothing. SIGPROF's default action ends the process."""
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        matcher = compile_grammar(tokenizer, Grammar(request["kind"], request["text"]))  # type: ignore[arg-type]
        matcher.compute_bitmask()
        return matcher.get_error() or None
    except InvalidRequest as error:
        return error.message
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _silence() -> None:
    """From now on nothing goes to the gateway's log: a library's last words may quote a client's grammar."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _answer(answer: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
