"""The client of the overload cases: requests at random moments, whatever becomes of those before.

Over HTTP each has a connection of its own, over gRPC they share eight. Prints outcomes as JSON.
"""

import asyncio
import json
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
import uvloop

from benchmarks.gateway_load import prompt_of
from protos.tandem.v1 import inference_pb2, inference_pb2_grpc

NUM_CHANNELS = 8
TIMEOUT_S = 30.0
WARM_UP_S = 3.0
GOOD_S = 3.0
"""Answers that take longer are late."""


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """One client's load."""

    face: str
    address: str
    per_s: float
    """Requests per second, on average."""
    seconds: float
    num_tokens: int
    key: str = "none"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request."""

    start_s: float
    """Behind the first moment of the load."""
    seconds: float
    ok: bool
    refused: bool
    """With a hint when to come again."""


Ask = Callable[[Arrivals, int], Awaitable[tuple[bool, bool]]]
"""(answered in full, refused with a hint)"""


async def over_http(load: Arrivals, number: int) -> tuple[bool, bool]:
    """One request on a connection of its own."""
    host, port = load.address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    body = {"prompt": prompt_of(number), "max_tokens": load.num_tokens, "stream": True}
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n"
    head += f"authorization: Bearer {load.key}"
    writer.write(f"{head}\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
    answer = await reader.read(-1)
    writer.close()
    return b"data: [DONE]" in answer, answer.startswith(b"HTTP/1.1 429") and b"\r\nretry-after: " in answer


def over_grpc(load: Arrivals) -> Ask:
    """Requests on shared connections."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(load.address, options=options) for _ in range(NUM_CHANNELS)]
    stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]

    async def ask(load: Arrivals, number: int) -> tuple[bool, bool]:
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt_of(number)))
        request.sampling.max_tokens = load.num_tokens
        metadata = (("authorization", f"Bearer {load.key}"),)
        try:
            async for _ in stubs[number % NUM_CHANNELS].Generate(request, metadata=metadata):
                pass
        except grpc.aio.AioRpcError as error:
            full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return False, full and any(
                name == "grpc-retry-pushback-ms" for name, _ in error.trailing_metadata()
            )
        return True, False

    return ask


async def play(load: Arrivals) -> list[Outcome]:
    """The whole load."""
    ask = over_http if load.face == "http" else over_grpc(load)
    begin_s, moment_s, outcomes = time.monotonic(), 0.0, list[Outcome]()
    randomness = random.Random(load.key)

    async def one(number: int) -> None:
        start_s, ok, refused = time.monotonic(), False, False
        try:
            async with asyncio.timeout(TIMEOUT_S):
                ok, refused = await ask(load, number)
        except (OSError, TimeoutError):
            pass
        end_s = time.monotonic()
        found = Outcome(start_s=start_s - begin_s, seconds=end_s - start_s, ok=ok, refused=refused)
        outcomes.append(found)

    async with asyncio.TaskGroup() as tasks:
        for number in range(1 << 20):
            moment_s += randomness.expovariate(load.per_s)
            if moment_s > load.seconds:
                break
            await asyncio.sleep(begin_s + moment_s - time.monotonic())
            tasks.create_task(one(number % 4096))
    return outcomes


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Rates and times of those that started behind the warm-up."""
    seen = [each for each in outcomes if each.start_s >= WARM_UP_S]
    seconds -= WARM_UP_S
    num_good = sum(each.ok and each.seconds <= GOOD_S for each in seen)
    refusals_ms = sorted(1e3 * each.seconds for each in seen if each.refused)
    return {
        "offered_per_s": len(seen) / seconds,
        "goodput_per_s": num_good / seconds,
        "late_per_s": (sum(each.ok for each in seen) - num_good) / seconds,
        "refused_per_s": len(refusals_ms) / seconds,
        "lost": sum(not each.ok and not each.refused for each in seen),
        "refusal_p50_ms": _quantile(refusals_ms, 0.5),
        "refusal_p99_ms": _quantile(refusals_ms, 0.99),
    }


def _quantile(values: Sequence[float], q: float) -> float | None:
    return values[int(len(values) * q)] if values else None


async def be_idle(address: str, count: int, opening: bytes) -> None:
    """Connections that say `opening` and nothing more, until this process is ended."""
    host, port = address.rsplit(":", 1)
    transports = []
    loop = asyncio.get_running_loop()
    for _ in range(count):
        transport, _ = await loop.create_connection(asyncio.Protocol, host, int(port))
        transport.write(opening)
        transports.append(transport)
    print("idle", flush=True)
    await asyncio.Event().wait()


async def read_nothing(address: str, count: int) -> None:
    """Streams over HTTP whose answers are left lying, until this process is ended."""
    host, port = address.rsplit(":", 1)
    body = json.dumps({"prompt": prompt_of(4000), "max_tokens": 100_000, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    held = []
    for _ in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(head + body)
        held.append(sock)
    print("idle", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["load", text]:
            given = Arrivals(**json.loads(text))
            print(json.dumps(summary(uvloop.run(play(given)), given.seconds)))
        case ["idle", address, count, opening]:
            uvloop.run(be_idle(address, int(count), bytes.fromhex(opening)))
        case ["slow", address, count]:
            uvloop.run(read_nothing(address, int(count)))
