"""One process that `tandem up` started: its output, its signals, its end."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")

ERROR_PREFIX = "error: "
"""How a process of ours begins the one line that says why it cannot start."""

OUTPUT_LINE_LIMIT = 1 << 20


class Child:
    """A running process in a session of its own, bound to our life by the guard.

    Its stderr goes through to ours, but for `error:` lines: the last of these is kept in `error`, for whoever
    judges the exit. Its stdout is ours to read, line by line.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.error: str | None = None
        self.pid = process.pid

    @classmethod
    async def start(cls, argv: Sequence[str], env: Mapping[str, str]) -> "Child":
        """Start `argv`; `argv[0]` is the path of a program."""
        guarded = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *argv]
        process = await asyncio.create_subprocess_exec(
            *guarded,
            env=dict(env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=OUTPUT_LINE_LIMIT,
        )
        return cls(process)

    async def run(self, on_stdout: Callable[[str], None]) -> int:
        """Pass its output on until it ends; returns the exit code, -N for signal N."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(_pump(self._process.stdout, on_stdout))
            pumps.create_task(_pump(self._process.stderr, self._on_stderr))
            code = await self._process.wait()
            # What it left behind in its session must not hold our end of its pipes open.
            self._signal_group(signal.SIGKILL)
        return code

    def _on_stderr(self, line: str) -> None:
        if line.startswith(ERROR_PREFIX):
            self.error = line.removeprefix(ERROR_PREFIX)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def terminate(self) -> None:
        """SIGTERM to the process itself: it drains and ends its own children."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process and all that it started."""
        if self._process.returncode is None:
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # the whole group is gone, as it should be


async def _pump(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    """Feed lines to `on_line` until end of file; a line over the limit is passed on in pieces."""
    while True:
        try:
            line = await stream.readuntil()
        except asyncio.IncompleteReadError as end:
            line = end.partial
        except asyncio.LimitOverrunError as overrun:
            line = await stream.read(overrun.consumed)
        if not line:
            return
        on_line(line.decode(errors="replace").rstrip("\n"))
