"""The step of a model that has a draft model, of which random weights accept nothing: what a draft costs.

Captured passes that are started one behind the other stand beside passes that run kernel by kernel, each
waited for before the next one; the target's steps are captured in both arms.
"""

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from benchmarks.gpu_rows import floors
from benchmarks.gpu_rows.bench import Bench, RowFunctions, scaled
from benchmarks.gpu_rows.catalogue import DRAFTED_BATCHES, DRAFTS
from benchmarks.gpu_rows.decoding import WARM_UPS, context_len, decoding, time_steps
from benchmarks.gpu_rows.models import RandomModel, random_model
from benchmarks.gpu_rows.row import Measured
from benchmarks.gpu_rows.serving import ROOM, engine_config, make_engine
from benchmarks.gpu_rows.timing import Timing
from engine.config import EngineConfig

NUM_DRAFT_TOKENS = 4


def rows(bench: Bench, target: RandomModel) -> RowFunctions:
    """See catalogue.drafts."""
    section = bench.section
    if section not in DRAFTS:
        return {}
    steps = DraftedSteps(bench, target)
    return {
        f"decode step with drafts, {section} and {DRAFTS[section]}, batch {batch}": partial(steps.row, batch)
        for batch in DRAFTED_BATCHES
    }


class DraftedSteps:
    """A target and its draft, both with random weights; an engine for each arm of a row."""

    def __init__(self, bench: Bench, target: RandomModel) -> None:
        self._bench = bench
        self._target = target

    def row(self, batch: int) -> Measured:
        """A step with NUM_DRAFT_TOKENS draft tokens for each request, none of them accepted."""
        batch = self._bench.pick(batch, min(batch, 2))
        one_by_one, draft_s = self._time(batch, overlap="off")
        timing, started_s = self._time(batch, overlap="on")
        details = timing.details | {
            "draft tokens": NUM_DRAFT_TOKENS, "draft ms": round(started_s * 1e3, 4),
            "draft ms, one by one": round(draft_s * 1e3, 4), "floor ms": scaled(self._floor_s(batch), 1e3),
        }  # fmt: skip
        return Measured(value=timing.seconds * 1e3, floor=one_by_one.seconds * 1e3, details=details)

    def _time(self, batch: int, **switches: str) -> tuple[Timing, float]:
        """Of the whole step, and the mean seconds of its draft."""
        engine = make_engine(self._model, replace(self._config(batch), **switches))
        num_steps = self._bench.pick(60, 3)
        with decoding(self._bench, engine, batch):
            before = engine.speculation_stats.draft_s
            timing = time_steps(engine, num_steps)
            return timing, (engine.speculation_stats.draft_s - before) / num_steps

    def _floor_s(self, batch: int) -> float | None:
        """Each model's weights and contexts once a pass."""
        context = context_len(self._bench) + WARM_UPS
        target, draft = (self._bench.shape(name) for name in (self._bench.section, self._draft_name))
        read = floors.decode_bytes(target, batch, context)
        return self._bench.floor_s(read=read + NUM_DRAFT_TOKENS * floors.decode_bytes(draft, batch, context))

    @property
    def _draft_name(self) -> str:
        return DRAFTS[self._bench.section]

    @property
    def _max_model_len(self) -> int:
        return self._target.loaded.facts.max_model_len

    @cached_property
    def _model(self) -> RandomModel:
        target = self._target.loaded
        draft = random_model(self._bench, self._bench.shape(self._draft_name), self._max_model_len).loaded
        groups = (*target.facts.kv_groups, replace(draft.facts.kv_groups[0], name="draft"))
        return replace(
            self._target, loaded=replace(target, draft=draft, facts=replace(target.facts, kv_groups=groups))
        )

    def _config(self, batch: int) -> EngineConfig:
        config = engine_config(
            self._bench, max_model_len=self._max_model_len, batches=(batch,),
            tokens=batch * (context_len(self._bench) + ROOM),
        )  # fmt: skip
        return replace(
            config, speculative="draft", draft_model=Path("random"), num_draft_tokens=NUM_DRAFT_TOKENS
        )
