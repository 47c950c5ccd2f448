"""`tandem status` and `tandem health`: what a running server says about itself."""

import asyncio
from typing import Any

import grpc.aio
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime import rpc
from tandem.client import Client
from tandem.credentials import ADMIN_KEY, http_headers
from tandem.messages import ServerInfo

TIMEOUT_S = 5.0


def status(address: str, url: str) -> None:
    """Print the state of gateway and workers: from gRPC, pids from /debug/state where it may be read."""
    from rich.console import Console

    info = asyncio.run(_server_info(address))
    console = Console(highlight=False)
    for line in (headline(info), table(info, debug_state(url))):
        console.print(line)


async def _server_info(address: str) -> ServerInfo:
    async with Client(address, timeout=TIMEOUT_S) as client:
        return await client.server_info()


def debug_state(url: str) -> dict[str, Any]:
    """The gateway's /debug/state; empty where it cannot be read from here."""
    try:
        response = httpx.get(
            f"{url.rstrip('/')}/debug/state",
            headers=http_headers(ADMIN_KEY),
            timeout=TIMEOUT_S,
            trust_env=False,
        )
        state: dict[str, Any] = response.json() if response.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return state


def headline(info: ServerInfo) -> str:
    """The server in one line."""
    return (
        f"tandem {info.version}  model {info.model} ({info.max_model_len} tokens)  {info.requests} requests"
    )


def table(info: ServerInfo, state: dict[str, Any]) -> Any:
    """A rich table with a row for each worker; `kv` counts the transfers under way."""
    from rich.table import Table

    heads = ("worker", "role", "state", "address", "pid", "restarts", "run", "wait")
    found = Table(*heads, "used+cached/blocks", "kv", box=None, padding=(0, 1, 0, 0))
    seen = {worker.get("id"): worker for worker in state.get("workers", [])}
    for worker in sorted(info.workers, key=lambda worker: worker.id):
        blocks = f"{worker.blocks_used}+{worker.blocks_cached}/{worker.blocks_total}"
        load = [worker.requests_running, worker.requests_waiting, blocks, worker.transfers]
        own = [seen.get(worker.id, {}).get(name, "") for name in ("pid", "restarts")]
        cells = [worker.id, worker.role, worker.state, worker.address, *own, *load]
        found.add_row(*map(str, cells))
    return found


def health(url: str | None, address: str | None) -> str | None:
    """What is wrong with the HTTP or the gRPC face, or None; a face that is not named is not asked."""
    problem = None
    if url is not None:
        problem = _http_health(url)
    if address is not None:
        problem = problem or asyncio.run(_grpc_health(address))
    return problem


def _http_health(url: str) -> str | None:
    try:
        response = httpx.get(f"{url.rstrip('/')}/ready", timeout=TIMEOUT_S, trust_env=False)
    except httpx.HTTPError as error:
        return f"cannot reach {url} ({error})"
    return None if response.status_code == 200 else f"HTTP {response.status_code}: {response.text}"


async def _grpc_health(address: str) -> str | None:
    async with rpc.channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            return f"{address}: {error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
