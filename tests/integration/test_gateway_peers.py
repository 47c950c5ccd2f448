"""Gateway processes that answer for one another; here in one process."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from gateway.peers import Peers
from runtime.metrics import exposition


class Process:
    """One with three requests of its own."""

    def __init__(self, directory: Path, index: int) -> None:
        self.live = {f"{index}-{number}" for number in range(3)}
        registry = CollectorRegistry()
        Counter("requests", "R", registry=registry).inc(index + 1)
        self.peers = Peers(str(directory), f"g{index}", registry, self.state, self.abort)

    def state(self) -> dict[str, object]:
        return {"requests": len(self.live), "workers": []}

    def abort(self, request_ids: list[str], tenant: str) -> list[str]:
        found = sorted(self.live & set(request_ids)) if tenant == "mine" else []
        self.live -= set(found)
        return found

    async def serve(self, stack: AsyncExitStack) -> None:
        serving = asyncio.ensure_future(self.peers.serve())

        async def stop() -> None:
            self.peers.close()
            await serving

        stack.push_async_callback(stop)


async def test_any_process_speaks_for_all(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first, second = (Process(tmp_path, index) for index in range(2))
        for process in (first, second):
            await process.serve(stack)
        async with asyncio.timeout(5):
            while (await first.peers.state()).get("gateway_processes") != 2:
                await asyncio.sleep(0.01)
        assert (await first.peers.state())["requests"] == 6
        assert b"requests_total 3.0" in (await second.peers.metrics(""))[0]
        openmetrics = (await second.peers.metrics("application/openmetrics-text"))[0]
        assert openmetrics.endswith(b"# EOF\n")
        assert await first.peers.abort(["0-1", "1-1", "no"], "another's") == []
        assert await first.peers.abort(["0-1", "1-1", "no"], "mine") == ["0-1", "1-1"]
        assert (await second.peers.state())["requests"] == 4
    assert list(tmp_path.iterdir()) == []


async def test_a_dead_process_is_left_out_and_forgotten(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    first = Process(tmp_path, 0)
    assert await first.peers.state() == first.state()
    assert list(tmp_path.iterdir()) == []


async def test_without_a_directory_there_is_nobody_else() -> None:
    registry = CollectorRegistry()
    peers = Peers("", "g", registry, lambda: {"requests": 1}, lambda ids, tenant: ids)
    await peers.serve()
    assert await peers.state() == {"requests": 1}
    assert await peers.metrics("") == exposition(registry, "")
    assert await peers.abort(["a"], "") == ["a"]
