"""The life of a process: start, serve, drain.

1. `run` installs uvloop and two signal handlers: the first SIGTERM or SIGINT asks for a drain, the
   second ends the process at once.
2. `main(shutdown)` starts its servers, waits for `shutdown.requested` and drains within its deadline.
3. A StartupError is one line on stderr and exit code 2.
"""

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

from runtime.clock import SystemClock
from runtime.config import fail
from runtime.errors import StartupError

logger = logging.getLogger(__name__)


LAG_INTERVAL_S = 0.25
"""How often the event loop is asked how late it is."""


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Observe, in seconds, how long the event loop makes a due task wait; until cancelled."""
    clock = SystemClock()
    while True:
        due_s = clock.now() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        observe(max(clock.now() - due_s, 0.0))


def settle() -> None:
    """What is loaded stays: the garbage collector need not look at it again, in the middle of a step."""
    gc.collect()
    gc.freeze()


class Shutdown:
    """Set once; everything that serves waits for it."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.exit_code = 0

    def request(self, reason: str, exit_code: int = 0) -> None:
        """Ask for a drain; the first exit code that is not 0 wins."""
        self.exit_code = self.exit_code or exit_code
        if not self.requested.is_set():
            logger.info("shutting down: %s", reason)
            self.requested.set()


def run(main: Callable[[Shutdown], Awaitable[None]]) -> int:
    """Run a process to its end; returns the exit code."""
    _allow_open_files()
    try:
        return uvloop.run(_supervise(main))
    except StartupError as error:
        fail(error)
    except KeyboardInterrupt:
        return 130


def _allow_open_files() -> None:
    """A connection is an open file, and many systems let a process have 1,024 unless it asks for more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _supervise(main: Callable[[Shutdown], Awaitable[None]]) -> int:
    loop = asyncio.get_running_loop()
    shutdown = Shutdown()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, shutdown, number)
    loop.set_exception_handler(_on_loop_error)
    await main(shutdown)
    return shutdown.exit_code


def _on_signal(shutdown: Shutdown, number: signal.Signals) -> None:
    if shutdown.requested.is_set():
        sys.stderr.flush()
        os._exit(130 if number == signal.SIGINT else 143)
    shutdown.request(number.name)


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """grpc.aio's poller wakes every loop of a process; the losers' EAGAIN is harmless noise."""
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The first leaf of a TaskGroup's error: what a person wants to read."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
