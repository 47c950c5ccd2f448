"""A process that may die of what it is asked: one question at a time, a line of JSON each way.

It is started at the first question and again after each death. It gets no secrets: its environment is what a
Python interpreter needs. `helper_child` is its side.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson

from runtime.errors import Internal, Overloaded

logger = logging.getLogger(__name__)

MAX_STARTS = 5
"""Tries to start it for one question."""

RESTART_PAUSE_S = 0.2

START_TIMEOUT_S = 30.0
"""A large tokenizer takes seconds."""

DEATH_S = 1.0
"""From the end of its streams to the end of the process."""

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONOPTIMIZE")


class HelperDied(Exception):
    """It did not survive the question, or took too long."""


class HelperRefused(Exception):
    """It cannot work at all; the message is its own."""


class Helper:
    """Our side; belongs to the event loop."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        opening: Mapping[str, Any] | None = None,
        answer_timeout_s: float,
        max_line_bytes: int,
        max_waiting: int,
    ) -> None:
        """`opening` is the line that it reads first of all."""
        self._argv = (sys.executable, "-m", module, *arguments)
        self._name = module
        self._opening = opening
        self._answer_timeout_s = answer_timeout_s
        self._max_line_bytes = max_line_bytes
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    async def start(self) -> None:
        """Have it ready for the first question; HelperRefused if it cannot work."""
        async with self._turn:
            await self._running()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The right to ask; Overloaded where too many wait for it."""
        if self._num_waiting >= self._max_waiting:
            raise Overloaded("too many requests wait to be prepared", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            async with self._turn:
                yield
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        """End it."""
        async with self._turn:
            await self._end()

    async def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer, for whoever has the turn; HelperDied or HelperRefused.

        A process that was interrupted is ended: its next line would be stale.
        """
        assert self._turn.locked()
        done = False
        try:
            answer = await self._answer(question)
            done = True
        except (TimeoutError, OSError, EOFError, ValueError):
            logger.warning("%s did not survive a question: it is started anew", self._name)
            raise HelperDied from None
        finally:
            if not done:
                await self._end()
        return answer

    async def _answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await self._exchange(question)
        except (ConnectionError, EOFError):
            if not await self._was_killed():
                raise
        return await self._exchange(question)

    async def _exchange(self, question: Mapping[str, Any]) -> dict[str, Any]:
        process = await self._running()
        async with asyncio.timeout(self._answer_timeout_s):
            await _write(process, question)
            return await _read(process)

    async def _was_killed(self) -> bool:
        """Whether it died of a SIGKILL, which is somebody else's doing: its limits end it in other ways."""
        process, self._process = self._process, None
        assert process is not None
        try:
            async with asyncio.timeout(DEATH_S):
                return await process.wait() == -signal.SIGKILL
        except TimeoutError:  # it lives, but we cannot talk to it
            await _kill(process)
            return True

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            for _ in range(MAX_STARTS - 1):
                try:
                    self._process = await self._start()
                    return self._process
                except Internal:  # a start that failed on a crowded machine may work the next time
                    await asyncio.sleep(RESTART_PAUSE_S)
            self._process = await self._start()
        return self._process

    async def _start(self) -> Process:
        """One that is ready."""
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            *self._argv,
            env=env | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,
            limit=self._max_line_bytes,
        )
        first: dict[str, Any] = {}
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                if self._opening is not None:
                    await _write(process, self._opening)
                first = await _read(process)
        except (TimeoutError, OSError, EOFError):
            logger.warning("%s did not start (exit code %s)", self._name, process.returncode)
            raise Internal(f"{self._name} does not start") from None
        finally:
            if "ready" not in first:
                await _kill(process)
        if "error" in first:
            raise HelperRefused(first["error"])
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await _kill(process)


async def _kill(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _write(process: Process, message: Mapping[str, Any]) -> None:
    """BrokenPipeError if it does not listen any more."""
    assert process.stdin is not None
    try:
        process.stdin.write(orjson.dumps(message) + b"\n")
    except RuntimeError as error:  # uvloop's word for a pipe that is closed
        raise BrokenPipeError(str(error)) from error
    await process.stdin.drain()


async def _read(process: Process) -> dict[str, Any]:
    """A line; ValueError if it is too long."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    return answer
