"""Steps over fixed buffers on several ranks: recorded, overlapped, told once."""

import threading
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.parallel import follower, leader, led_steps
from engine.parallel.errors import RankLost
from engine.parallel.follower import Follower
from engine.parallel.groups import GlooGroup, open_group
from engine.parallel.leader import Leader
from engine.parallel.led_steps import FollowedSteps
from engine.parallel.start import starting
from engine.parallel.wire import Channel, Op
from engine.step import factory, graphs
from engine.step.buffers import StagedBuffers
from engine.step.inputs import StepInputs
from engine.step.shapes import StepShape
from runtime.errors import StartupError
from tests.unit.engine.overlap_mixes import SIZE, Alone, machine_of, run_busily
from tests.unit.engine.parallel_ranks import parallel_model, run
from tests.unit.engine.step_tapes import Reruns, Tape, TapedGroup, operators_of_a_gpu

OVERLAPPED = EngineConfig(num_blocks=64, block_size=4, max_num_seqs=8, overlap="on")
IN_ORDER = replace(OVERLAPPED, overlap="off")
NUM_LAYERS = 2


@pytest.fixture
def requests(make_request):
    """Greedy and seeded, one that no step draws on the device; a fresh list each time."""

    def make():
        return [
            make_request(5, temperature=0.0),
            make_request(17),
            make_request(9, temperature=1.4, top_k=7, min_p=0.02),
            make_request(30, temperature=0.0, logprobs=2, max_tokens=3),
        ]

    return make


def outputs(config, model, requests):
    return run(Engine(config, model), requests)


@pytest.fixture
def recorded(monkeypatch):
    """Every rank records its steps, as on GPUs: those ranks' recorders."""
    made = []

    def recorder(device):
        made.append(Reruns())
        return made[-1]

    monkeypatch.setattr(factory, "captures", lambda config: config.cuda_graphs == "auto")
    monkeypatch.setattr(graphs, "CudaGraphs", recorder)
    return made


@pytest.mark.parametrize("size", [2, 4])
def test_overlap_changes_no_token(checkpoint, tiny_model, requests, tmp_path, size):
    expected = outputs(IN_ORDER, tiny_model, requests())
    for config in (IN_ORDER, OVERLAPPED):
        with parallel_model(checkpoint, config, size, tmp_path / config.overlap) as model:
            assert outputs(config, model, requests()) == expected


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (4, 2)])
def test_any_mix_gives_the_tokens_of_steps_in_order(checkpoint, tmp_path, size, seed):
    """With stops, aborts, several choices and displaced requests."""
    config = EngineConfig(**SIZE)
    with (
        parallel_model(checkpoint, config, size, tmp_path / "alone") as alone,
        parallel_model(checkpoint, config, size, tmp_path / "ranks") as model,
    ):
        run_busily(machine_of(model, Alone(alone))(), seed, num_rounds=12)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_recorded_steps_give_the_same_tokens(checkpoint, tiny_model, requests, tmp_path, recorded, overlap):
    config = replace(OVERLAPPED, overlap=overlap)
    expected = outputs(replace(config, cuda_graphs="off"), tiny_model, requests())
    with parallel_model(checkpoint, config, 2, tmp_path / "ranks") as model:
        assert outputs(config, model, requests()) == expected
    leading, following = recorded
    assert leading.num_replays == following.num_replays > 8


def test_steps_on_tapes_give_the_same_tokens(checkpoint, tiny_model, make_request, tmp_path, monkeypatch):
    """A tape holds kernels, collective operations and tensors, nothing of Python's, of every rank."""

    def requests():
        return [make_request(5, max_tokens=4, temperature=0.0), make_request(9, max_tokens=4)]

    tapes = []

    def recorder(device, *, captured):
        tapes.append(Tape())
        return tapes[-1]

    expected = outputs(IN_ORDER, tiny_model, requests())
    config = replace(OVERLAPPED, cuda_graph_sizes=(2,))
    for module in (leader, follower):
        monkeypatch.setattr(module, "open_group", lambda *args: TapedGroup(open_group(*args)))
    for module in (factory, led_steps):
        monkeypatch.setattr(module, "recorder_for", recorder)
    with parallel_model(checkpoint, config, 2, tmp_path / "ranks") as model:
        with operators_of_a_gpu():
            engine = Engine(config, model)
        assert run(engine, requests()) == expected
    for tape in tapes:
        counts = Counter(tape.names)
        assert counts["all_reduce"] == 2 * NUM_LAYERS + 1
        assert counts["gather"] == counts["broadcast"] == 1
        assert counts["decode_kernel"] == NUM_LAYERS
    assert [("draw_kernel" in tape.names) for tape in tapes] == [True, False]


@pytest.mark.parametrize("speculative", ["ngram", "draft"])
def test_steps_with_draft_tokens_are_recorded(
    checkpoint, draft_checkpoint, tiny_model, requests, tmp_path, recorded, speculative
):
    expected = outputs(IN_ORDER, tiny_model, requests())
    config = replace(
        IN_ORDER,
        speculative=speculative,
        num_draft_tokens=3,
        draft_model=draft_checkpoint if speculative == "draft" else None,
    )
    shapes = []
    with parallel_model(checkpoint, config, 2, tmp_path / "ranks") as model:
        tell = model.ranks.tell

        def listened(op, *arrays, payload=None):
            if op is Op.STEP:
                shapes.append(StepShape(*arrays[0]))
            tell(op, *arrays, payload=payload)

        model.ranks.tell = listened
        assert outputs(config, model, requests()) == expected
    assert any(shape.width > 1 for shape in shapes)
    assert [each.num_replays for each in recorded[-2:]] == [len(shapes)] * 2


def test_a_step_reads_the_same_bytes_on_every_rank(checkpoint, requests, tmp_path, monkeypatch, recorded):
    """What the host sends to the device is compared, in order, the padding of the recording included; and the
    block tables at the end, of which more change at a time than a step has room for."""
    monkeypatch.setitem(StepInputs.__init__.__kwdefaults__, "max_changes", 3)
    sent, inputs, told = defaultdict(list), [], []
    send, make_views, tell = StagedBuffers.send, StepInputs.views, Leader.tell

    def sending(self):
        twin = send(self)
        sent[self].append(bytes(twin.numpy()))
        return twin

    def viewing(self, shape):
        if self not in inputs:
            inputs.append(self)
        return make_views(self, shape)

    def telling(self, op, *arrays, payload=None):
        told.append(op)
        tell(self, op, *arrays, payload=payload)

    monkeypatch.setattr(StagedBuffers, "send", sending)
    monkeypatch.setattr(StepInputs, "views", viewing)
    monkeypatch.setattr(Leader, "tell", telling)
    with parallel_model(checkpoint, OVERLAPPED, 4, tmp_path / "ranks") as model:
        outputs(OVERLAPPED, model, requests())
    assert {Op.STEP, Op.CHANGE_TABLES} <= set(told)
    one, *others = sent.values()
    assert len(others) == 3
    assert all(other == one for other in others)
    tables = [each._block_tables for each in inputs]
    assert len(tables) == 4
    assert tables[0].any()
    assert all(torch.equal(other, tables[0]) for other in tables)


def test_commands_are_carried_out_in_the_order_they_were_given(checkpoint, requests, tmp_path, monkeypatch):
    told, received = [], []
    tell, receive = Leader.tell, Channel.receive

    def telling(self, op, *arrays, payload=None):
        told.append(op)
        tell(self, op, *arrays, payload=payload)

    def receiving(self):
        message = receive(self)
        received.append(message and message.op)
        return message

    monkeypatch.setattr(Leader, "tell", telling)
    monkeypatch.setattr(Channel, "receive", receiving)
    with parallel_model(checkpoint, OVERLAPPED, 2, tmp_path / "ranks") as model:
        outputs(OVERLAPPED, model, requests())
    assert [op for op in received if op not in (Op.START, Op.READY, None)] == told
    assert {Op.ALLOCATE, Op.RECORD_STEPS, Op.FORWARD, Op.LOGITS, Op.STEP} == set(told)
    assert told.index(Op.ALLOCATE) < told.index(Op.RECORD_STEPS) < told.index(Op.FORWARD)


@pytest.mark.skipif(not __debug__, reason="our asserts are off")
def test_a_follower_refuses_what_comes_too_early():
    rank = Follower(None, None)
    with pytest.raises(AssertionError, match="RECORD_STEPS comes first"):
        _ = rank.steps
    rank._steps = object()
    with pytest.raises(AssertionError, match="the pool that stays"):
        rank._allocate(None)


@pytest.mark.parametrize(("overlap", "num_broadcasts"), [("on", 1), ("off", 0)])
def test_what_a_step_costs_in_operations_and_messages(
    checkpoint, make_request, tmp_path, monkeypatch, recorded, overlap, num_broadcasts
):
    """Two sums a layer and one for the embedding, one gather of logits, one broadcast if tokens stay on the
    device; one message to each follower."""
    size, counts, messages = 4, Counter(), Counter()
    for name in ("all_reduce", "gather", "broadcast"):
        run = getattr(GlooGroup, name)

        def counted(group, x, name=name, run=run):
            counts[group._shard.rank, name] += 1
            return run(group, x)

        monkeypatch.setattr(GlooGroup, name, counted)
    config = replace(OVERLAPPED, overlap=overlap)
    with parallel_model(checkpoint, config, size, tmp_path / "ranks") as model:
        engine = Engine(config, model)
        for request in (make_request(9, max_tokens=30), make_request(10, max_tokens=30)):
            engine.submit(request)
        for _ in range(4):
            engine.step()
        for member in model.ranks.members:

            def counted_send(*pieces, send=member.commands.send, rank=member.rank):
                messages[rank] += 1
                send(*pieces)

            member.commands.send = counted_send
        before, num_steps = Counter(counts), 6
        for _ in range(num_steps):
            engine.step()
        during = counts - before
    expected = {"all_reduce": 2 * NUM_LAYERS + 1, "gather": 1, "broadcast": num_broadcasts}
    assert {name: during[0, name] for name in expected} == {
        name: each * num_steps for name, each in expected.items()
    }
    assert messages == dict.fromkeys(range(1, size), num_steps)
    for rank in range(1, size):
        assert all(counts[rank, name] == counts[0, name] for name in expected)


class OneRankGroup:
    """Of which nobody is missing until it is aborted, as by NCCL's watcher, in the middle of a step."""

    def __init__(self):
        self.aborts_next = self.is_aborted = False

    def all_reduce(self, x):
        return x

    def gather(self, x):
        self.is_aborted = self.aborts_next
        return x.unsqueeze(0)

    def broadcast(self, x):
        pass

    def replaying(self):
        return nullcontext()

    def check(self):
        if self.is_aborted:
            raise RankLost("aborted")

    def close(self):
        self.is_aborted = True


@pytest.mark.parametrize("config", [IN_ORDER, OVERLAPPED])
def test_what_is_read_behind_an_abort_is_not_committed(
    checkpoint, make_request, tmp_path, monkeypatch, config
):
    group = OneRankGroup()
    monkeypatch.setattr(leader, "open_group", lambda *args: group)
    ranks = Leader([], tmp_path / "ranks" / "store", torch.device("cpu"))
    engine = Engine(config, load_model(checkpoint, config, ranks=ranks))
    request = make_request(9)
    engine.submit(request)
    for _ in range(3):
        engine.step()
    group.aborts_next, known = True, list(request.output_token_ids)
    with pytest.raises(RankLost, match="aborted"):
        engine.step()
    assert request.output_token_ids == known


def lose_patience(model):
    """Rank 0 waits for others, who will not come, no longer than 0.2 s."""
    model.ranks._group._timeout = timedelta(seconds=0.2)


def flying(model, make_request):
    """An engine with a step on its way behind each that it returns from."""
    engine = Engine(OVERLAPPED, model)
    engine.submit(make_request(9, max_tokens=80))
    while not engine._pipeline.in_flight:
        engine.step()
    return engine


def test_a_rank_that_ends_between_two_overlapped_steps_ends_the_engine(checkpoint, make_request, tmp_path):
    with parallel_model(checkpoint, OVERLAPPED, 2, tmp_path / "ranks") as model:
        engine = flying(model, make_request)
        model.ranks.members[0].commands.close()
        with pytest.raises(RankLost, match="rank 1 does not listen"):
            engine.step()


@pytest.mark.parametrize("where", ["before a step", "within a step"])
def test_a_rank_that_hangs_is_found_by_the_deadline(checkpoint, make_request, tmp_path, monkeypatch, where):
    lost, go_on = [], threading.Event()
    with parallel_model(checkpoint, OVERLAPPED, 2, tmp_path / "ranks") as model:
        engine = flying(model, make_request)
        model.ranks.watch(lost.append)
        target, name = (FollowedSteps, "run") if where == "before a step" else (GlooGroup, "gather")
        run = getattr(target, name)

        def hanging(self, *args):
            if target is FollowedSteps or self._shard.rank == 1:
                go_on.wait()
            return run(self, *args)

        monkeypatch.setattr(target, name, hanging)
        lose_patience(model)
        with pytest.raises(RankLost):
            engine.step()
        with pytest.raises(RankLost):
            engine.step()
        go_on.set()
    assert len(lost) == 1


def test_a_rank_that_is_lost_while_steps_are_recorded_is_an_error_of_one_line(
    checkpoint, tmp_path, monkeypatch, recorded
):
    monkeypatch.setattr(Reruns, "record", refusing(Reruns.record))
    with parallel_model(checkpoint, OVERLAPPED, 2, tmp_path / "ranks") as model:
        lose_patience(model)
        with pytest.raises(StartupError, match="--tensor-parallel-size 2: "), starting(model.ranks):
            Engine(OVERLAPPED, model)


@pytest.mark.parametrize("op", [Op.ALLOCATE, Op.RECORD_STEPS])
def test_a_rank_that_ends_before_it_serves_is_an_error_of_one_line(checkpoint, tmp_path, monkeypatch, op):
    """As one does whose GPU has no memory for the pool."""
    with parallel_model(checkpoint, OVERLAPPED, 2, tmp_path / "ranks") as model:
        tell = model.ranks.tell

        def telling(told, *arrays, **payload):
            if told is op:
                model.ranks.members[0].commands.shut()
            tell(told, *arrays, **payload)

        monkeypatch.setattr(model.ranks, "tell", telling)
        with pytest.raises(StartupError, match="size 2: rank 1 does not listen"), starting(model.ranks):
            Engine(OVERLAPPED, model)


def refusing(record):
    """Rank 0's recordings go on, those of others end their rank."""
    leading = threading.current_thread()

    def recorded_or_not(self, run):
        if threading.current_thread() is not leading:
            raise RankLost("this rank")
        return record(self, run)

    return recorded_or_not
