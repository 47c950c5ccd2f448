"""A TCP proxy that breaks what passes through it. It runs on an event loop of its own, in a thread.

Each fault counts what it did to whom, so that a test can prove that it was active. A blackhole also swallows
new connections, as a firewall that drops packets does: they are accepted here and nothing comes back.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

CHUNK_BYTES = 16 * 1024
UP, DOWN = "up", "down"
"""From who connects to who listens, and back."""

T = TypeVar("T")


@dataclass
class Weather:
    """What happens to bytes just now."""

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    blackhole: tuple[str, ...] = ()
    """Directions in which nothing arrives."""
    only_pid: int | None = None
    """The faults are for connections of this process alone; new ones included."""

    def is_for(self, pid: int | None) -> bool:
        """Whether a connection of this process feels it."""
        return self.only_pid is None or self.only_pid == pid


class Proxy:
    """One port in front of another one. Thread-safe; `close` it."""

    def __init__(self, target: tuple[str, int], listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.target = target
        self.hits: Counter[str] = Counter()
        """What each kind of fault did: chunks held back or slowed, connections reset or half closed."""
        self.num_connections = 0
        self._weather = Weather()
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, *listen))
        self.host, self.port = self._server.sockets[0].getsockname()[:2]

    @property
    def address(self) -> str:
        """host:port of this side."""
        return f"{self.host}:{self.port}"

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    @contextlib.contextmanager
    def fault(self, **weather: Any) -> Iterator[None]:
        """Weather inside the block; fails if nothing met it."""
        before = self.hits.total()
        self.set(**weather)
        try:
            yield
            after = self.hits.total()
            assert after > before, f"nothing met {weather}"
        finally:
            self.set()

    def set(self, **weather: Any) -> None:
        """Change the weather; without arguments it is fine again, and what was held back arrives."""
        self._call(self._set(Weather(**weather)))

    async def _set(self, weather: Weather) -> None:
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()

    def reset(self) -> int:
        """RST to both ends of every connection; how many ends there were."""
        return self._call(self._reset())

    async def _reset(self) -> int:
        writers = list(self._writers)
        for writer in writers:
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            self.hits["reset"] += 1
        return len(writers)

    def half_close(self) -> int:
        """FIN in both directions of every connection, which stay open to read; how many ends there were."""
        return self._call(self._half_close())

    async def _half_close(self) -> int:
        writers = [writer for writer in self._writers if writer.can_write_eof()]
        for writer in writers:
            writer.write_eof()
            self.hits["half_close"] += 1
        return len(writers)

    def close(self) -> None:
        """Cut everything and end the thread."""
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        pid = await asyncio.to_thread(_owner, writer.get_extra_info("peername")[1])
        ends = {writer, far_writer}
        self._writers |= ends
        try:
            await asyncio.gather(
                self._pump(UP, pid, reader, far_writer), self._pump(DOWN, pid, far_reader, writer)
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(
        self, direction: str, pid: int | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._weathered(direction, pid, len(data))
            if writer.transport.is_closing():
                return
            writer.write(data)
            await writer.drain()
        await self._weathered(direction, pid, 0)
        if writer.can_write_eof() and not writer.transport.is_closing():
            writer.write_eof()

    async def _weathered(self, direction: str, pid: int | None, num_bytes: int) -> None:
        """Wait as long as the weather wants."""
        while direction in self._weather.blackhole and self._weather.is_for(pid):
            self.hits["blackhole"] += 1
            await self._changed.wait()
        weather = self._weather
        if not weather.is_for(pid):
            return
        pause_s = weather.delay_s
        if weather.bytes_per_s:
            pause_s += num_bytes / weather.bytes_per_s
        if pause_s:
            self.hits["delay" if weather.delay_s else "throttle"] += 1
            await asyncio.sleep(pause_s)


def _owner(port: int) -> int | None:
    """The process of ours that connects from this port of loopback; None if none can be found."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    local = f"0100007F:{port:04X}"
    inodes = {row.split()[9] for row in rows if row.split()[1] == local}
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if handle.readlink().name.removeprefix("socket:[").removesuffix("]") in inodes:
                return int(handle.parts[2])
    return None
