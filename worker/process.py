"""The first lines of a worker process: settings and thread limits, before torch is imported."""

import os
import sys
from collections.abc import Awaitable, Callable

from runtime import config, lifecycle, logs
from runtime.access import require_internal_secret
from runtime.errors import StartupError
from runtime.lifecycle import Shutdown
from runtime.settings import WorkerSettings

Serve = Callable[[WorkerSettings, Shutdown], Awaitable[None]]


def main(role: str, load: Callable[[], Serve]) -> None:
    """Run a worker to its end and leave the process.

    `load` imports the role, and torch with it; it is called after the thread limits are set. The process
    leaves without the interpreter's teardown: threads that wait inside gloo cannot be joined.
    """
    try:
        settings = config.parse(WorkerSettings, sys.argv[1:], prog=f"tandem {role}")
        require_internal_secret(settings.host, settings.internal_secret)
    except StartupError as error:
        config.fail(error)
    limit_threads(settings.threads)
    logs.setup(settings.worker_id or role, settings.log_level, settings.log_format)
    serve = load()
    code = lifecycle.run(lambda shutdown: serve(settings, shutdown))
    sys.stdout.flush()
    logs.last_words()
    os._exit(code)


def limit_threads(threads: int) -> None:
    """Fix the OpenMP team before torch starts it.

    An idle team spins by default: with a second busy process on the machine a 0.3 ms step then takes
    11 ms. So the team sleeps when it waits.
    """
    assert "torch" not in sys.modules
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
