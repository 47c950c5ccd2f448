"""Runs the beam searches of an engine: the forks of a leader are its beams and advance together.

A step samples for every beam of a search, whose policy then says which beams go on; they take over their
parents' blocks by reference. If a beam has lost its blocks meanwhile, the search starts over: all of it is
deterministic. `Engine` admits a search only if its beams fit into the pool alone, so it ends some time.
"""

from engine.beam_search import Beam, BeamSearch
from engine.block_tables import BlockTables
from engine.choices import fan_out, select_blocks
from engine.facts import ModelFacts
from engine.outputs import StepOutput
from engine.request import FinishReason, Request, SamplingParams, TokenLogprob
from engine.sampler import Sample
from engine.scheduler import Scheduler
from runtime.errors import InvalidRequest


def prepare(request: Request, facts: ModelFacts) -> None:
    """Give a request that asks for beams its search and its forks; nothing happens the second time."""
    params = request.sampling
    if params.beams is None or request.search is not None:
        return
    eos_token_ids = () if params.ignore_eos else facts.eos_token_ids
    room = facts.max_model_len - len(request.prompt_token_ids)
    request.search = BeamSearch(
        params=params.beams,
        max_tokens=max(min(params.max_tokens, room), 1),
        stop_token_ids=frozenset((*params.stop_token_ids, *eos_token_ids)),
        num_logprobs=params.logprobs,
    )
    request.sampling = _beam_sampling(params, request.search)
    _fan_out(request, params.beams.width)


def _beam_sampling(params: SamplingParams, search: BeamSearch) -> SamplingParams:
    """Of every beam: nothing but the likeliest tokens matters."""
    num_alternatives = max(search.num_candidates, params.logprobs or 0)
    return SamplingParams(
        max_tokens=params.max_tokens, temperature=0, logprobs=num_alternatives, beams=params.beams
    )


def _fan_out(leader: Request, width: int) -> None:
    fan_out(leader, dict.fromkeys(range(width), ()))


def check_room(request: Request, tables: BlockTables) -> None:
    """InvalidRequest unless all beams fit into the pool alone: their search is not preempted for ever."""
    if request.search is None:
        return
    num_tokens = len(request.prompt_token_ids)
    num_shared = num_tokens // tables.block_size
    num_apart = tables.blocks_for(num_tokens + request.search.max_tokens) - num_shared
    needed = num_shared + request.num_seats * num_apart
    if needed > tables.num_blocks:
        raise InvalidRequest(
            f"{request.num_seats} beams need up to {needed} blocks; there are {tables.num_blocks}",
            field="max_tokens",
        )


class Beams:
    """The searches that have samples of the current step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._samples: dict[Request, dict[Request, Sample]] = {}

    def take(self, request: Request, sample: Sample) -> None:
        """One row of a search: of its leader in the first step, then of its beams."""
        self._samples.setdefault(request.leader or request, {})[request] = sample

    def advance(self) -> list[StepOutput]:
        """Advance every search that has samples; the outputs of those that are done."""
        taken, self._samples = self._samples, {}
        return [output for leader, samples in taken.items() for output in self._advance(leader, samples)]

    def _advance(self, leader: Request, samples: dict[Request, Sample]) -> list[StepOutput]:
        search = leader.search
        assert search is not None
        errors = [sample.error for sample in samples.values() if sample.error is not None]
        if errors:
            self._scheduler.finish(leader)
            return [_failed(leader, errors[0])]
        sources = [leader] if leader in samples else leader.forks
        if any(source not in samples for source in sources):
            self._start_over(leader, search)
            return []
        parents = search.advance([_alternatives(samples[source]) for source in sources])
        if search.done:
            self._scheduler.finish(leader)
            return [_returned(leader, search, rank, beam) for rank, beam in enumerate(search.best())]
        if sources is leader.forks:
            select_blocks(self._scheduler.tables, sources, parents)
        for fork, beam in zip(leader.forks, search.running, strict=True):
            fork.output_token_ids = beam.token_ids
        return []

    def _start_over(self, leader: Request, search: BeamSearch) -> None:
        leader.search = search.restarted()
        self._scheduler.start_over(leader)
        _fan_out(leader, len(leader.forks))


def _alternatives(sample: Sample) -> tuple[tuple[int, float], ...]:
    assert sample.logprob is not None
    return sample.logprob.top


def _failed(leader: Request, error: str) -> StepOutput:
    return StepOutput(request=leader, start_index=0, finish_reason=FinishReason.ERROR, error=error)


def _returned(leader: Request, search: BeamSearch, rank: int, beam: Beam) -> StepOutput:
    stop_token_id = search.stop_token_id(beam)
    return StepOutput(
        request=leader,
        choice=rank,
        start_index=0,
        token_ids=tuple(beam.token_ids),
        logprobs=_logprobs(beam, search.num_logprobs),
        finish_reason=FinishReason.LENGTH if stop_token_id is None else FinishReason.STOP,
        stop_token_id=stop_token_id,
        score=beam.score,
    )


def _logprobs(beam: Beam, num_top: int | None) -> tuple[TokenLogprob, ...] | None:
    if num_top is None:
        return None
    return tuple(TokenLogprob(token.logprob, tuple(token.alternatives[:num_top])) for token in beam.tokens)
