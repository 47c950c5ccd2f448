"""What the engine thread tells the role of blocks reaches the loop when it is written, and in order."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine.engine import StepResult
from engine.layer_watch import LayerWatch
from engine.plan import Scheduled
from engine.request import Request, SamplingParams
from prefill_svc import role as module
from prefill_svc.export import Export
from prefill_svc.role import PrefillRole
from prefill_svc.written import Written
from runtime.settings import WorkerSettings
from worker.attach import AttemptKey

KEY = AttemptKey(0, 1, 1)
NUM_TOKENS = 40


class HeldFence:
    """A GPU that is not done before the test says so."""

    def __init__(self) -> None:
        self._waiting: list[Any] = []

    def then(self, call: Any) -> None:
        self._waiting.append(call)

    def pass_one(self) -> None:
        self._waiting.pop(0)()


class Anything:
    """Takes any call; the loop's are made at once."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None

    def on_loop(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


@pytest.fixture
def fence(monkeypatch: pytest.MonkeyPatch) -> HeldFence:
    held = HeldFence()
    monkeypatch.setattr(module, "fence_for", lambda device: held)
    monkeypatch.setattr(module, "PrefillLinks", lambda parts, owner: Anything())
    return held


@pytest.fixture
def watch() -> LayerWatch:
    return LayerWatch(16)


@pytest.fixture
def role(fence: HeldFence, watch: LayerWatch) -> PrefillRole:
    engine = SimpleNamespace(config=SimpleNamespace(device="cuda:0"), model=SimpleNamespace(watch=watch))
    parts: Any = SimpleNamespace(
        bridge=Anything(),
        metrics=Anything(),
        facts=SimpleNamespace(block_size=16),
        engine=engine,
        settings=WorkerSettings(),
    )
    made = PrefillRole(parts)
    made._exports[KEY] = Export(key=KEY, transfer_id=bytes(16), num_tokens=NUM_TOKENS, block_size=16)
    return made


def test_layers_and_steps_wait_for_the_gpu_in_order(
    role: PrefillRole, fence: HeldFence, watch: LayerWatch
) -> None:
    request = Request(
        key=KEY, prompt_token_ids=[3] * NUM_TOKENS, sampling=SamplingParams(max_tokens=1), prefill_only=True
    )
    request.block_tables = [[5, 6, 7]]
    chunk = Scheduled(request, 33)
    with watch.watching([chunk]):
        watch.passed(2)
        watch.passed(4)
    request.num_computed_tokens = 33
    engine: Any = None
    role.on_step(engine, StepResult(batch=[chunk], computed=[request]))

    export, seen = role._exports[KEY], []
    for _ in range(3):
        seen.append(export.written)
        fence.pass_one()
    assert seen == [Written(0), Written(0, 2, 2), Written(0, 2, 4)]
    assert export.written == Written(2)
    assert export.block_tables == ((5, 6, 7),)
