"""The table of `make bench-cpu`: an arm that did not run is in it."""

import pytest

from benchmarks import cpu_report
from benchmarks.cpu import Measured
from benchmarks.peers.arm import Round


def measured(name, cpu_s, gaps, error=None):
    rounds = [
        Round(cpu_s=each, wall_s=2 * each, ttft_s=[0.1, 0.2], itl_s=gaps, outputs=[[5, 6], [7, 8]])
        for each in cpu_s
    ]
    return Measured(name=name, max_num_batched_tokens=8, versions={"torch": "1"}, rounds=rounds, error=error)


@pytest.fixture
def report():
    arms = [
        measured("transformers", [8.0, 4.0, 6.0], [0.4, 0.2]),
        measured("openvino-genai", [2.0], [0.2]),
        measured("openvino-genai, chunks", [1.0], [0.5]),
        measured("ours", [3.0], [0.1]),
        measured("broken", [], [], error="no wheel"),
    ]
    runs = [{"dtype": "float32", "threads": 1, "arms": [cpu_report.summary(each) for each in arms]}]
    cpu_report.compare(runs)
    machine = {
        "cpu": "X",
        "cpus": 2,
        "date": "now",
        "commit": "c",
        "load_average_at_start": 0.0,
        "load_average_at_end": 0.0,
    }
    return machine | {"runs": runs}


def test_ratios_are_to_the_best_setting_of_a_peer(report):
    ours = report["runs"][0]["arms"][3]
    assert ours["output_tokens_per_cpu_s"] == pytest.approx(4 / 3)
    assert ours["times_transformers"]["output_tokens_per_cpu_s"] == pytest.approx(2)
    assert ours["times_openvino-genai"]["output_tokens_per_cpu_s"] == pytest.approx(1 / 3)
    assert ours["times_openvino-genai"]["p99_itl_ms"] == pytest.approx(0.5)
    assert ours["outputs_like_transformers"] == 1
    assert "outputs" not in ours


def test_the_table_says_what_did_not_run(report):
    rows = [line for line in cpu_report.table(report).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[-1].startswith("| 1 | broken (8) | did not run: no wheel |")
    assert "Did not run: this processor has no bfloat16" in cpu_report.table(report)
