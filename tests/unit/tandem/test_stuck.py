"""Who is stuck, on a clock of our own."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.clock import ManualClock
from tandem.stuck import GAP_S, LOOK_S, StuckWorkers

LIMIT_S = 30.0


def looks(stuck, clock, seconds, *, alive, useful):
    """One look after another for so long; what each found."""
    found = []
    for _ in range(int(seconds / LOOK_S)):
        clock.advance(LOOK_S)
        found.append(stuck.observe(alive, useful))
        stuck.check()
    return found


def served():
    clock = ManualClock()
    stuck = StuckWorkers(clock, LIMIT_S)
    assert stuck.observe({7, 8}, {7, 8}) == []
    return stuck, clock


def test_who_served_and_does_not_for_the_limit_is_stuck():
    stuck, clock = served()
    found = looks(stuck, clock, LIMIT_S + 3 * LOOK_S, alive={7, 8}, useful={8})
    num_looks = int(LIMIT_S / LOOK_S) + 1
    assert not any(found[:num_looks])
    assert found[num_looks:] == [[7], [], []][: len(found) - num_looks]


def test_who_loads_is_never_stuck():
    stuck, clock = served()
    assert not any(looks(stuck, clock, 100 * LIMIT_S, alive={7, 9}, useful={7}))


def test_who_serves_again_starts_over():
    stuck, clock = served()
    for _ in range(3):
        assert not any(looks(stuck, clock, LIMIT_S, alive={7, 8}, useful={8}))
        assert not any(looks(stuck, clock, LOOK_S, alive={7, 8}, useful={7, 8}))


def test_time_without_an_answer_excuses_all():
    stuck, clock = served()
    for _ in range(3):
        assert not any(looks(stuck, clock, LIMIT_S, alive={7, 8}, useful=()))
        clock.advance(GAP_S + 0.1)
    assert not any(looks(stuck, clock, LIMIT_S, alive={7, 8}, useful=()))


def test_a_new_life_owes_nothing_to_the_one_before():
    stuck, clock = served()
    assert any(looks(stuck, clock, 2 * LIMIT_S, alive={7, 8}, useful={8}))
    assert not any(looks(stuck, clock, 2 * LIMIT_S, alive={9, 8}, useful={8}))


@given(st.lists(st.tuples(st.floats(0, 8), st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)))))
def test_against_the_whole_story(story):
    """Stuck is who was of use, and then missed in every answer of the limit, with no gap between two."""
    clock = ManualClock()
    stuck = StuckWorkers(clock, 12.0)
    told, named = [(0.0, set(), set())], set()
    for pause_s, alive, useful in story:
        clock.advance(pause_s)
        told.append((clock.now(), alive, useful))
        named = (named & alive) - useful
        expected = _by_definition(told, 12.0) - named
        assert set(stuck.observe(alive, useful)) == expected
        named |= expected
        stuck.check()


def _by_definition(told, limit_s):
    found = set()
    for pid in told[-1][1]:
        life, run = _life(told, pid), []
        for at, useful in reversed(life):
            if pid in useful or (run and run[-1] - at > GAP_S):
                break
            run.append(at)
        if run and run[0] - run[-1] > limit_s and any(pid in useful for _, useful in life):
            found.add(pid)
    return found


def _life(told, pid):
    """The answers since this pid was last not there."""
    life = []
    for at, alive, useful in told:
        life = [*life, (at, useful)] if pid in alive else []
    return life
