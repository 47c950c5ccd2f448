"""The processes of `tandem up`: started together, watched, restarted, drained.

1. The gateway starts first; its stdout line `listening http=URL grpc=HOST:PORT internal=HOST:PORT` names
   its ports. Further gateway processes share the public ones. Then all workers start, pointed at the internal
   addresses of all of them.
2. The fleet is ready when GET /ready is 200 and /debug/state lists every worker as ready. A child that dies
   before that ends the fleet: its `error:` line becomes our StartupError.
3. From then on a child that dies is started again after a back-off, the gateway on the same ports. A worker
   that lives and has not been ready for long (`stuck`) is killed, and so started again.
4. To stop, the gateway gets SIGTERM first and drains, then the workers; what is left is killed.
"""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import httpx

from runtime.clock import Clock, SystemClock
from runtime.errors import StartupError
from runtime.lifecycle import Shutdown
from runtime.limits import DRAIN_TIMEOUT_S
from tandem.child import Child
from tandem.restarts import CRASH_WINDOW_S, FIRST_DELAY_S, MAX_CRASHES, RestartPolicy
from tandem.stuck import ANSWER_S, LOOK_S, StuckWorkers

logger = logging.getLogger(__name__)

POLL_S = 0.05
"""How often a condition of the start is looked at."""

PROGRESS_S = 5.0
"""How often a slow start says what it waits for."""

GATEWAY_STOP_S = DRAIN_TIMEOUT_S + 1.0
"""From SIGTERM until the workers are told to stop, whatever the gateway does."""

STOP_S = DRAIN_TIMEOUT_S + 4.0
"""From SIGTERM until everything that still runs is killed; 30 s is what was promised."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where the gateway can be reached."""

    http: str
    """URL."""
    grpc: str
    """host:port."""
    internal: str
    """host:port for workers, or several with commas between."""

    @classmethod
    def parse(cls, line: str) -> "Listening | None":
        """From the gateway's line on stdout; None if the line says something else."""
        word, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if word != "listening" or not {"http", "grpc", "internal"} <= values.keys():
            return None
        return cls(http=values["http"], grpc=values["grpc"], internal=values["internal"])


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """What to start. Commands are functions of the gateway's addresses, which are known only once it runs."""

    gateway: Callable[[Listening | None], Sequence[str]]
    """Program and arguments; with addresses that it is to have, an internal port of 0 being any."""
    workers: Mapping[str, Callable[[Listening], Sequence[str]]]
    """By worker id."""
    gateway_processes: int = 1
    """How many of the first, sharing public ports."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Whole environment of every child."""
    admin_key: str | None = None
    """What /debug/state asks for when it is not reached over loopback."""
    first_restart_delay_s: float = FIRST_DELAY_S
    """Wait before the first restart of a child; doubles from there."""
    restart_stuck_after_s: float = 30.0
    """A worker that was ready and has not been for so long is killed."""


class Member:
    """One place in the fleet, filled by one child after another."""

    def __init__(self, name: str, command: Callable[[], Sequence[str]], policy: RestartPolicy) -> None:
        self.name = name
        self.command = command
        self.policy = policy
        self.child: Child | None = None
        self.death: str | None = None
        """Why the last child ended."""
        self.stopping = False
        self.ended = asyncio.Event()
        """Clear while there is a child, or one is being started."""
        self.ended.set()

    @property
    def pid(self) -> int:
        """Of the last child; 0 before the first."""
        return self.child.pid if self.child is not None else 0

    async def run_once(self, env: Mapping[str, str], on_stdout: Callable[[str], None]) -> None:
        """Start a child and stay until it has ended."""
        self.policy.started()
        self.ended.clear()
        try:
            self.child = await Child.start(self.command(), env)
            if self.stopping:  # asked for while the child was being started
                self.child.terminate()
            code = await self.child.run(on_stdout)
            end = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            self.death = self.child.error or f"{self.name} {end}"
        finally:
            self.ended.set()

    def stop(self) -> None:
        """Ask the child to drain and end; no other one is started."""
        self.stopping = True
        if self.child is not None:
            self.child.terminate()

    def kill(self) -> None:
        """End the child and all it started, at once."""
        self.stopping = True
        self.end_life()

    def end_life(self) -> None:
        """End the child and all it started, at once; another one follows."""
        if self.child is not None:
            self.child.kill()


class Fleet:
    """One gateway and its workers, as child processes."""

    def __init__(
        self, plan: FleetPlan, *, say: Callable[[str], None] | None = None, clock: Clock | None = None
    ) -> None:
        self._plan = plan
        self._say = say or _to_stderr
        self._clock = clock or SystemClock()
        self._listening: dict[str, Listening] = {}
        """By gateway process, once it has said so; kept over its restarts."""
        self._gateways = [
            self._member(name, lambda name=name: plan.gateway(self._place_of(name)))  # type: ignore[misc]
            for name in gateway_names(plan.gateway_processes)
        ]
        self._workers = [
            self._member(name, lambda command=command: command(self.listening))  # type: ignore[misc]
            for name, command in plan.workers.items()
        ]
        self._started = False
        self._waiting_for: str | None = None

    def _member(self, name: str, command: Callable[[], Sequence[str]]) -> Member:
        delay_s = self._plan.first_restart_delay_s
        return Member(name, command, RestartPolicy(self._clock, first_delay_s=delay_s))

    @property
    def listening(self) -> Listening:
        """The gateway's addresses; they do not change once known."""
        places = [self._listening[gateway.name] for gateway in self._gateways]
        return replace(places[0], internal=",".join(place.internal for place in places))

    def _place_of(self, gateway: str) -> Listening | None:
        """Where a gateway process is to listen: where it did, or beside the first one, or anywhere."""
        first = self._listening.get(self._gateways[0].name)
        beside = first and replace(first, internal=first.internal.rpartition(":")[0] + ":0")
        return self._listening.get(gateway, beside)

    @property
    def members(self) -> list[Member]:
        """The gateway processes, then the workers."""
        return [*self._gateways, *self._workers]

    async def serve(self, shutdown: Shutdown, on_ready: Callable[[Listening], None]) -> None:
        """Start, call `on_ready`, watch until `shutdown`, stop; StartupError if a child cannot start."""
        async with asyncio.TaskGroup() as tasks:
            try:
                if await self._start(tasks, shutdown):
                    self._started = True
                    tasks.create_task(self._restart_stuck(shutdown))
                    on_ready(self.listening)
                    await shutdown.requested.wait()
            finally:
                await self._stop()

    def kill(self) -> None:
        """End every process at once."""
        for member in self.members:
            member.kill()

    async def _start(self, tasks: asyncio.TaskGroup, shutdown: Shutdown) -> bool:
        """True once everything is ready, False if a shutdown came first."""
        for gateway in self._gateways:
            tasks.create_task(self._keep(gateway, shutdown))
            if not await self._until(lambda gateway=gateway: self._is_listening(gateway), shutdown):  # type: ignore[misc]
                return False
        for worker in self._workers:
            tasks.create_task(self._keep(worker, shutdown))
        async with self._client(timeout_s=5.0) as http:
            return await self._until(lambda: self._is_ready(http), shutdown)

    def _client(self, *, timeout_s: float) -> httpx.AsyncClient:
        """For the gateway's /ready and /debug/state."""
        headers = {"authorization": f"Bearer {self._plan.admin_key}"} if self._plan.admin_key else {}
        url = _reachable(self.listening.http)
        return httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=timeout_s)

    async def _until(self, condition: Callable[[], Awaitable[bool]], shutdown: Shutdown) -> bool:
        said_s = self._clock.now()
        while not await condition():
            dead = next((member for member in self.members if member.death is not None), None)
            if dead is not None:
                raise StartupError(str(dead.death))
            if self._clock.now() - said_s >= PROGRESS_S:
                said_s = self._clock.now()
                self._say(f"waiting for {self._waiting_for}")
            if await _set_within(shutdown.requested, POLL_S):
                return False
        return True

    async def _is_listening(self, gateway: Member) -> bool:
        self._waiting_for = f"the {gateway.name} to listen"
        return gateway.name in self._listening

    async def _is_ready(self, http: httpx.AsyncClient) -> bool:
        try:
            state = await http.get("/debug/state")
            ready = await http.get("/ready")
        except httpx.HTTPError as error:
            self._waiting_for = f"the gateway to answer ({type(error).__name__})"
            return False
        missing = self._not_ready(state)
        if missing:
            self._waiting_for = ", ".join(missing)
        elif ready.status_code != 200:
            self._waiting_for = f"the gateway ({ready.text})"
        return not missing and ready.status_code == 200

    def _not_ready(self, state: httpx.Response) -> list[str]:
        """Ids of our workers that the gateway does not call ready; without access to its state, none."""
        if state.status_code in (401, 403):
            return []
        if state.status_code != 200:
            return [f"the gateway's state (HTTP {state.status_code})"]
        ready = {worker["id"] for worker in state.json()["workers"] if worker["state"] == "ready"}
        return [worker.name for worker in self._workers if worker.name not in ready]

    async def _keep(self, member: Member, shutdown: Shutdown) -> None:
        """Keep a child in this place until the fleet stops, or its policy gives up."""
        while not member.stopping:
            await member.run_once(self._plan.env, lambda line: self._on_stdout(member, line))
            if member.stopping or not self._started:
                return
            delay_s = member.policy.died()
            if delay_s is None:
                logger.error(
                    "%s died %d times within %.0f s and stays down: %s",
                    *(member.name, MAX_CRASHES, CRASH_WINDOW_S, member.death),
                )
                return
            logger.warning("%s: %s; starting again in %.1f s", member.name, member.death, delay_s)
            if await _set_within(shutdown.requested, delay_s):
                return

    async def _restart_stuck(self, shutdown: Shutdown) -> None:
        """Kill workers that live and are of no use to the gateway, until the fleet stops."""
        stuck = StuckWorkers(self._clock, self._plan.restart_stuck_after_s)
        async with self._client(timeout_s=ANSWER_S) as http:
            while not await _set_within(shutdown.requested, LOOK_S):
                useful = await _useful_pids(http)
                if useful is None:
                    continue
                lives = {worker.pid: worker for worker in self._workers if not worker.ended.is_set()}
                for pid in stuck.observe(lives.keys(), useful):
                    logger.error("%s lives and does not serve: it is killed", lives[pid].name)
                    lives[pid].end_life()

    def _on_stdout(self, member: Member, line: str) -> None:
        listening = Listening.parse(line) if member in self._gateways and line.strip() else None
        if listening is None:
            self._say(f"{member.name}: {line}")
        else:
            self._listening[member.name] = listening

    async def _stop(self) -> None:
        try:
            async with asyncio.timeout(STOP_S):
                for gateway in self._gateways:
                    gateway.stop()
                try:
                    async with asyncio.timeout(GATEWAY_STOP_S):
                        for gateway in self._gateways:
                            await gateway.ended.wait()
                except TimeoutError:
                    logger.warning("the gateway has not drained in %.0f s", GATEWAY_STOP_S)
                for worker in self._workers:
                    worker.stop()
                for member in self.members:
                    await member.ended.wait()
        except TimeoutError:
            left = [member.name for member in self.members if not member.ended.is_set()]
            logger.warning("killing what has not stopped: %s", ", ".join(left))
        finally:
            self.kill()


def gateway_names(count: int) -> list[str]:
    """Names of the gateway processes."""
    return ["gateway"] if count == 1 else [f"gateway-{index}" for index in range(count)]


async def _useful_pids(http: httpx.AsyncClient) -> set[int] | None:
    """Processes of the workers that serve, or drain, as the gateway knows them; None if it does not say."""
    try:
        state = await http.get("/debug/state")
    except httpx.HTTPError:
        return None
    if state.status_code != 200:
        return None
    workers = state.json()["workers"]
    return {
        worker["pid"]
        for worker in workers
        if worker["state"] == "draining" or (worker["state"] == "ready" and worker["attached"])
    }


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _reachable(url: str) -> str:
    """A URL that a client on this machine can open, for a server that may listen on every address."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
