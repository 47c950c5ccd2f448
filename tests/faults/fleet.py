"""Gateways and workers as separate processes without a supervisor, workers behind fault proxies.

Others reach a worker under an address of its own in 127.0.0.0/8, where its proxy listens; it reaches each
gateway through another proxy. A prefill worker calls a decode worker at the same address as gateways do, so
a fault can name the process whose connections it is for. Frames of gloo go past the proxies.
"""

import contextlib
import os
import random
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from runtime import faultpoints
from tests.e2e.harness import LIVE_COUNTS, MODEL, eventually, held_by
from tests.faults.namespaces import Namespace
from tests.faults.points import FaultPoints
from tests.faults.proxy import Proxy

START_TIMEOUT_S = 90.0
MODULES = {"gateway": "gateway", "prefill": "prefill_svc", "decode": "decode_svc"}
PORTS = (20_000, 32_000)
"""Below those that Linux gives to outgoing connections."""

LISTENING = re.compile(r"listening http=(\S+) grpc=(\S+) internal=(\S+)")


@dataclass
class Member:
    """One process."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    attach: Proxy | None = None
    """In front of a worker."""
    heartbeats: list[Proxy] = field(default_factory=list)
    """In front of the gateways, for this worker."""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    @property
    def proxies(self) -> list[Proxy]:
        """All that a worker says to gateways, and they to it, goes through these."""
        return [*self.heartbeats, *([self.attach] if self.attach else [])]


class Fleet:
    """A context: every process and proxy is gone at its end."""

    def __init__(self, *, gateways: int = 1, prefill: int = 2, decode: int = 2) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-fleet-")
        self.points = FaultPoints(Path(self._folder.name))
        self.client = httpx.Client(timeout=60)
        self.members: dict[str, Member] = {}
        self.urls: dict[str, str] = {}
        self._internal: list[str] = []
        self._num_roles = {"gateway": gateways, "prefill": prefill, "decode": decode}
        self._secret = secrets.token_urlsafe()

    def __enter__(self) -> "Fleet":
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members.values():
            member.process.kill()
            member.process.wait(10)
        for member in self.members.values():
            for proxy in member.proxies:
                proxy.close()
        self.client.close()
        self._folder.cleanup()

    def _start(self) -> None:
        for number in range(self._num_roles["gateway"]):
            name = f"gateway-{number}"
            self._start_gateway(name)
            eventually(lambda name=name: self._listening(name), START_TIMEOUT_S, name)
        for role in ("prefill", "decode"):
            for number in range(self._num_roles[role]):
                self._start_worker(role, number)
        for gateway in self.urls:
            eventually(lambda gateway=gateway: self.is_whole(gateway), START_TIMEOUT_S, "all workers")

    def _start_gateway(self, name: str) -> None:
        self._spawn(name, "gateway", "--http-port=0", "--grpc-port=0", "--internal-port=0")

    def restart(self, name: str) -> None:
        """Put another process in the place of a dead worker, and wait until it serves."""
        member = self.members.pop(name)
        member.process.wait(10)
        for proxy in member.proxies:
            proxy.close()
        role, number = name.split("-")
        self._start_worker(role, int(number))
        eventually(self.is_whole, START_TIMEOUT_S, f"{name} again")

    def _start_worker(self, role: str, number: int) -> None:
        host, port = f"127.0.{1 if role == 'prefill' else 2}.{number + 1}", _free_port()
        beats = [Proxy(_address(internal)) for internal in self._internal]
        flags = [f"--gateway={','.join(beat.address for beat in beats)}", f"--port={port}"]
        flags += ["--host=127.0.0.1", f"--advertise-host={host}", f"--worker-id={role}-{number}"]
        attach = Proxy(("127.0.0.1", port), (host, port))
        member = self._spawn(f"{role}-{number}", role, *flags)
        member.attach, member.heartbeats = attach, beats

    def _spawn(self, name: str, role: str, *flags: str, inside: Namespace | None = None) -> Member:
        log = Path(self._folder.name) / f"{name}.log"
        command = [sys.executable, "-m", MODULES[role], f"--model={MODEL}", "--log-format=text", *flags]
        command = inside.command(*command) if inside else command
        environment = os.environ | {"PYTHONUNBUFFERED": "1", faultpoints.VARIABLE: self._folder.name}
        environment["TANDEM_INTERNAL_SECRET"] = environment["TANDEM_ADMIN_KEY"] = self._secret
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment)
        member = self.members[name] = Member(name, process, log)
        return member

    def _listening(self, name: str) -> bool:
        member = self.members[name]
        text = member.log.read_text()
        match = LISTENING.search(text)
        if match is not None:
            self.urls[name] = match[1]
            self._internal.append(match[3])
        ended = member.process.poll()
        assert ended is None, text
        return match is not None

    def state(self, gateway: str = "gateway-0") -> dict[str, Any]:
        """A gateway's /debug/state."""
        return self.client.get(f"{self.urls[gateway]}/debug/state").json()

    def worker_states(self, gateway: str = "gateway-0") -> dict[str, str]:
        """State by worker, as a gateway sees it."""
        return {worker["id"]: worker["state"] for worker in self.state(gateway)["workers"]}

    def is_whole(self, gateway: str = "gateway-0") -> bool:
        """Whether a gateway has every worker. A process that has ended by itself is an error."""
        for member in self.members.values():
            code = member.process.poll()
            assert code is None or code < 0, f"{member.name} ended with {code}\n{member.log.read_text()}"
        states = list(self.worker_states(gateway).values())
        return states == ["ready"] * (self._num_roles["prefill"] + self._num_roles["decode"])

    def worker(self, name: str, gateway: str = "gateway-0") -> dict[str, Any]:
        """A worker's own /debug/state."""
        listed = next(worker for worker in self.state(gateway)["workers"] if worker["id"] == name)
        port = listed["http"].rsplit(":", 1)[1]
        return self.client.get(f"http://127.0.0.1:{port}/debug/state").json()

    def gateway_id(self, gateway: str) -> str:
        """Under which workers know it."""
        return str(self.state(gateway)["id"])

    def attached(self, gateway_id: str, gateway: str) -> list[str]:
        """Workers to which a gateway's stream is open, found through another gateway."""
        ready = [name for name, state in self.worker_states(gateway).items() if state == "ready"]
        return [name for name in ready if gateway_id in self.worker(name, gateway)["gateways"]]

    def held(self, gateway: str = "gateway-0") -> dict[str, int]:
        """What is held for requests anywhere."""
        found = held_by(gateway, self.state(gateway), ("requests",))
        for name, state in self.worker_states(gateway).items():
            if state != "down":
                found |= held_by(name, self.worker(name, gateway), LIVE_COUNTS)
        return found

    def busy(self, role: str, gateway: str = "gateway-0") -> str:
        """A worker of this role that has an attempt; waits for one."""
        found: list[str] = []

        def look() -> bool:
            names = [name for name, state in self.worker_states(gateway).items() if state == "ready"]
            found[:] = [
                name for name in names if name.startswith(role) and self.worker(name, gateway)["attempts"]
            ]
            return bool(found)

        eventually(look, 20, f"a busy {role} worker")
        return found[0]

    def seconds_until_down(self, name: str, since_s: float, gateway: str = "gateway-0") -> float:
        """From a time.monotonic() until a gateway calls a worker down."""
        eventually(lambda: self.worker_states(gateway).get(name) == "down", 20, f"{name} down")
        return time.monotonic() - since_s


class CabledFleet(Fleet):
    """A gateway, a prefill and two decode workers, of which `decode-1` is at the other end of a cable.

    There are no proxies: what happens to its packets is up to the namespace.
    """

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(prefill=1, decode=2)
        self._namespace = namespace

    def _start_gateway(self, name: str) -> None:
        here = self._namespace.here
        self._spawn(
            name, "gateway", "--http-port=0", "--grpc-port=0", "--internal-port=0", f"--internal-host={here}"
        )

    def _start_worker(self, role: str, number: int) -> None:
        name = f"{role}-{number}"
        inside = self._namespace if name == "decode-1" else None
        host = inside.there if inside else self._namespace.here
        flags = [
            f"--gateway={self._internal[0]}",
            f"--host={host}",
            f"--worker-id={name}",
            "--transport=gloo",
        ]
        self._spawn(name, role, *flags, inside=inside)

    def worker(self, name: str, gateway: str = "gateway-0") -> dict[str, Any]:
        """See Fleet; the worker's own page is behind its address."""
        listed = next(worker for worker in self.state(gateway)["workers"] if worker["id"] == name)
        headers = {"authorization": f"Bearer {self._secret}"}
        return self.client.get(f"{listed['http']}/debug/state", headers=headers).json()


def _address(text: str) -> tuple[str, int]:
    host, port = text.rsplit(":", 1)
    return host, int(port)


def _free_port() -> int:
    """One that no connection of somebody else is given by chance before we use it."""
    while True:
        port = random.randrange(*PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
