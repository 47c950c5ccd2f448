"""Every socket of a running server, knocked on by somebody without a key."""

import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import psutil
import pytest

from protos.tandem.v1 import decode_pb2, inference_pb2, kvlink_pb2, prefill_pb2, registry_pb2
from tests.e2e.harness import Up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

LISTEN = "0A"
"""As in /proc/net/tcp; see proc(5)."""

EVERYWHERE = ("0.0.0.0", "::")
KEY = "only-I-know-this-one"
HTTP_PATHS = ["/v1/models", "/v1/completions", "/metrics", "/debug/state", "/version", "/tokenize", "/", "/x"]
ADMIN = {"/metrics", "/debug/state"}
SERVICES = [
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"],
    decode_pb2.DESCRIPTOR.services_by_name["DecodeService"],
    kvlink_pb2.DESCRIPTOR.services_by_name["KvLinkService"],
    registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
]
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]
METHODS += ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/no.Such/Method"]


class Listener(NamedTuple):
    """One listening socket."""

    command: str
    address: str
    port: int


def _sockets(table: str) -> Iterator[tuple[str, int, str]]:
    """(address, port, inode) of the listening sockets in /proc/net/tcp or tcp6."""
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTEN:
            host, port = fields[1].split(":")
            words = [struct.pack("=I", int(host[at : at + 8], 16)) for at in range(0, len(host), 8)]
            family = socket.AF_INET if table == "tcp" else socket.AF_INET6
            address = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
            yield address, int(port, 16), fields[9]


def listeners(root: int) -> list[Listener]:
    """Of a process and all that it started."""
    by_inode = {inode: (host, port) for table in ("tcp", "tcp6") for host, port, inode in _sockets(table)}
    found = []
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        command = " ".join(process.cmdline()[:6])
        for handle in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inode = handle.readlink().name.removeprefix("socket:[").removesuffix("]")
                if inode in by_inode:
                    found.append(Listener(command, *by_inode[inode]))
    return found


def knock_http(address: str, port: int) -> list[str]:
    """What came back for nothing: paths that did not say 401, 404 or 405; None of them if it is no HTTP."""
    useful = []
    with httpx.Client(base_url=f"http://{address}:{port}", timeout=2, trust_env=False) as client:
        for path in HTTP_PATHS:
            for method in ("GET", "POST"):
                with contextlib.suppress(httpx.HTTPError):
                    answer = client.request(method, path)
                    if answer.status_code not in (401, 404, 405):
                        useful.append(f"{method} {path}: {answer.status_code}")
    return useful


def knock_grpc(address: str, port: int) -> list[str]:
    """Methods that did not say UNAUTHENTICATED though there is a gRPC server."""
    useful = []
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        for method in METHODS:
            call = channel.stream_stream(method)(iter([b""]), timeout=2)
            try:
                useful.append(f"{method}: {next(call, None)!r}")
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE):
                    useful.append(f"{method}: {error.code().name}")
    return useful


def knock_raw(address: str, port: int) -> bytes:
    """What a socket says to garbage within a second."""
    with socket.create_connection((address, port), 2) as knocker:
        knocker.settimeout(1)
        with contextlib.suppress(OSError):
            knocker.sendall(b"\x80\x04cos\nsystem\n(S'true'\ntR." + bytes(200))
            return knocker.recv(4096)
    return b""


def own_address() -> str:
    """An address of this machine besides loopback; skip where there is none."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return found[0] if found else pytest.skip("no address besides loopback")


@pytest.fixture(scope="module")
def exposed() -> Iterator[tuple[Up, str]]:
    """A server that other machines can reach, and the address by which they do; with gloo's sockets."""
    host = own_address()
    up = Up("--host=0.0.0.0", f"--api-keys={KEY}", "--transport=gloo")
    yield up, host
    up.stop()


def kinds_of(found: set[Listener], host: str) -> dict[Listener, str]:
    """What each socket is, after a stranger has knocked: http, grpc or mute. Nothing useful may come back."""
    kinds = {}
    for listener in found:
        address = host if listener.address in EVERYWHERE else listener.address
        hello = knock_raw(address, listener.port)
        kinds[listener] = "http" if hello.startswith(b"HTTP/1.1 400") else "grpc"
        if not hello:
            kinds[listener] = "mute"
            continue
        if kinds[listener] == "grpc":
            assert knock_grpc(address, listener.port) == [], listener
        # On this machine alone the state of a process is for everybody who is there.
        spoke = {line.split()[1].rstrip(":") for line in knock_http(address, listener.port)}
        assert spoke <= (set() if address == host else ADMIN), listener
    return kinds


def test_nothing_answers_a_stranger(exposed: tuple[Up, str]) -> None:
    up, host = exposed
    body = {"prompt": "def f(", "max_tokens": 4}
    url = f"http://{host}:{up.http.rsplit(':', 1)[1]}"
    # A split request, so that the KV link and gloo's sockets are there, too.
    answer = httpx.post(
        f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    kinds = kinds_of(set(listeners(up.process.pid)), host)
    public = {listener.port: kind for listener, kind in kinds.items() if listener.address in EVERYWHERE}
    assert sorted(public.values()) == ["grpc", "http"]
    assert {up.http.rsplit(":", 1)[1], up.grpc.rsplit(":", 1)[1]} == set(map(str, public))
    inner = {listener: kind for listener, kind in kinds.items() if listener.port not in public}
    assert {listener.address for listener in inner} == {"127.0.0.1"}
    # The gateway's internal gRPC; of each worker gRPC, HTTP and gloo's socket, which knows no secret.
    assert Counter(inner.values()) == {"grpc": 3, "http": 2, "mute": 2}
    assert all("_svc" in listener.command for listener, kind in inner.items() if kind == "mute")


def test_the_secrets_stand_on_no_command_line_of_ours(exposed: tuple[Up, str]) -> None:
    up, _ = exposed
    for process in psutil.Process(up.process.pid).children(recursive=True):
        words, secret = process.cmdline(), process.environ().get("TANDEM_INTERNAL_SECRET")
        if secret is None:
            assert any(word.endswith("_helper") for word in words), "only helpers do without"
            continue
        assert len(secret) > 40
        assert not any(secret in word or KEY in word for word in words)
