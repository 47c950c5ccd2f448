"""`python -m gateway` as a process: its line, its exit codes, its drain, its log."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

LINE = re.compile(
    r"listening http=(http://127\.0\.0\.1:\d+) grpc=(127\.0\.0\.1:\d+) internal=(127\.0\.0\.1:\d+)\n"
)
FREE_PORTS = ("--http-port", "0", "--grpc-port", "0")


@asynccontextmanager
async def gateway(
    *flags: str, stderr: int = asyncio.subprocess.PIPE
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_serves_without_workers_and_ends_on_sigterm() -> None:
    async with gateway(*FREE_PORTS) as process:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            line = (await process.stdout.readline()).decode()
        match = LINE.fullmatch(line)
        assert match, line
        async with httpx.AsyncClient(base_url=match[1], trust_env=False) as client:
            assert (await client.get("/health")).status_code == 200
            ready = await client.get("/ready")
            assert (ready.status_code, "decode" in ready.json()["status"]) == (503, True)
            models = (await client.get("/v1/models")).json()["data"]
            assert models[0]["id"] == "demo_model"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert await process.stdout.read() == b""
        assert process.stderr is not None
        assert b"shutting down: SIGTERM" in await process.stderr.read()


async def test_start_errors_are_one_line_and_exit_code_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags, expected in (
            (("--http-port", port), f"--http-port {port}: cannot listen"),
            (("--http-port", "0", "--grpc-port", port), f"--grpc-port {port}: cannot listen"),
            ((*FREE_PORTS, "--model", "/nowhere"), "--model /nowhere: no such directory"),
            ((*FREE_PORTS, "--max-waiting-requests", "-1"), "--max-waiting-requests"),
        ):
            async with gateway(*flags) as process:
                _, stderr = await asyncio.wait_for(process.communicate(), 20)
                errors = [line for line in stderr.decode().splitlines() if line.startswith("error: ")]
                assert process.returncode == 2, stderr
                assert len(errors) == 1
                assert expected in errors[0]


def full_pipe() -> tuple[int, int]:
    """Its two ends; not one more byte goes in."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    for size in (4096, 1):
        try:
            while True:
                os.write(writes, b"." * size)
        except BlockingIOError:
            pass
    os.set_blocking(writes, True)
    return reads, writes


async def test_a_log_that_nobody_reads_holds_nothing_up() -> None:
    reads, writes = full_pipe()
    try:
        async with gateway(*FREE_PORTS, "--log-format=text", stderr=writes) as process:
            assert process.stdout is not None
            async with asyncio.timeout(20):
                match = LINE.fullmatch((await process.stdout.readline()).decode())
            assert match  # and then it logs that it serves
            async with httpx.AsyncClient(base_url=match[1], trust_env=False) as client:
                assert (await client.get("/health")).status_code == 200
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await process.wait() == 0
    finally:
        os.close(writes)
    with open(reads, "rb") as pipe:
        assert set(pipe.read()) == set(b".")  # it wanted to log all the while
