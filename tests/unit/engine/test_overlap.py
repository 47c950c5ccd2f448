"""Steps that start before the one before them has landed: the tokens of steps in order, nobody's blocks."""

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from engine.request import FinishReason, RequestState
from tests.unit.engine.overlap_mixes import Alone, machine_of, run_busily


@pytest.fixture(scope="module")
def alone(tiny_model):
    return Alone(tiny_model)


def test_any_mix_gives_the_tokens_of_steps_in_order(tiny_model, alone):
    run_state_machine_as_test(
        machine_of(tiny_model, alone),
        settings=settings(max_examples=20, stateful_step_count=30, deadline=None, phases=(Phase.generate,)),
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_busy_engine_gives_the_tokens_of_steps_in_order(tiny_model, alone, seed):
    run_busily(machine_of(tiny_model, alone)(), seed)


@pytest.fixture
def overlapping(make_engine):
    engine = make_engine(overlap="on", num_blocks=40, max_num_seqs=6)
    engine.num_computed = 0
    run = engine._runner.flights._graphs.run

    def counted(*args):
        engine.num_computed += 1
        return run(*args)

    engine._runner.flights._graphs.run = counted
    return engine


def test_no_step_is_computed_for_a_token_that_is_known_to_be_the_last(overlapping, make_request):
    overlapping.submit(make_request(9, max_tokens=12))
    overlapping.step()
    in_flight = [overlapping._pipeline.in_flight for _ in range(11) if overlapping.step()]
    assert in_flight == [True] * 10 + [False]
    assert overlapping.num_computed == 11
    assert not overlapping.has_work()


def test_a_late_stop_costs_one_step_whose_token_nobody_sees(overlapping, make_engine, make_request):
    (whole,) = make_engine().run(make_request(9))
    request = make_request(9, stop_token_ids=(whole[5],))
    overlapping.submit(request)
    outputs = []
    while overlapping.has_work():
        outputs += overlapping.step().outputs
    stop = whole.index(whole[5])
    assert request.output_token_ids == whole[: stop + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert overlapping.num_computed == stop + 1


def test_blocks_that_a_step_in_flight_writes_are_free_when_it_has_landed(overlapping, make_request):
    leaving, staying = make_request(9), make_request(10)
    for request in (leaving, staying):
        overlapping.submit(request)
    overlapping.step()
    overlapping.step()
    assert overlapping._pipeline.in_flight
    used, held = overlapping.load().blocks_used, len(leaving.block_tables[0])
    assert overlapping.abort(leaving.key)
    assert overlapping.load().blocks_used == used
    result = overlapping.step()
    assert [item.request for item in result.batch] == [staying]
    assert overlapping.load().blocks_used <= used - held + 1
    overlapping.abort(staying.key)
    assert overlapping.has_work()
    overlapping.step()
    assert overlapping.load().blocks_used == 0
    assert not overlapping.has_work()


def test_a_block_that_is_exchanged_for_a_known_one_is_kept_for_the_step_that_reads_it(
    overlapping, make_request
):
    """Two requests alike fill a block with the same tokens in the same step: one takes over the other's."""
    one, other = make_request(9, key=1), make_request(9, key=2)
    overlapping.submit(one)
    overlapping.step()
    overlapping.submit(other)
    pool = overlapping.kv_cache.tables.pools[0]
    kept = 0
    while overlapping.has_work():
        before = {block for request in (one, other) for table in request.block_tables for block in table}
        overlapping.step()
        if one.state is other.state is RequestState.RUNNING and overlapping._pipeline.in_flight:
            given_up = before.difference(one.block_tables[0], other.block_tables[0])
            assert all(pool.ref_count(block) == 1 for block in given_up)
            kept += len(given_up)
    assert kept
    assert overlapping.load().blocks_used == 0


def test_a_prompt_waits_for_no_more_than_the_step_in_flight(overlapping, make_request):
    overlapping.submit(make_request(9))
    overlapping.step()
    overlapping.step()
    newcomer = make_request(4)
    overlapping.submit(newcomer)
    overlapping.step()
    overlapping.step()
    assert len(newcomer.output_token_ids) == 1


def test_a_fault_in_one_request_ends_it_alone(overlapping, make_engine, make_request):
    good, bad = make_request(9), make_request(10)
    for request in (good, bad):
        overlapping.submit(request)
    overlapping.step()
    overlapping.step()
    overlapping.kv_cache.groups[0][:, :, bad.block_tables[0][0]] = torch.nan
    errors = []
    while overlapping.has_work():
        errors += [output for output in overlapping.step().outputs if output.error]
    assert [(output.request, output.finish_reason) for output in errors] == [(bad, FinishReason.ERROR)]
    assert [good.output_token_ids] == make_engine().run(make_request(9))


@pytest.mark.parametrize(
    "config", [{}, {"overlap": "on", "speculative": "ngram"}, {"overlap": "off", "cuda_graphs": "auto"}]
)
def test_steps_go_in_order_where_they_must(make_engine, config):
    assert make_engine(**config)._runner.flights is None


@pytest.fixture
def crowded(make_engine, make_request):
    """Four running requests of the last rank in flight, who fill the pool, and one of the first rank."""
    engine = make_engine(overlap="on", num_blocks=24, scheduling_policy="priority", swap_space_bytes=0)
    running = [make_request(10 + i, max_tokens=30) for i in range(4)]
    for request in running:
        engine.submit(request)
    while not (engine._pipeline.in_flight and all(each.state is RequestState.RUNNING for each in running)):
        engine.step()
    first = make_request(30)
    first.priority = 1
    return engine, running, first


def test_no_more_requests_make_room_than_must_while_their_blocks_land(crowded):
    engine, running, first = crowded
    while not engine.reserve(first):
        assert engine._pipeline.in_flight
        engine.step()
    assert [request.state for request in running].count(RequestState.WAITING) == 1


def test_a_request_may_be_displaced_and_aborted_in_one_flight(crowded):
    engine, running, first = crowded
    assert not engine.reserve(first)
    [displaced] = [request for request in running if request.state is RequestState.WAITING]
    engine.abort(displaced.key)
    engine.step()
    assert engine.reserve(first)
