"""The client of `make bench-gateway`: thousands of streams for a few microseconds per token.

A gRPC library's client costs as much per message as the gateway does, and both have one core here. So this
speaks just enough HTTP/2 and HTTP/1.1 to open streams and to count what comes; it does not decode messages.
Prints what it saw of one case as JSON.
"""

import asyncio
import json
import resource
import struct
import sys
import time
from array import array
from typing import Any

import psutil
import uvloop

from benchmarks.gateway_load import Case, Stamps, prompt_of
from protos.tandem.v1 import inference_pb2

STREAMS_PER_CONNECTION = 128
MAX_TOKENS = 100_000
START_TIMEOUT_S = 60.0
SETTLE_S = 1.5
WINDOW_S = 5.0
TEXT_LEN = 4

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
WINDOW = (1 << 31) - 1
METHOD = b"/tandem.v1.InferenceService/Generate"


class Seen:
    """What has come, of all streams."""

    def __init__(self, num_streams: int, stamps: Stamps) -> None:
        self.num_tokens = array("l", [0]) * num_streams
        self.num_started = 0
        self.num_ended = 0
        self.delays_s = array("d")
        """From a worker to here, of each token while `measuring`."""
        self.measuring = False
        self._stamps = stamps

    @property
    def total(self) -> int:
        """Tokens of all streams."""
        return sum(self.num_tokens)

    def on_tokens(self, stream: int, num_tokens: int, now_s: float) -> None:
        """Tokens of a stream are here."""
        first = self.num_tokens[stream]
        self.num_tokens[stream] = first + num_tokens
        self.num_started += first == 0 < num_tokens
        if self.measuring:
            for index in range(first, first + num_tokens):
                self.delays_s.append(now_s - self._stamps.read(stream, index))


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header without compression."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


class GrpcStreams(asyncio.Protocol):
    """One HTTP/2 connection with the streams `numbers`."""

    def __init__(self, seen: Seen, numbers: range, host: str) -> None:
        self._seen, self._numbers = seen, numbers
        self._buffer = b""
        # POST and http from the static table; :path and :authority by their names there.
        self._headers = b"\x83\x86\x04" + bytes([len(METHOD)]) + METHOD + b"\x01" + bytes([len(host)])
        self._headers += host.encode() + literal(b"content-type", b"application/grpc")
        self._headers += literal(b"te", b"trailers")

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        settings = struct.pack(">HI", 4, WINDOW)
        opening = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings)
        opening += frame(8, 0, 0, struct.pack(">I", WINDOW - (1 << 16)))
        transport.write(opening + b"".join(self._request(number) for number in self._numbers))

    def _request(self, number: int) -> bytes:
        request = inference_pb2.GenerateRequest(
            request_id=f"{number:08}",
            token_ids=inference_pb2.TokenIds(ids=prompt_of(number)),
        )
        request.sampling.max_tokens = MAX_TOKENS
        raw = request.SerializeToString()
        stream = 2 * (number - self._numbers.start) + 1
        message = struct.pack(">BI", 0, len(raw)) + raw
        return frame(HEADERS, 4, stream, self._headers) + frame(DATA, 1, stream, message)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        data = self._buffer + data
        at, size = 0, len(data)
        while at + 9 <= size:
            end = at + 9 + int.from_bytes(data[at : at + 3])
            if end > size:
                break
            stream = int.from_bytes(data[at + 5 : at + 9])
            if data[at + 3] == DATA:
                number = self._numbers.start + (stream >> 1)
                self._seen.on_tokens(number, count_tokens(data, at + 9, end), now_s)
            else:
                self._on_control(data[at + 3], data[at + 4], data[at + 9 : end])
            at = end
        self._buffer = data[at:]

    def _on_control(self, kind: int, flags: int, payload: bytes) -> None:
        if kind in (SETTINGS, PING) and not flags & 1:
            self._transport.write(frame(kind, 1, 0, payload if kind == PING else b""))
        if kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & 1):
            self._seen.num_ended += 1


def count_tokens(data: bytes, at: int, end: int) -> int:
    """Tokens in the GenerateResponse messages of a DATA frame, by where the ids of a delta stand.

    Field 1 is a request id of 8 bytes, field 3 ids of two bytes each; a message is never split.
    """
    num_tokens = 0
    while at < end:
        assert data[at + 15] == 0x1A
        num_tokens += data[at + 16] // 2
        at += 5 + int.from_bytes(data[at + 1 : at + 5])
    return num_tokens


class HttpStream(asyncio.Protocol):
    """One HTTP/1.1 connection with one stream of server-sent events."""

    def __init__(self, seen: Seen, number: int) -> None:
        self._seen, self._number = seen, number

    def connection_made(self, transport: Any) -> None:
        body = {"prompt": prompt_of(self._number), "max_tokens": MAX_TOKENS, "stream": True}
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(raw)}\r\n"
        transport.write(f"{head}content-type: application/json\r\n\r\n".encode() + raw)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        texts = data.split(b'"text":"')[1:]
        num_tokens = sum(text.index(b'"') // TEXT_LEN for text in texts)
        self._seen.on_tokens(self._number, num_tokens, now_s)

    def connection_lost(self, error: Exception | None) -> None:
        self._seen.num_ended += 1


async def connect(case: Case, seen: Seen, address: str) -> bool:
    """Open all streams at once; False if they do not come to run."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    for start in range(0, case.num_streams, STREAMS_PER_CONNECTION):
        numbers = range(start, min(start + STREAMS_PER_CONNECTION, case.num_streams))
        await open_streams(case, seen, address, numbers)
    while seen.num_started < case.num_streams:
        if seen.num_ended or time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(0.02)
    return True


async def open_streams(case: Case, seen: Seen, address: str, numbers: range) -> None:
    """A connection for each stream of HTTP, one for all of gRPC."""
    loop = asyncio.get_running_loop()
    host, port = address.rsplit(":", 1)
    if case.face == "grpc":
        await loop.create_connection(lambda: GrpcStreams(seen, numbers, address), host, int(port))
        return
    for number in numbers:
        await loop.create_connection(lambda number=number: HttpStream(seen, number), host, int(port))


def cpu_seconds(processes: dict[str, list[psutil.Process]]) -> dict[str, float]:
    """User and system time of each kind so far."""
    return {name: sum(sum(each.cpu_times()[:2]) for each in kind) for name, kind in processes.items()}


async def measure(case: Case, address: str, stamps: Stamps, pids: dict[str, list[int]]) -> dict[str, Any]:
    """Open the streams, wait until all of them run, and watch for WINDOW_S."""
    seen = Seen(case.num_streams, stamps)
    if not await connect(case, seen, address):
        return {"failed": f"{seen.num_started} streams run, {seen.num_ended} have ended"}
    await asyncio.sleep(SETTLE_S)
    processes = {name: [psutil.Process(pid) for pid in kind] for name, kind in pids.items()}
    processes["client"] = [psutil.Process()]
    seen.measuring = True
    start_s, tokens, before = time.monotonic(), seen.total, cpu_seconds(processes)
    await asyncio.sleep(WINDOW_S)
    seconds, tokens, after = time.monotonic() - start_s, seen.total - tokens, cpu_seconds(processes)
    seen.measuring = False
    delays_ms = sorted(1e3 * delay_s for delay_s in seen.delays_s)
    return {
        "tokens_per_s": tokens / seconds,
        "ended_streams": seen.num_ended,
        "delay_ms": {name: delays_ms[int(len(delays_ms) * q)] for name, q in (("p50", 0.5), ("p99", 0.99))},
        "cores": {name: (after[name] - before[name]) / seconds for name in processes},
        "gateway_us_per_token": 1e6 * (after["gateway"] - before["gateway"]) / tokens,
    }


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    given = Case.parse(sys.argv[1])
    found = uvloop.run(measure(given, sys.argv[2], Stamps(sys.argv[3]), json.loads(sys.argv[4])))
    print(json.dumps(found))
