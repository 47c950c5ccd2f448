"""`tandem up`: from its settings to one gateway and its workers, running on this machine."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from runtime import logs
from runtime.access import is_loopback
from runtime.checkpoint_dir import resolve
from runtime.config import fail, parse, secrets_env, to_argv
from runtime.errors import StartupError
from runtime.lifecycle import Shutdown, first_error, run
from runtime.settings import GatewaySettings, ProcessSettings, UpSettings, WorkerSettings
from runtime.version import VERSION
from tandem.fleet import Fleet, FleetPlan, Listening

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
"""Where our packages lie: a checkout, or site-packages."""

MODULES = {"gateway": "gateway", "prefill": "prefill_svc", "decode": "decode_svc"}
"""Command name -> the module that is that process."""

P = TypeVar("P", bound=ProcessSettings)


def program(role: str) -> list[str]:
    """Interpreter and module of one process, whatever the working directory holds."""
    return [sys.executable, "-P", "-m", MODULES[role]]


def child_env(environ: Mapping[str, str], *, threads: int | None = None) -> dict[str, str]:
    """Environment in which our processes start.

    A spinning OpenMP barrier costs 10 ms as soon as another process wants the core, and libgomp reads
    its variables once, when torch is loaded; so they are set here, unless the user has set them.
    """
    quiet = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "GRPC_VERBOSITY": "ERROR"}
    env = {**quiet, **environ, "PYTHONUNBUFFERED": "1"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    if ROOT.name != "site-packages":
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    return env


def share(cls: type[P], settings: UpSettings, **own: Any) -> P:
    """The part of `settings` that a process of this class knows, and what is its own."""
    common = cls.model_fields.keys() & type(settings).model_fields.keys()
    return cls(**({name: getattr(settings, name) for name in common} | own))


def located_model(name: str) -> str:
    """What children are given as --model: an absolute directory, or a hub id that is in the local cache."""
    path = resolve(name, weights=True)
    return str(path) if not name or Path(name).expanduser().is_dir() else name


def with_secrets(settings: UpSettings) -> UpSettings:
    """`settings` with new secrets where none are given: our own calls are never open to others."""
    missing = [name for name in ("internal_secret", "admin_key") if not getattr(settings, name)]
    return settings.model_copy(update={name: secrets.token_urlsafe(32) for name in missing})


def with_peer_directory(settings: UpSettings, stack: contextlib.ExitStack) -> UpSettings:
    """`settings` with a directory, there while `stack` is open, in which several gateway processes meet."""
    if settings.gateway_processes == 1 or settings.peer_directory:
        return settings
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-", ignore_cleanup_errors=True))
    return settings.model_copy(update={"peer_directory": directory})


def fleet_plan(
    settings: UpSettings,
    environ: Mapping[str, str] = os.environ,
    program: Callable[[str], list[str]] = program,
) -> FleetPlan:
    """Commands of every process."""
    settings = with_secrets(settings)
    own: dict[str, Any] = {"model": located_model(settings.model)}
    # Only the two public ports are for others: our processes are all on this machine.
    inner = settings.host if is_loopback(settings.host) else "127.0.0.1"
    if settings.log_format == "auto":  # children write into our pipe, but it ends where our stderr does
        own["log_format"] = "text" if sys.stderr.isatty() else "json"

    def gateway(before: Listening | None) -> list[str]:
        ports = _same_ports(before) if before else {}
        ports["internal_host"] = settings.internal_host or inner
        return program("gateway") + to_argv(share(GatewaySettings, settings, **own, **ports))

    def worker(role: str, worker_id: str, ranks: Mapping[str, Any]) -> Callable[[Listening], list[str]]:
        def command(listening: Listening) -> list[str]:
            place = {
                "gateway": listening.internal.split(","), "worker_id": worker_id, "host": inner, **ranks
            }  # fmt: skip
            return program(role) + to_argv(
                share(WorkerSettings, settings, **own, **place, port=0, metrics_port=0)
            )

        return command

    pools = {role: ranks_of_pool(settings, role) for role in ("prefill", "decode")}
    crowds = Counter(device for pool in pools.values() for ranks in pool for device in _gpus(ranks))
    workers = {
        f"{role}-{i}": worker(role, f"{role}-{i}", ranks | _share_of_memory(settings, ranks, crowds))
        for role, pool in pools.items()
        for i, ranks in enumerate(pool)
    }
    env = child_env(environ, threads=settings.threads) | secrets_env(settings)
    return FleetPlan(
        gateway=gateway,
        gateway_processes=settings.gateway_processes,
        workers=workers,
        env=env,
        admin_key=settings.admin_key,
        restart_stuck_after_s=settings.restart_stuck_after_s,
    )


def ranks_of_pool(settings: UpSettings, role: str) -> list[dict[str, Any]]:
    """Tensor parallel size and devices of each worker of a role; StartupError if there are not enough."""
    count: int = getattr(settings, role)
    size: int = getattr(settings, f"{role}_tp")
    flag, devices = f"--{role}-devices", getattr(settings, f"{role}_devices")
    names = [name.strip() for name in devices.split(",")] if devices else [""] * (count * size)
    if len(names) != count * size:
        raise StartupError(
            f"{flag} {devices}: {count} {role} workers with --{role}-tp {size} need {count * size} devices, "
            f"got {len(names)}"
        )
    shares = [names[i * size : (i + 1) * size] for i in range(count)]
    return [{"tensor_parallel_size": size, "devices": ",".join(each) if devices else ""} for each in shares]


def _gpus(ranks: Mapping[str, Any]) -> list[str]:
    return [name.strip() for name in ranks["devices"].split(",") if name]


def _share_of_memory(
    settings: UpSettings, ranks: Mapping[str, Any], crowds: Mapping[str, int]
) -> dict[str, float]:
    """Of a GPU with several workers, by `crowds`: all size their pools at about the same time."""
    crowd = max((crowds[gpu] for gpu in _gpus(ranks)), default=1)
    return {"gpu_memory_utilization": settings.gpu_memory_utilization / crowd} if crowd > 1 else {}


def _same_ports(before: Listening) -> dict[str, Any]:
    addresses = {"http_port": before.http, "grpc_port": before.grpc, "internal_port": before.internal}
    return {name: int(address.rsplit(":", 1)[1].rstrip("/")) for name, address in addresses.items()}


def up(argv: list[str], program: Callable[[str], list[str]] = program) -> int:
    """Run `tandem up` to its end; returns the exit code. Exits with code 2 if it cannot start."""
    with contextlib.ExitStack() as stack:
        try:
            settings = with_peer_directory(parse(UpSettings, argv, prog="tandem up"), stack)
            logs.setup("up", settings.log_level, settings.log_format)
            plan = fleet_plan(settings, program=program)
        except StartupError as error:
            fail(error)
        return run(lambda shutdown: _serve(plan, settings, shutdown))


async def _serve(plan: FleetPlan, settings: UpSettings, shutdown: Shutdown) -> None:
    say = progress()
    model = settings.model or "the bundled demo model"
    say(f"tandem {VERSION}: {model}, {settings.prefill} prefill and {settings.decode} decode workers")
    fleet = Fleet(plan, say=say)
    _kill_on_second_signal(fleet, shutdown)
    try:
        await fleet.serve(shutdown, _print_ready)
    except BaseExceptionGroup as group:
        raise first_error(group) from None


def _print_ready(listening: Listening) -> None:
    sys.stdout.write(f"ready http={listening.http} grpc={listening.grpc}\n")
    sys.stdout.flush()


def _kill_on_second_signal(fleet: Fleet, shutdown: Shutdown) -> None:
    """In place of the lifecycle's handlers, whose immediate exit would leave children to drain alone."""

    def on_signal(number: signal.Signals) -> None:
        if shutdown.requested.is_set():
            fleet.kill()
            os._exit(130 if number == signal.SIGINT else 143)
        shutdown.request(number.name)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def progress() -> Callable[[str], None]:
    """How the start tells a person what happens: coloured on a terminal, plain lines elsewhere; on stderr."""
    if not sys.stderr.isatty():
        return lambda line: print(line, file=sys.stderr, flush=True)  # noqa: T201 - a person reads it
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    return lambda line: console.print("[bold cyan]tandem[/]", escape(line))
