"""Compiles the grammars of new attempts beside the engine thread and the event loop.

The role sees an attempt only when the engine knows its grammar; until then an abort ends it here. The
gateway has judged the grammar already, so what is refused here did not come through a gateway of ours.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from protos.tandem.v1 import common_pb2 as pb
from runtime.errors import InvalidRequest, Overloaded, TandemError
from runtime.grammars import FIELD, Grammar
from worker.attach import AttemptHandler, AttemptKey
from worker.convert import to_grammar

COMPILE_TIMEOUT_S = 5.0
"""Waiting for other grammars included."""

TOO_LATE = InvalidRequest(f"{FIELD}: takes too long to compile", field=FIELD)

MAX_COMPILING = 256
"""Attempts that wait for their grammar."""


class Compiler(Protocol):
    """Thread-safe; keeps what it has compiled."""

    def __contains__(self, grammar: Grammar) -> bool:
        """Whether `compile` returns at once."""
        ...

    def compile(self, grammar: Grammar) -> object:
        """Compile and keep; InvalidRequest says what is wrong with the grammar."""
        ...


class GrammarIntake:
    """An AttemptHandler in front of the role's own; belongs to the event loop."""

    def __init__(
        self,
        handler: AttemptHandler,
        compiler: Compiler,
        fail: Callable[[AttemptKey, TandemError], None],
    ) -> None:
        self._handler = handler
        self._compiler = compiler
        self._fail = fail
        self._compiling: dict[AttemptKey, asyncio.Future[object]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def submit(self, key: AttemptKey, submit: pb.Submit) -> None:
        """Pass the attempt on, now or when its grammar is compiled."""
        grammar = to_grammar(submit.sampling)
        if grammar is None or grammar in self._compiler:
            self._handler.submit(key, submit)
        elif len(self._compiling) >= MAX_COMPILING:
            raise Overloaded("too many grammars wait to be compiled", retryable=True)
        else:
            self._compile(key, submit, grammar)

    def abort(self, key: AttemptKey) -> None:
        """Give an attempt up, whether or not the role has seen it."""
        compiling = self._compiling.pop(key, None)
        if compiling is None:
            self._handler.abort(key)
        else:
            compiling.cancel()

    def abort_choice(self, key: AttemptKey, choice: int) -> None:
        """End a choice that decodes; then the role has seen its attempt."""
        self._handler.abort_choice(key, choice)

    def _compile(self, key: AttemptKey, submit: pb.Submit, grammar: Grammar) -> None:
        loop = asyncio.get_running_loop()
        compiling = loop.run_in_executor(self._thread, self._compiler.compile, grammar)
        self._compiling[key] = compiling
        deadline = loop.call_later(COMPILE_TIMEOUT_S, self._give_up, key, TOO_LATE)

        def done(_: asyncio.Future[object]) -> None:
            deadline.cancel()
            self._compiled(key, submit)

        compiling.add_done_callback(done)

    def _compiled(self, key: AttemptKey, submit: pb.Submit) -> None:
        compiling = self._compiling.get(key)
        if compiling is None or compiling.cancelled():
            return
        try:
            compiling.result()
            del self._compiling[key]
            self._handler.submit(key, submit)
        except TandemError as error:
            self._give_up(key, error)

    def _give_up(self, key: AttemptKey, error: TandemError) -> None:
        compiling = self._compiling.pop(key, None)
        if compiling is not None:
            compiling.cancel()
        self._fail(key, error)
