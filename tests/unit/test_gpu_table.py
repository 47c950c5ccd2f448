"""The GPU table: goals, floors, and what becomes of rows that fail."""

import contextlib
import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_rows import child, clocks, floors, spawn, timing
from benchmarks.gpu_rows.bench import MATRIX, READ, Bench
from benchmarks.gpu_rows.busy import covered
from benchmarks.gpu_rows.catalogue import SECTIONS, catalogue
from benchmarks.gpu_rows.conductor import Conductor
from benchmarks.gpu_rows.job import OUT_OF_TIME, Job
from benchmarks.gpu_rows.report import row_markdown
from benchmarks.gpu_rows.row import Goal, Measured, Row, result
from benchmarks.gpu_rows.spawn import ChildDied
from engine.models.config import read_config
from engine.models.llama_weights import weight_table

ROWS = [
    Row(name=name, section=section, unit="ms", estimate_s=1.0)
    for name, section in (("a", "ceilings"), ("b", "ceilings"), ("c", "ceilings"), ("d", "kernels"))
]


def conductor(spawn, budget_s=1000.0, rows=ROWS):
    return Conductor(rows, device="cpu", rehearsal=False, budget_s=budget_s, spawn=spawn)


def results(spawn, **arguments):
    conducted = conductor(spawn, **arguments)
    for section in conducted.sections():
        list(conducted.run(section))
    return conducted.results


def measured(name, value=2.0):
    return {"row": name, "measured": {"value": value, "floor": 1.0, "details": {}}}


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (None, 1.0, "measured"),
        (Goal("ratio", "<=", 1.25), 2.5, "met"),
        (Goal("ratio", "<=", 1.25), 2.6, "missed"),
        (Goal("ratio", ">=", 1.5), 2.9, "missed"),
        (Goal("measured", "<=", 60), 59.0, "met"),
        (Goal("excess", "<=", 3), 5.0, "met"),
        (Goal("excess", "<=", 3), 5.1, "missed"),
    ],
)
def test_a_goal_is_held_against_its_own_quantity(goal, value, verdict):
    row = Row(name="x", section="kernels", unit="ms", estimate_s=1, goal=goal)
    assert result(row, Measured(value=value, floor=2.0))["verdict"] == verdict


def test_without_a_floor_there_is_no_verdict_on_a_ratio():
    row = Row(name="x", section="kernels", unit="ms", estimate_s=1, goal=Goal("ratio", "<=", 1.0))
    assert result(row, Measured(value=1.0))["verdict"] == "measured"


def test_every_row_has_the_same_columns():
    row = Row(name="x", section="kernels", unit="µs", estimate_s=1, goal=Goal("measured", "<=", 60))
    lines = [
        row_markdown(each)
        for each in (
            result(row, Measured(value=50.0, floor=40.0)),
            result(row, Measured(value=50.0)),
            result(row, None, "a | b"),
        )
    ]
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert "1.25×" in lines[0]
    assert lines[2] == "| x | unmeasured: a \\| b | | | | ≤ 60 µs | unmeasured |"


def test_a_failed_row_keeps_its_error_and_the_ceilings_go_on_to_others():
    jobs = []

    def spawn(job, limits):
        jobs.append(job)
        if job.section == "ceilings":
            yield from [measured("a"), {"begin": "b"}, {"row": "b", "error": "E: no"}, measured("c", 4.0)]
        else:
            yield measured("d")

    found = results(spawn)
    assert found["b"]["error"] == "E: no"
    assert found["b"]["verdict"] == "unmeasured"
    assert jobs[1].ceilings == {"a": 2.0, "c": 4.0}


def test_a_process_that_dies_costs_the_row_it_was_at():
    def spawn(job, limits):
        for name in job.rows:
            yield {"begin": name}
            if name == "b":
                raise ChildDied("killed")
            yield measured(name)

    found = results(spawn)
    assert {name: row["error"] for name, row in found.items()} == {
        "a": None, "b": "killed", "c": None, "d": None
    }  # fmt: skip


def test_a_process_that_never_starts_costs_its_section():
    def spawn(job, limits):
        if job.section == "ceilings":
            raise ChildDied("no module")
        yield measured("d")

    found = results(spawn)
    assert [found[name]["error"] for name in "abc"] == ["no module"] * 3
    assert found["d"]["measured"] == 2.0


def test_what_does_not_fit_into_the_budget_is_named():
    found = results(lambda job, limits: iter(()), budget_s=0.5)
    assert {row["error"] for row in found.values()} == {OUT_OF_TIME}


def program(text):
    return [sys.executable, "-S", "-c", text]


def job():
    return Job(section="kernels", rows=["d"], device="cpu", rehearsal=True, seconds=30.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; sys.exit('out of words')", "out of words"),
        ("print('{\"begin\": 1}', flush=True); import time; time.sleep(60)", "took too long"),
    ],
)
def test_the_end_of_a_process_is_told(text, words, monkeypatch):
    monkeypatch.setattr(spawn, "LEAST_PATIENCE_S", 0.1)
    with pytest.raises(ChildDied, match=words):
        list(spawn.spawn(job(), {None: 10.0}, program(text)))


def test_messages_of_a_process_that_ends_well():
    text = "import sys; print('{\"got\": ' + sys.argv[1] + '}')"
    (message,) = spawn.spawn(job(), {}, program(text))
    assert Job.load(json.dumps(message["got"])) == job()


@pytest.mark.parametrize("name", floors.SHAPES)
def test_streamed_bytes_are_those_of_the_matrices(name, tmp_path):
    shape = floors.SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(shape.config(64)))
    config, _ = read_config(tmp_path)
    matrices = [spec.shape for spec in weight_table(config) if len(spec.shape) == 2]
    embedding = 0 if shape.tied else shape.vocab * shape.hidden
    assert shape.streamed_params == sum(rows * columns for rows, columns in matrices) - embedding


def test_known_floors():
    """performance.md's: 15.01 GB of weights, 128 KiB a token, 8k prompt at 788 TFLOP/s in 167.4 ms."""
    shape = floors.SHAPES["8B"]
    assert shape.streamed_params * 2 == pytest.approx(15.01e9, rel=1e-3)
    assert shape.kv_bytes_per_token == 128 * 1024
    assert floors.prefill_flops(shape, 8192) / 788e12 == pytest.approx(0.1674, rel=1e-3)


@pytest.mark.parametrize("module", ["runtime.grammars", "engine.structured"])
def test_what_needs_grammars_can_be_imported_without_them(module, monkeypatch):
    for name in ("llguidance", "llguidance.numpy"):
        monkeypatch.setitem(sys.modules, name, child.StandIn(name))
    spec = importlib.util.find_spec(module)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.LLMatcher is child.Nothing


def test_clocks_are_those_of_a_gpu_at_work(monkeypatch):
    lines = [
        "90, 1900, 3201, 600, 50",
        "0, 345, 3201, 80, 30",
        "90, [N/A], 1, 1, 1",
        "80, 1980, 3201, 640.5, 51",
    ]
    monkeypatch.setattr(clocks, "COMMAND", program(f"print({chr(10).join(lines)!r})"))
    readings = clocks.Clocks()
    readings._process.wait()
    readings.close()
    assert readings.take() == "1940 MHz SM, 3201 MHz memory, 620 W, 50 °C"
    assert readings.take() == ""


class FakeGpu:
    """Of torch.cuda what timing needs. A replay counts the calls that were made during the capture; the time
    of an event is the number of calls before it, in ms."""

    L2_cache_size = 1000

    def __init__(self, monkeypatch):
        self.num_calls, self._captured = 0, 0
        for name in ("Stream", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: self)
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, self._recorded)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self)

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def _recorded(self, graph, stream=None):
        before = self.num_calls
        yield
        self._captured = self.num_calls - before

    def replay(self):
        self.num_calls += self._captured

    def call(self):
        self.num_calls += 1


class FakeEvent:
    def __init__(self, gpu):
        self._gpu, self._at = gpu, 0

    def record(self):
        self._at = self._gpu.num_calls

    def elapsed_time(self, end):
        return end._at - self._at


@pytest.mark.parametrize("time", [timing.time_device, timing.time_launched])
@pytest.mark.parametrize("num_calls", [1, 5, 40])
def test_device_time_is_that_of_one_call(monkeypatch, time, num_calls):
    fake = FakeGpu(monkeypatch)
    here = Bench(section="kernels", device=torch.device("cuda"), rehearsal=False)
    measured = time(here, [fake.call] * num_calls, rounds=3)
    assert (measured.seconds, measured.spread, measured.rounds) == (pytest.approx(1e-3), 0.0, 3)


def test_sets_of_inputs_exceed_the_cache(monkeypatch):
    FakeGpu(monkeypatch)
    here = Bench(section="kernels", device=torch.device("cuda"), rehearsal=False)
    assert [timing.num_sets(here, size) for size in (1, 1000, 1500, 4000, 9000)] == [64, 4, 3, 1, 1]


def test_a_floor_is_the_longest_of_its_needs():
    here = Bench(section="", device=torch.device("cpu"), rehearsal=False, ceilings={READ: 2.0, MATRIX: 1.0})
    assert here.floor_s(read=4e9, flops=1e12) == 2.0
    assert here.floor_s(read=4e9, copied=1) is None


def test_overlapping_kernels_count_once():
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_rows_are_named_once_and_by_worth():
    names = [row.name for row in catalogue()]
    assert len(names) == len(set(names))
    sections = [row.section for row in catalogue()]
    assert list(dict.fromkeys(sections)) == list(SECTIONS)


def test_rows_and_goals_can_be_listed_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--list"])
    assert gpu.main() == 0
    table = capsys.readouterr().out
    assert all(f"| {row.name} | unmeasured: no GPU was at hand |" in table for row in catalogue())


def test_without_a_gpu_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in said.err
