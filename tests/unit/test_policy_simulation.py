"""The simulation of scheduling policies on a few requests."""

import pytest

from benchmarks.policies import ARMS, LOADS, Simulation, simulate, summary, table


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_request_gets_its_tokens_and_times_are_possible(load, arm):
    simulation = Simulation(load, arm, 50).run()
    machine = load.machine
    for job in simulation.jobs:
        num_prompt, num_outputs = (
            len(job.request.prompt_token_ids),
            len(job.request.output_token_ids),
        )
        assert num_outputs == job.request.sampling.max_tokens
        at_least_s = (machine.prefill[1] * num_prompt + machine.decode_large[0] * (num_outputs - 1)) / 1e3
        assert job.arrival < job.first_token <= job.end
        assert job.end - job.arrival >= at_least_s
    assert summary(simulation)["mean_jct_s"] > 0


def test_the_table_has_a_row_for_each_trace_and_policy():
    rows = simulate(num_requests=5)
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(LOADS) * len(ARMS)
    assert "azure-conv | fcfs" in lines[2]
