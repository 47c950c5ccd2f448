"""The engine thread with a fake engine: order of commands and steps, sleep, death."""

import queue
import threading

import pytest

from runtime.clock import ManualClock
from worker.engine_thread import EngineThread


class FakeEngine:
    def __init__(self) -> None:
        self.work = 0
        self.log: list[str] = []
        self.broken = False

    def has_work(self) -> bool:
        return self.work > 0

    def step(self) -> str:
        if self.broken:
            raise ZeroDivisionError
        self.work -= 1
        self.log.append("step")
        return "result"


class Handler:
    def __init__(self) -> None:
        self.results: list[object] = []

    def between_steps(self, engine: FakeEngine) -> None:
        engine.log.append("between")

    def on_step(self, engine: FakeEngine, result: object) -> None:
        self.results.append(result)

    def num_tokens_due(self) -> int:
        return 1


@pytest.fixture
def parts():
    deaths: list[str] = []
    died = threading.Event()

    def on_death(reason: str) -> None:
        deaths.append(reason)
        died.set()

    engine, handler = FakeEngine(), Handler()
    thread = EngineThread(engine, handler, on_death)
    thread.start()
    yield engine, handler, thread, deaths, died
    thread.stop(5)


def settle(thread: EngineThread) -> None:
    done = threading.Event()
    thread.post(lambda _: done.set())
    assert done.wait(5)


def test_the_thread_enters_before_anything_else(parts) -> None:
    engine, handler, *_ = parts
    entered: list[str] = []
    thread = EngineThread(
        engine, handler, pytest.fail, enter=lambda: entered.append(threading.current_thread().name)
    )
    thread.post(lambda _: entered.append("command"))
    thread.start()
    settle(thread)
    thread.stop(5)
    assert entered == ["engine", "command"]


def test_commands_run_in_order_before_the_next_step(parts) -> None:
    engine, handler, thread, _, _ = parts

    def work(count: int):
        def command(engine: FakeEngine) -> None:
            engine.log.append(f"command {count}")
            engine.work += count

        return command

    thread.post(work(1))
    settle(thread)
    settle(thread)
    assert [entry for entry in engine.log if entry != "between"] == ["command 1", "step"]
    assert handler.results == ["result"]


def test_an_error_in_a_step_is_the_death_of_the_worker(parts) -> None:
    _, _, thread, deaths, died = parts

    def breaks(engine: FakeEngine) -> None:
        engine.broken, engine.work = True, 1

    thread.post(breaks)
    assert died.wait(5)
    assert deaths == ["engine: ZeroDivisionError"]


def test_only_work_counts_as_busy() -> None:
    """The wait for a command does not, however long it is; the commands and the steps do."""
    clock, engine = ManualClock(), FakeEngine()

    class Inbox:
        def get(self, block: bool) -> object:
            clock.advance(100 if block else 0)
            return work

        def get_nowait(self) -> object:
            raise queue.Empty

    class Slow(Handler):
        def on_step(self, engine: FakeEngine, result: object) -> None:
            clock.advance(2)

    def work(engine: FakeEngine) -> None:
        clock.advance(1)
        engine.work += 2

    thread = EngineThread(engine, Slow(), lambda reason: None, clock)
    thread._inbox = Inbox()
    thread._step()
    assert (thread.num_steps, thread.busy_s) == (1, 3)
    thread._step()  # there is work: it does not wait
    assert (thread.num_steps, thread.busy_s, clock.now()) == (2, 6, 106)
