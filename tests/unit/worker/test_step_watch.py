"""What is a hang and what is only a long step."""

from runtime.clock import ManualClock
from runtime.limits import HANG_S
from worker.step_watch import FACTOR, FIRST_STEP_S, StepWatch


def steps(watch: StepWatch, clock: ManualClock, num_tokens: int, seconds: float) -> None:
    with watch.step(num_tokens):
        clock.advance(seconds)


def hangs_after(watch: StepWatch, clock: ManualClock, num_tokens: int) -> float:
    """Seconds into a step of so many tokens at which it counts as hung."""
    with watch.step(num_tokens):
        start_s = clock.now()
        while not watch.is_hung():
            clock.advance(0.01)
        found_s = clock.now() - start_s
    assert not watch.is_hung()
    return found_s


def test_quick_steps_make_a_hang_of_two_seconds() -> None:
    clock = ManualClock()
    watch = StepWatch(clock)
    for _ in range(10):
        steps(watch, clock, 1, 0.004)
    assert HANG_S <= hangs_after(watch, clock, 1) < HANG_S + 0.05


def test_slow_steps_and_larger_ones_have_more_time() -> None:
    clock = ManualClock()
    watch = StepWatch(clock)
    assert hangs_after(watch, clock, 1) >= FACTOR * FIRST_STEP_S
    watch = StepWatch(clock)
    steps(watch, clock, 1, 0.5)
    assert watch.predict(1) == 0.5
    assert watch.predict(512) == 0.5 * 512
    steps(watch, clock, 512, 8)
    assert (watch.predict(300), watch.predict(2)) == (8, 8)


def test_an_extreme_fades_and_a_failed_step_teaches_nothing() -> None:
    clock = ManualClock()
    watch = StepWatch(clock)
    steps(watch, clock, 1, 30)
    for _ in range(300):
        steps(watch, clock, 1, 0.01)
    assert watch.predict(1) < 0.1
    try:
        with watch.step(1):
            clock.advance(60)
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert watch.predict(1) < 0.1
    assert not watch.is_hung()
