"""Errors as statuses, the admin routes, and the exit code of a process that cannot start."""

import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest
from google.rpc import error_details_pb2
from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp

from runtime import admin_http, errors, rpc
from runtime.errors import InvalidRequest, Overloaded, StartupError, TandemError


def all_errors(cls: type[TandemError]) -> Iterator[type[TandemError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from all_errors(sub)


@pytest.mark.parametrize("cls", [c for c in all_errors(TandemError) if c.__module__ == errors.__name__])
def test_every_error_has_a_status(cls: type[TandemError]) -> None:
    error = cls("f", "k", "e") if cls is errors.CheckpointError else cls("message")
    status = rpc.to_status(error)
    assert status.message == error.message
    assert 0 < status.code <= 16
    assert 400 <= error.http_status < 600


def test_details_name_the_field_and_the_pause() -> None:
    def details(error: TandemError) -> dict[str, object]:
        found: dict[str, object] = {}
        for packed in rpc.to_status(error).details:
            kind = getattr(error_details_pb2, packed.TypeName().rsplit(".", 1)[1])
            detail = kind()
            assert packed.Unpack(detail)
            found[kind.__name__] = detail
        return found

    bad = details(InvalidRequest("must be positive", field="max_tokens"))
    assert bad["BadRequest"].field_violations[0].field == "max_tokens"
    assert bad["ErrorInfo"].reason == "INVALID_ARGUMENT"
    assert details(Overloaded("full", retry_after_s=1.5))["RetryInfo"].retry_delay.ToMilliseconds() == 1500


@pytest.fixture
async def admin():
    registry = CollectorRegistry()
    Counter("tandem_things_total", "Things.", registry=registry).inc(3)
    reason: list[str | None] = [None]
    routes = admin_http.admin_routes(registry, lambda: {"requests": 0}, lambda: reason[0])
    return admin_http.admin_app(routes, "secret"), reason


def client(app: ASGIApp, host: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, client=(host, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


async def test_admin_routes(admin) -> None:
    app, reason = admin
    async with client(app, "127.0.0.1") as http:
        assert (await http.get("/health")).json() == {"status": "alive"}
        assert (await http.get("/ready")).status_code == 200
        reason[0] = "draining"
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert "tandem_things_total 3.0" in (await http.get("/metrics")).text
        openmetrics = await http.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.text.endswith("# EOF\n")
        assert (await http.get("/debug/state")).json() == {"requests": 0}


async def test_state_and_metrics_are_for_loopback_or_the_key(admin) -> None:
    app, _ = admin
    async with client(app, "10.0.0.9") as http:
        assert (await http.get("/debug/state")).status_code == 401
        wrong = await http.get("/debug/state", headers={"authorization": "Bearer nope"})
        assert wrong.status_code == 401
        right = await http.get("/debug/state", headers={"authorization": "Bearer secret"})
        assert right.status_code == 200


def test_a_port_in_use_names_the_flag() -> None:
    taken = admin_http.bind("127.0.0.1", 0, "--http-port")
    port = taken.getsockname()[1]
    with taken, pytest.raises(StartupError, match=rf"--http-port {port}: cannot listen"):
        admin_http.bind("127.0.0.1", port, "--http-port")


def test_a_process_that_cannot_start_exits_with_2_and_one_line() -> None:
    code = (
        "from runtime.lifecycle import run\n"
        "from runtime.errors import CheckpointError\n"
        "async def main(shutdown):\n"
        "    raise CheckpointError('config.json', 'vocab_size', 'expected an integer')\n"
        "raise SystemExit(run(main))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert done.stderr == "error: config.json: vocab_size: expected an integer\n"
