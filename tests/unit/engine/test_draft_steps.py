"""A draft's passes started one behind the other: the drafts, the KV and the tokens of passes one by one."""

import random
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.request import Request, RequestState, SamplingParams
from engine.speculative.draft_passes import EagerPasses
from engine.speculative.draft_steps import DraftSteps
from engine.speculative.factory import draft_steps
from engine.step.host_copies import HostCopies
from engine.step.inputs import StepInputs
from kernels.triton_launch import INTERPRETED
from tests.fakes import gpu_runtime
from tests.fakes.gpu_runtime import Event
from tests.unit.engine.conftest import CheckedEngine
from tests.unit.engine.step_tapes import Tape, operators_of_a_gpu

FINISHED = RequestState.FINISHED
PROMPT = list(range(3, 60)) * 2
MAX_DRAFT = 4
SIZE = {
    "num_blocks": 40, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 24,
    "speculative": "draft", "num_draft_tokens": MAX_DRAFT, "scheduling_policy": "priority",
    "swap_space_bytes": 1 << 20,
}  # fmt: skip
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.4},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9},
    {"temperature": 0.3, "min_p": 0.05, "presence_penalty": 0.6, "ignore_eos": False},
    {"temperature": 0.3, "logprobs": 1, "stop_token_ids": tuple(range(3, 20))},
    {"temperature": 0.5, "typical_p": 0.7},
)
"""Drafts beside one of the last kind are drawn pass by pass."""


class ScriptedLengths:
    """Other lengths for each request, and now and then none for so long that the draft has to catch up."""

    def choose(self, plan):
        return [self._length(item.request) for item in plan]

    def _length(self, request):
        return random.Random(f"{request.key} {request.num_tokens // 5}").choice(
            [0, 1, 2, MAX_DRAFT, MAX_DRAFT]
        )

    def observe(self, request, num_draft_tokens, num_accepted):
        pass


class Recorded:
    """A proposer whose drafts are kept."""

    def __init__(self, proposer):
        self._proposer = proposer
        self.drafts = []

    def __getattr__(self, name):
        return getattr(self._proposer, name)

    def propose(self, plan):
        drafts = self._proposer.propose(plan)
        self.drafts += [
            (draft.token_ids, None if draft.logits is None else draft.logits.numpy().tobytes())
            for draft in drafts
        ]
        return drafts


def scripted(model, **config):
    engine = Engine(EngineConfig(draft_model=model.draft.path, **SIZE, **config), model)
    for group in engine.kv_cache.groups:
        group.fill_(torch.nan)
    speculation = engine._runner.speculation
    speculation._lengths = ScriptedLengths()
    speculation._proposer = Recorded(speculation._proposer)
    return engine


def build(key, prompt_len, max_tokens, kind, priority):
    params = {"max_tokens": max_tokens, "seed": prompt_len, "ignore_eos": True, **KINDS[kind]}
    return Request(
        key=key, prompt_token_ids=PROMPT[:prompt_len], sampling=SamplingParams(**params), priority=priority
    )


def machine_of(model, **config):
    class Twins(RuleBasedStateMachine):
        """Two engines that see the same: one with steps, one that waits for every pass."""

        def __init__(self):
            super().__init__()
            self.engines = [scripted(model, overlap=overlap, **config) for overlap in ("on", "off")]
            self.num_keys = 0
            self.live = {}

        @rule(
            prompt_len=st.integers(1, 30), max_tokens=st.integers(1, 24),
            kind=st.sampled_from([*range(5)] * 4 + [5]), priority=st.integers(0, 1),
        )  # fmt: skip
        def submit(self, prompt_len, max_tokens, kind, priority):
            self.num_keys += 1
            for engine in self.engines:
                request = self.live[self.num_keys] = build(
                    self.num_keys, prompt_len, max_tokens, kind, priority
                )
                engine.submit(request)

        @rule(prompt_len=st.integers(20, 60))
        def reserve_over_others(self, prompt_len):
            """Displaces running requests and goes away."""
            for engine in self.engines:
                if engine.reserve(build("reserved", prompt_len, 3, 0, 2)):
                    engine.abort("reserved")

        @rule(which=st.integers(0, 5))
        def abort(self, which):
            aborted = [engine.abort(max(self.num_keys - which, 0)) for engine in self.engines]
            assert aborted[0] == aborted[1]

        @rule(num_steps=st.integers(1, 6))
        def step(self, num_steps):
            for _ in range(num_steps):
                if self.engines[0].has_work():
                    one, other = (told(engine.step()) for engine in self.engines)
                    assert one == other
                self.check()
            self.live = {key: each for key, each in self.live.items() if each.state is not FINISHED}

        def check(self):
            one, other = self.engines
            for engine in self.engines:
                engine.check()
            one._runner.speculation._proposer._passes._graphs.check()
            assert one.has_work() == other.has_work()
            assert drafts_of(one) == drafts_of(other)
            assert one.speculation_stats.accepted_by_position == other.speculation_stats.accepted_by_position
            for ours, theirs in zip(one.kv_cache.groups, other.kv_cache.groups, strict=True):
                assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))

        def teardown(self):
            while self.engines[0].has_work():
                self.step(1)

    return Twins


def drafts_of(engine):
    return engine._runner.speculation._proposer.drafts


def told(result):
    return [
        (output.request.key, output.token_ids, output.finish_reason, output.logprobs)
        for output in result.outputs
    ]


@pytest.mark.parametrize("law", ["coupled", "rejection"])
def test_any_mix_has_the_drafts_and_the_kv_of_passes_one_by_one(drafted_model, law):
    run_state_machine_as_test(
        machine_of(drafted_model, draft_acceptance=law),
        settings=settings(max_examples=10, stateful_step_count=25, deadline=None, phases=(Phase.generate,)),
    )


@pytest.mark.parametrize("law", ["coupled", "rejection"])
@pytest.mark.parametrize("seed", range(2))
def test_a_busy_engine_has_the_drafts_and_the_kv_of_passes_one_by_one(drafted_model, seed, law):
    """The same operations, such that the batch is full while requests come, go and are displaced."""
    rng, machine = random.Random(seed), machine_of(drafted_model, draft_acceptance=law)()
    for _ in range(40):
        if len(machine.live) < 6:
            kind = rng.choice([*range(5)] * 6 + [5])
            machine.submit(rng.randint(1, 20), rng.randint(1, 24), kind, rng.randint(0, 1))
        machine.step(rng.randint(1, 3))
        if rng.random() < 0.2:
            machine.abort(rng.randint(0, 5))
        if rng.random() < 0.1:
            machine.reserve_over_others(rng.randint(20, 60))
    machine.teardown()
    drafts = drafts_of(machine.engines[0])
    assert {len(token_ids) for token_ids, _ in drafts} >= {0, 1, 2, MAX_DRAFT}
    assert any(logits for _, logits in drafts) == (law == "rejection")


@pytest.fixture
def no_eager_draws(monkeypatch):
    monkeypatch.setattr(EagerPasses, "draw", mock.Mock(side_effect=AssertionError("not by steps")))


DRAFTED = {"speculative": "draft", "num_draft_tokens": MAX_DRAFT, "overlap": "on", "num_blocks": 128}


def requests(make_request):
    return [make_request(n, max_tokens=24, temperature=n % 3 / 4) for n in (1, 9, 17, 30)]


@pytest.mark.parametrize("law", ["coupled", "rejection"])
@pytest.mark.usefixtures("no_eager_draws")
def test_every_draft_of_usual_requests_is_drawn_by_steps(make_engine, make_request, law):
    """Those that lag behind are brought near first."""
    engine = make_engine(**DRAFTED, draft_acceptance=law)
    engine._runner.speculation._lengths = ScriptedLengths()
    engine.run(*requests(make_request))
    assert engine.speculation_stats.accepted_tokens > 10


def test_what_steps_do_not_take_is_drawn_pass_by_pass(make_engine, make_request):
    plain = make_engine(num_blocks=128).run(*requests(make_request))
    few = make_engine(**DRAFTED, cuda_graph_sizes=(2,))
    with mock.patch.object(EagerPasses, "draw", autospec=True, side_effect=EagerPasses.draw) as eager:
        assert few.run(*requests(make_request)) == plain
    assert {len(call.args[1]) for call in eager.mock_calls} == {3, 4}


class LoggedTape(Tape):
    """Says when what it holds is started."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def record(self, run):
        replay = super().record(run)

        def logged():
            self.log.append("start")
            with _disable_current_modes():
                return replay()

        return logged


class NoReads(TorchDispatchMode):
    """The host reads no number of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() != "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


class Journal:
    """What a draft model does, in order, and that it reads nothing while its passes are on their way."""

    def __init__(self, steps, monkeypatch):
        self.events, self.num_passes, self.widths = [], [], set()
        self._draw, self._fill, self._copy = steps.draw, StepInputs.fill, HostCopies.start
        monkeypatch.setattr(StepInputs, "fill", lambda *arguments: self.fill(*arguments))
        monkeypatch.setattr(HostCopies, "start", lambda copies: self.copy(copies))

    def fill(self, inputs, shape, *arguments):
        self.widths.add(shape.width)
        self._fill(inputs, shape, *arguments)

    def copy(self, copies):
        arrived = self._copy(copies)
        return lambda: self.events.append("wait") or arrived()

    def draw(self, drafting):
        self.events.clear()
        with NoReads():
            self._draw(drafting)
        num_passes = max(len(each.token_ids) for each in drafting)
        assert self.events == ["start"] * num_passes + ["wait"]
        self.num_passes.append(num_passes)


def test_passes_are_replayed_one_behind_the_other_and_waited_for_once(make_engine, make_request, monkeypatch):
    """With the operators of a GPU on a tape: nothing hangs on a number that was read on the host."""

    def drafts(engine):
        speculation = engine._runner.speculation
        speculation._proposer = Recorded(speculation._proposer)
        tokens = engine.run(*(make_request(n, max_tokens=n, temperature=n - 5) for n in (5, 7)))
        return tokens, drafts_of(engine)

    config = {**DRAFTED, "num_draft_tokens": 2, "overlap": "off", "cuda_graph_sizes": (2,)}
    taped = make_engine(**config)
    proposer = taped._runner.speculation._proposer
    tape = LoggedTape([])
    with operators_of_a_gpu():
        steps = draft_steps(taped.config, 96, proposer._forward, proposer._passes, tape)
    proposer._passes = journal = Journal(steps, monkeypatch)
    journal.events = tape.log
    assert drafts(taped) == drafts(make_engine(**config))
    assert journal.widths == {1, 2}
    assert max(journal.num_passes) == 2


@pytest.mark.skipif(not INTERPRETED, reason="there is a real GPU")
def test_on_a_gpu_a_draft_is_waited_for_once(draft_checkpoint, make_request, monkeypatch):
    """Graphs of the target and the draft on the GPU of `tests.fakes.gpu`, which knows of every wait and of
    host memory that is written before it was read."""
    config = {
        "num_blocks": 40, "block_size": 4, "max_num_seqs": 2, "cuda_graph_sizes": (2,),
        "speculative": "draft", "draft_model": draft_checkpoint, "num_draft_tokens": 3,
    }  # fmt: skip

    def run(device):
        settings = EngineConfig(device=device, **config)
        engine = CheckedEngine(settings, load_model(draft_checkpoint, settings))
        return engine.run(*(make_request(n, max_tokens=8, temperature=1.5, top_k=9) for n in (5, 7)))

    expected, waits, draw = run("cpu"), [], DraftSteps.draw
    with gpu_runtime.gpu() as device:

        def judged_draw(steps, drafting):
            device.waits.clear()
            waits.append(0)
            draw(steps, drafting)
            assert not device.waits

        def counted_wait(event):
            waits[-1] += 1
            wait(event)

        wait = Event.synchronize
        monkeypatch.setattr(DraftSteps, "draw", judged_draw)
        monkeypatch.setattr(Event, "synchronize", counted_wait)
        assert run("cuda:0") == expected
    assert waits in ([1, 1], [1, 1, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("law", ["coupled", "rejection"])
def test_graphs_on_a_gpu_have_the_tokens_of_passes_one_by_one(
    checkpoint, draft_checkpoint, make_request, gpu, law
):
    def outcome(**settings):
        config = EngineConfig(
            device=gpu, num_blocks=64, max_num_seqs=8, speculative="draft", draft_model=draft_checkpoint,
            num_draft_tokens=4, draft_acceptance=law, **settings,
        )  # fmt: skip
        engine = CheckedEngine(config, load_model(checkpoint, config))
        tokens = engine.run(*requests(make_request))
        assert engine.speculation_stats.accepted_tokens > 0
        return tokens

    plain = outcome(overlap="off", cuda_graphs="off")
    assert outcome(cuda_graphs="off") == plain
    assert outcome() == plain
