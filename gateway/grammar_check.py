"""Judges clients' grammars before any worker is bothered, in a helper process that may die of them.

One helper, started at the first grammar and again after each death; one grammar at a time; verdicts are
kept. A grammar that the helper does not survive is too expensive, and that is the client's error.
"""

import asyncio
import hashlib
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from pathlib import Path
from typing import Any

from runtime.errors import Internal, InvalidRequest, Overloaded
from runtime.grammars import FIELD, Grammar

logger = logging.getLogger(__name__)

HELPER = "gateway.grammar_helper"

MAX_STARTS = 5
"""Tries to start the helper for one grammar."""

RESTART_PAUSE_S = 0.2

START_TIMEOUT_S = 30.0
"""A large tokenizer takes seconds."""

JUDGE_TIMEOUT_S = 4.0
"""On the wall; the helper's own limit is CPU time."""

MAX_WAITING = 64
MAX_VERDICTS = 4096
MAX_LINE_BYTES = 1 << 20

TOO_EXPENSIVE = f"{FIELD}: takes too long or too much memory to compile"


class GrammarCheck:
    """Verdicts on grammars, and the helper that finds them; belongs to the event loop."""

    def __init__(self, tokenizer_file: Path, vocab_size: int) -> None:
        self._argv = (sys.executable, "-m", HELPER, str(tokenizer_file), str(vocab_size))
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._helper: Process | None = None

    async def check(self, grammar: Grammar) -> None:
        """Return if workers can obey the grammar; InvalidRequest says why not."""
        verdict = await self._verdict(grammar)
        if verdict is not None:
            raise InvalidRequest(verdict, field=FIELD)

    async def close(self) -> None:
        """End the helper."""
        async with self._turn:
            await self._end_helper()

    async def _verdict(self, grammar: Grammar) -> str | None:
        key = hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode()).digest()
        if key not in self._verdicts:
            if self._num_waiting >= MAX_WAITING:
                raise Overloaded("too many grammars wait to be judged", retry_after_s=1.0)
            self._num_waiting += 1
            try:
                async with self._turn:
                    if key not in self._verdicts:
                        self._keep(key, await self._ask(grammar))
            finally:
                self._num_waiting -= 1
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    def _keep(self, key: bytes, verdict: str | None) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

    async def _ask(self, grammar: Grammar) -> str | None:
        """The helper's verdict. A helper that was interrupted is ended: its next line would be stale."""
        helper = await self._running()
        assert helper.stdin is not None
        done = False
        try:
            async with asyncio.timeout(JUDGE_TIMEOUT_S):
                helper.stdin.write(json.dumps({"kind": grammar.kind, "text": grammar.text}).encode() + b"\n")
                await helper.stdin.drain()
                answer = await _read(helper)
            done = True
        except (TimeoutError, OSError, EOFError):
            logger.warning("a %s was too expensive: the grammar helper is started anew", grammar.kind)
            return TOO_EXPENSIVE
        finally:
            if not done:
                await self._end_helper()
        error: str | None = answer["error"]
        return error

    async def _running(self) -> Process:
        if self._helper is None or self._helper.returncode is not None:
            for _ in range(MAX_STARTS - 1):
                try:
                    self._helper = await self._start()
                    return self._helper
                except Internal:  # a start that failed on a crowded machine may work the next time
                    await asyncio.sleep(RESTART_PAUSE_S)
            self._helper = await self._start()
        return self._helper

    async def _start(self) -> Process:
        """A helper that is ready."""
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        helper = await asyncio.create_subprocess_exec(
            *self._argv,
            env=env,
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        first: dict[str, Any] = {}
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                first = await _read(helper)
        except (TimeoutError, EOFError):
            logger.warning("the grammar helper did not start (exit code %s)", helper.returncode)
            raise Internal("the grammar helper does not start") from None
        finally:
            if "ready" not in first:
                await _end(helper)
        if "error" in first:
            raise InvalidRequest(first["error"], field=FIELD)
        return helper

    async def _end_helper(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            await _end(helper)


async def _end(helper: Process) -> None:
    if helper.returncode is None:
        helper.kill()
    await helper.wait()


async def _read(helper: Process) -> dict[str, Any]:
    assert helper.stdout is not None
    line = await helper.stdout.readline()
    if not line:
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    return answer
