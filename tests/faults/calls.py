"""The four ways to ask for tokens, each with its way to go away and its deadline."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc

from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.e2e.harness import Up

DEADLINE = "deadline"
"""How a request ended whose time was over."""


class Call(Protocol):
    """One request under way; `leave` abandons it, `outcome` is how it ended for the client."""

    def leave(self) -> None:
        """Go away without a word."""
        ...

    def outcome(self) -> str:
        """Wait for the end: `done`, `deadline`, or another error."""
        ...


class HttpCall:
    """Over a raw socket, which is closed to leave."""

    def __init__(self, up: Up, body: dict[str, Any], timeout_s: float | None) -> None:
        url = urlsplit(up.http)
        self._socket = socket.create_connection((url.hostname, url.port), timeout=30)
        payload = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(payload)}\r\n"
        head += "connection: close\r\ncontent-type: application/json\r\n"
        head += f"x-request-timeout: {timeout_s}\r\n" if timeout_s else ""
        self._socket.sendall(f"{head}\r\n".encode() + payload)

    def leave(self) -> None:
        self._socket.close()

    def outcome(self) -> str:
        answer = b""
        with self._socket:
            while data := self._socket.recv(1 << 16):
                answer += data
        if b'"code":"deadline_exceeded"' in answer:
            assert b"[DONE]" not in answer
            return DEADLINE
        return "done" if answer.startswith(b"HTTP/1.1 200") else answer.decode()


class GrpcCall:
    """Over a channel of its own."""

    def __init__(self, up: Up, request: Any, timeout_s: float | None, *, stream: bool) -> None:
        self._channel = grpc.insecure_channel(up.grpc)
        stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._call = (stub.Generate if stream else stub.Complete.future)(request, timeout=timeout_s)
        self._is_stream = stream
        self._ended = threading.Event()
        self._call.add_callback(self._ended.set) if stream else self._call.add_done_callback(
            lambda _: self._ended.set()
        )

    def leave(self) -> None:
        self._call.cancel()
        self._channel.close()

    def outcome(self) -> str:
        try:
            list(self._call) if self._is_stream else self._call.result()
            return "done"
        except grpc.RpcError as error:
            code = error.code()
            return DEADLINE if code is grpc.StatusCode.DEADLINE_EXCEEDED else code.name
        finally:
            self._channel.close()


def _http(stream: bool) -> Callable[..., Call]:
    def begin(up: Up, prompt: list[int], max_tokens: int, salt: str, timeout_s: float | None = None) -> Call:
        body = {"model": up.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": stream, "cache_salt": salt}
        return HttpCall(up, body, timeout_s)

    return begin


def _grpc(stream: bool) -> Callable[..., Call]:
    def begin(up: Up, prompt: list[int], max_tokens: int, salt: str, timeout_s: float | None = None) -> Call:
        kind = inference_pb2.GenerateRequest if stream else inference_pb2.CompleteRequest
        request = kind(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
            cache_salt=salt,
        )
        return GrpcCall(up, request, timeout_s, stream=stream)

    return begin


FACES: dict[str, Callable[..., Call]] = {
    "http-stream": _http(True),
    "http-unary": _http(False),
    "grpc-stream": _grpc(True),
    "grpc-unary": _grpc(False),
}


def seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """What it returned, and how long it took."""
    start_s = time.monotonic()
    return function(), time.monotonic() - start_s
