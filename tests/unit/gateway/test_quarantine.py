"""Whoever kills workers is found; whoever stands beside is not blamed."""

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from gateway.quarantine import (
    MAX_QUARANTINED,
    PROVEN_AFTER_STEPS,
    QUARANTINE_S,
    Quarantine,
    Suspicion,
    WorkerLost,
    losses,
)
from gateway.trials import TRIAL_S, TURN_WAIT_S, Trials, Watch
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import ManualClock
from runtime.errors import InvalidRequest, Quarantined

WORKER = pb.WorkerIdentity(worker_id="d1", boot_id="b")
ALONE, BESIDE = WorkerLost(WORKER, alone=True), WorkerLost(WORKER, alone=False)


def proven() -> Suspicion:
    suspicion = Suspicion()
    for _ in range(PROVEN_AFTER_STEPS):
        suspicion.on_step()
    return suspicion


def test_two_deaths_in_a_row_convict() -> None:
    suspicion = Suspicion()
    assert not suspicion.strike(BESIDE)
    assert suspicion.is_suspect
    suspicion.begin()
    assert not suspicion.strike(BESIDE)  # another suspect was there: nobody knows
    assert suspicion.would_convict(ALONE)
    assert suspicion.strike(ALONE)


def test_who_ran_well_is_tried_again_without_suspicion_once() -> None:
    suspicion = proven()
    assert not suspicion.strike(ALONE)
    assert not suspicion.is_suspect
    suspicion.begin()
    assert not suspicion.strike(ALONE)
    assert suspicion.is_suspect
    suspicion.begin()
    assert suspicion.strike(ALONE)


def test_steps_clear_a_suspect() -> None:
    suspicion = Suspicion()
    suspicion.strike(ALONE)
    suspicion.begin()
    for _ in range(PROVEN_AFTER_STEPS):
        assert suspicion.is_suspect
        suspicion.on_step()
    assert not suspicion.is_suspect


def test_a_suspect_is_alone_among_those_above_suspicion() -> None:
    suspect, fresh, good = Suspicion(), Suspicion(), proven()
    suspect.strike(ALONE)
    assert [loss.alone for loss in losses(WORKER, [suspect, fresh, good])] == [True, False, False]
    other = Suspicion()
    other.strike(ALONE)
    assert [loss.alone for loss in losses(WORKER, [suspect, other])] == [False, False]
    assert [loss.alone for loss in losses(WORKER, [fresh])] == [True]


def request(*token_ids: int, seed: int = 0, temperature: float = 1.0) -> tuple[list[int], pb.SamplingParams]:
    return list(token_ids), pb.SamplingParams(seed=seed, temperature=temperature)


def test_what_is_convicted_is_refused_for_a_while_whatever_its_seed() -> None:
    clock = ManualClock()
    quarantine = Quarantine(clock)
    quarantine.convict(*request(1, 2, seed=5))
    with pytest.raises(Quarantined, match="600 s") as raised:
        quarantine.admit(*request(1, 2, seed=6))
    assert isinstance(raised.value, InvalidRequest)
    quarantine.admit(*request(1, 2, 3))
    quarantine.admit(*request(1, 2, temperature=0.5))
    clock.advance(QUARANTINE_S)
    quarantine.admit(*request(1, 2))


def test_the_quarantine_is_bounded() -> None:
    quarantine = Quarantine(ManualClock())
    for number in range(MAX_QUARANTINED + 1):
        quarantine.convict(*request(number))
    quarantine.admit(*request(0))
    with pytest.raises(Quarantined):
        quarantine.admit(*request(1))


class Deaths(RuleBasedStateMachine):
    """Requests on workers; some are poison and kill after a number of steps. Suspects run one at a time.

    The model is the truth: `poison` says who really did it.
    """

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.suspicion: dict[int, Suspicion] = {}
        self.poison: dict[int, int | None] = {}
        self.place: dict[int, int] = {}
        self.steps: dict[int, int] = {}
        self.killed: dict[int, int] = {}

    @rule(target=requests, worker=st.integers(0, 2), poison=st.one_of(st.none(), st.integers(0, 12)))
    def arrive(self, worker: int, poison: int | None) -> int:
        number = len(self.poison)
        self.suspicion[number], self.poison[number] = Suspicion(), poison
        self.steps[number], self.killed[number] = 0, 0
        self.place[number] = worker
        return number

    @rule(number=requests, count=st.integers(1, 9))
    def run(self, number: int, count: int) -> None:
        for _ in range(count):
            if number not in self.place:
                return
            if self.steps[number] == self.poison[number]:
                self.killed[number] += 1
                self.die(self.place[number])
                return
            self.steps[number] += 1
            self.suspicion[number].on_step()

    @rule(worker=st.integers(0, 2))
    def die(self, worker: int) -> None:
        there = [number for number, at in self.place.items() if at == worker]
        for number, loss in zip(there, losses(WORKER, [self.suspicion[each] for each in there]), strict=True):
            del self.place[number]
            if self.suspicion[number].strike(loss):
                assert loss.alone
                self.suspicion.pop(number)
            else:
                self.suspicion[number].begin()
        self.resume()

    def resume(self) -> None:
        """Everybody who may goes on: suspects only if no other suspect runs."""
        waiting = [number for number in self.suspicion if number not in self.place]
        for number in waiting:
            on_trial = any(self.suspicion[each].is_suspect for each in self.place)
            if not (self.suspicion[number].is_suspect and on_trial):
                self.place[number] = number % 3

    @invariant()
    def the_truth(self) -> None:
        for suspicion in self.suspicion.values():
            suspicion.check()
        assert sum(self.suspicion[number].is_suspect for number in self.place) <= 1
        for number, poison in self.poison.items():
            late = poison is not None and poison >= PROVEN_AFTER_STEPS
            assert self.killed[number] <= (3 if late else 2)


TestDeaths = Deaths.TestCase
TestDeaths.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, database=None
)


async def test_suspects_have_their_turn_one_by_one() -> None:
    trials = Trials()
    deadline = asyncio.get_running_loop().time() + 60
    watches = [Watch(trials) for _ in range(3)]
    for watch in watches:
        watch.suspicion.strike(ALONE)
    begun: list[int] = []

    async def begin(number: int) -> None:
        await watches[number].begin(deadline)
        begun.append(number)

    tasks = [asyncio.ensure_future(begin(number)) for number in range(3)]
    fresh = Watch(trials)
    await fresh.begin(deadline)  # at once
    await asyncio.sleep(0)
    assert begun == [0]
    for _ in range(PROVEN_AFTER_STEPS):
        watches[0].suspicion.on_step()
    watches[0].settle()
    await asyncio.wait(tasks[:2])
    assert begun == [0, 1]
    watches[1].end()
    watches[1].end()
    await asyncio.wait(tasks)
    assert begun == [0, 1, 2]
    watches[2].end()
    assert not trials._turn.locked()


async def test_nobody_waits_beyond_the_deadline() -> None:
    trials = Trials()
    first, second = Watch(trials), Watch(trials)
    for watch in (first, second):
        watch.suspicion.strike(ALONE)
    now = asyncio.get_running_loop().time
    await first.begin(now() + 60)
    started = now()
    await second.begin(now() + 0.02)
    assert now() - started < min(TURN_WAIT_S, TRIAL_S)
    second.end()
    assert trials._turn.locked()
    first.end()
