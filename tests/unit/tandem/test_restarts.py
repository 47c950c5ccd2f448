"""The restart policy, on a clock of our own."""

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.clock import ManualClock
from tandem.restarts import CRASH_WINDOW_S, MAX_CRASHES, MAX_DELAY_S, RestartPolicy


def live(policy, clock, seconds):
    policy.started()
    clock.advance(seconds)
    delay_s = policy.died()
    if delay_s is not None:
        clock.advance(delay_s)
    return delay_s


def test_delay_doubles_and_a_crash_loop_stays_down():
    clock = ManualClock()
    policy = RestartPolicy(clock)
    assert [live(policy, clock, 0.1) for _ in range(5)] == [0.5, 1, 2, 4, None]


def test_slow_crashes_back_off_up_to_the_limit():
    clock = ManualClock()
    policy = RestartPolicy(clock)
    assert [live(policy, clock, 20) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_long_life_starts_over():
    clock = ManualClock()
    policy = RestartPolicy(clock)
    assert [live(policy, clock, 1) for _ in range(3)] == [0.5, 1, 2]
    assert live(policy, clock, 3600) == 0.5


@settings(max_examples=50)
@given(st.lists(st.floats(0, 200), max_size=30))
def test_never_more_than_the_limit_in_a_window(lives):
    clock = ManualClock()
    policy = RestartPolicy(clock)
    deaths = []
    for life in lives:
        policy.started()
        clock.advance(life)
        deaths.append(clock.now())
        delay_s = policy.died()
        recent = [at for at in deaths if clock.now() - at < CRASH_WINDOW_S]
        assert (delay_s is None) == (len(recent) >= MAX_CRASHES)
        if delay_s is None:
            return
        assert 0.5 <= delay_s <= MAX_DELAY_S
        clock.advance(delay_s)
