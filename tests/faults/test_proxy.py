"""Each fault of the proxy is felt by those who talk through it."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import DOWN, UP, Proxy


def echo(server: socket.socket) -> None:
    """Answer connections one after the other with what they say, until the server's end."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                continue


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=echo, args=(server,))
    thread.start()
    made = Proxy(server.getsockname())
    yield made
    made.close()
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def says(client: socket.socket, data: bytes) -> float:
    """Seconds until all of it has come back."""
    start_s = time.monotonic()
    client.sendall(data)
    back = b""
    while len(back) < len(data):
        back += client.recv(1 << 16)
    assert back == data
    return time.monotonic() - start_s


def test_fine_weather_passes_everything_on(proxy: Proxy) -> None:
    with connect(proxy) as client:
        says(client, bytes(range(256)) * 1000)
    assert not proxy.hits


def test_delay_and_throttle_slow_down(proxy: Proxy) -> None:
    with connect(proxy) as client:
        with proxy.fault(delay_s=0.03):
            assert says(client, b"x") >= 0.06
        with proxy.fault(bytes_per_s=20_000):
            assert says(client, bytes(1000)) >= 0.1
        assert proxy.hits.keys() == {"delay", "throttle"}


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_blackhole_swallows_until_it_heals(proxy: Proxy, direction: str) -> None:
    with connect(proxy) as client, proxy.fault(blackhole=(direction,)):
        client.sendall(b"late")
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(4)
        client.settimeout(5)
        proxy.set()
        assert client.recv(4) == b"late"


def test_a_reset_is_a_reset(proxy: Proxy) -> None:
    with connect(proxy) as client:
        says(client, b"x")
        assert proxy.reset() == 2
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_half_closed_is_end_of_file_without_a_reset(proxy: Proxy) -> None:
    with connect(proxy) as client:
        says(client, b"x")
        assert proxy.half_close() == 2
        assert client.recv(1) == b""


def test_a_fault_that_nobody_meets_fails_its_test(proxy: Proxy) -> None:
    with pytest.raises(AssertionError, match="nothing met"), proxy.fault(delay_s=1):
        pass
