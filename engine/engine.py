"""One engine: continuous batching of prefill and decode over one KV pool. One thread owns it.

On a co-located or decode worker requests come by `submit` or by `reserve` and `commit`; on a prefill worker
they come by `submit` with `prefill_only` and stay until `release`.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain

from engine.beams import Beams, check_room, prepare
from engine.config import EngineConfig
from engine.kv_cache import KvCache
from engine.loader import LoadedModel
from engine.memory import with_kv_memory
from engine.outputs import EngineLoad as EngineLoad
from engine.outputs import PrefixCacheStats, judge
from engine.outputs import StepOutput as StepOutput
from engine.outputs import StepResult as StepResult
from engine.plan import Scheduled
from engine.policy import make_policy
from engine.request import FinishReason, Request, RequestState, TokenLogprob
from engine.runner import Runner
from engine.sampler import Sample
from engine.scheduler import Scheduler
from engine.speculative.speculation import SpeculationStats
from engine.step.pipeline import make_pipeline
from engine.structured import Grammars
from runtime.errors import ContextLengthExceeded, InvalidRequest


class Engine:
    """Token ids in, token ids out, a step at a time."""

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        self.config = config = with_kv_memory(config, model)
        self.model = model
        self.facts = model.facts
        self.kv_cache = KvCache(config, model.facts, model.ranks)
        self.grammars = Grammars(
            model.path / "tokenizer.json",
            vocab_size=model.facts.vocab_size,
            eos_token_ids=model.facts.eos_token_ids,
        )
        self._runner = Runner(config, model, self.kv_cache, self.grammars)
        self._scheduler = Scheduler(
            self.kv_cache.tables,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            policy=make_policy(config.scheduling_policy),
            preemption=config.preemption_mode,
            swap_space=self.kv_cache.swap_space,
            extend=self._runner.speculation.extend,
            longest=model.facts.max_model_len,
        )
        self._beams = Beams(self._scheduler)
        self._pipeline = make_pipeline(self._scheduler, self._runner, model.facts.max_model_len)

    def enter(self, request: Request) -> None:
        """Give a request that will be reserved its place in the order of requests: its `rank`."""
        self._scheduler.enter(request, 0)

    def submit(self, request: Request) -> None:
        """Queue for local prefill, then decode unless prefill_only; InvalidRequest if it can never run."""
        self._accept(request)
        self._scheduler.submit(request)

    def reserve(self, request: Request) -> bool:
        """Allocate blocks for all tokens of a request whose KV will be written from outside.

        False: not now, try again after blocks were freed. InvalidRequest: never. Reserved blocks are not
        taken back but by `abort`.
        """
        self._accept(request)
        return self._scheduler.reserve(request)

    def commit(self, request: Request, first_token: int, logprob: TokenLogprob | None) -> StepOutput:
        """A reserved request's KV is in its blocks: append its next token and let it decode.

        If the token ends the request, its blocks are free on return.
        """
        (output,) = self.commit_choices(request, {request.choice: Sample(first_token, logprob)})
        return output

    def commit_choices(
        self, request: Request, samples: Mapping[int, Sample], *, has_kv: bool = True, num_groups: int = 1
    ) -> list[StepOutput]:
        """`commit` with the next token of each of `request.samplers`, by choice.

        What the first token of a beam search is does not matter, its alternatives do. `has_kv=False`: all
        choices end with these tokens, so that the KV did not come. `num_groups`: KV groups that came; without
        the draft's, it is computed here.
        """
        assert request.state is RequestState.RESERVED, request.state
        samplers = request.samplers
        if has_kv:
            request.num_computed_tokens = request.num_tokens
            if num_groups > 1:
                self.kv_cache.tables.draft_coverage.arrive(request, request.num_tokens)
            self.kv_cache.tables.publish(request)
        self._scheduler.commit(request)
        outputs = [self._take(sampler, samples[sampler.choice]) for sampler in samplers]
        return [output for output in outputs if output is not None] + self._beams.advance()

    def abort(self, key: Hashable) -> bool:
        """Forget a request in any state and free its blocks; False if there is none.

        They are free on return, or, if a step that is on its way writes into them, behind the next `step`.
        """
        request = self._scheduler.live.get(key)
        if request is not None:
            self._scheduler.finish(request)
        return request is not None

    def abort_choice(self, key: Hashable, choice: int) -> None:
        """Forget one of a request's choices and free its blocks; nothing happens unless it decodes."""
        request = self._scheduler.live.get(key)
        for fork in request.live_forks if request is not None else ():
            if fork.choice == choice:
                self._scheduler.finish(fork)

    def grant(self, key: Hashable) -> None:
        """The receiver of a prefill-only request has room for its KV; nothing happens if it is gone."""
        request = self._scheduler.live.get(key)
        if request is not None:
            request.granted = True

    def release(self, key: Hashable) -> None:
        """Free the blocks of a prefill-only request; nothing happens if it is gone already."""
        self.abort(key)

    def step(self) -> StepResult:
        """Schedule, run, commit; `engine.step.pipeline` says what of it overlaps."""
        plan, samples = self._pipeline.step()
        self.model.ranks.confirm()
        return self._commit_step(plan, iter(samples))

    def has_work(self) -> bool:
        """Whether a step would compute or tell anything; a request that waits for blocks alone is no work."""
        return self._pipeline.in_flight or self._scheduler.has_work()

    def load(self) -> EngineLoad:
        """How busy this engine is."""
        scheduler, tables = self._scheduler, self.kv_cache.tables
        return EngineLoad(
            requests_running=len(scheduler.decode.running) + len(scheduler.prefill.prefilling),
            requests_waiting=len(scheduler.prefill.waiting),
            queued_prefill_tokens=scheduler.prefill.num_queued_tokens,
            blocks_total=tables.num_blocks,
            blocks_used=tables.num_used,
            blocks_cached=tables.num_cached,
            blocks_swapped=self.kv_cache.swap_space.num_used,
            blocks_taken=sum(pool.num_taken for pool in tables.pools),
            blocks_returned=sum(pool.num_returned for pool in tables.pools),
        )

    @property
    def speculation_stats(self) -> SpeculationStats:
        """Counts that go on counting; any thread may read them."""
        return self._runner.speculation.stats

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Counts that go on counting; any thread may read them."""
        return self.kv_cache.tables.stats

    def check(self) -> None:
        """Assert the invariants of scheduler, block tables and captured steps."""
        self._scheduler.check()
        self._runner.check()

    def _commit_step(self, plan: list[Scheduled], samples: Iterator[Sample]) -> StepResult:
        result = StepResult(batch=plan, preempted=self._scheduler.take_preempted())
        for item in plan:
            request, is_last = item.request, item.samples
            row = [(sampler, next(samples)) for sampler in request.samplers] if is_last else []
            request.num_computed_tokens += item.query_len
            if request.prefill_only:
                result.computed.append(request)
            self._publish(request, row)
            if is_last and request.state is not RequestState.RUNNING:
                self._advance(request)
            for sampler, sample in row:
                output = self._take(sampler, sample)
                if output is not None:
                    result.outputs.append(output)
        result.outputs.extend(self._beams.advance())
        return result

    def _publish(self, request: Request, row: list[tuple[Request, Sample]]) -> None:
        """Others may share what was computed; if it gave no sound logits, nobody may."""
        for _, sample in row:
            if sample.error is not None:
                self.kv_cache.tables.retract(request)
                return
        self.kv_cache.tables.publish(request)

    def _advance(self, request: Request) -> None:
        """The prompt is computed: on to the next state."""
        assert request.state is RequestState.PREFILLING
        if request.prefill_only:
            self._scheduler.hold(request)
        else:
            self._scheduler.start_decoding(request)

    def _take(self, request: Request, sample: Sample) -> StepOutput | None:
        """What a sample adds to the output; a beam's adds nothing before its search is done."""
        if (request.leader or request).search is None or request.state is RequestState.HELD:
            return self._append(request, sample)
        self._beams.take(request, sample)
        return None

    def _append(self, request: Request, sample: Sample) -> StepOutput:
        """Add a token to the sequence; a finished request frees its blocks, unless it is held."""
        output = StepOutput(request=request, choice=request.choice, start_index=len(request.output_token_ids))
        if sample.error is None:
            self._extend(output, sample)
        else:
            output.finish_reason, output.error = FinishReason.ERROR, sample.error
        if output.finish_reason is not None:
            self._retire(request)
        return output

    def _extend(self, output: StepOutput, sample: Sample) -> None:
        """Append tokens up to the first that ends the request.

        Every token but the last was computed in this step, as a draft token that was accepted. A grammar can
        be complete behind the last sample only, or it would not have been sampled.
        """
        request, samples = output.request, (sample, *sample.then)
        for each in samples:
            request.output_token_ids.append(each.token_id)
            output.finish_reason, output.stop_token_id = judge(
                request,
                self.facts.eos_token_ids,
                self.facts.max_model_len,
                is_complete=each is samples[-1] and self._is_complete(request),
            )
            if output.finish_reason is not None:
                break
        output.token_ids = tuple(request.output_token_ids[output.start_index :])
        output.num_draft_tokens = sample.num_draft_tokens
        if sample.logprob is not None:
            output.logprobs = _logprobs(samples[: len(output.token_ids)])
        if (request.leader or request).prompt_logprobs is not None:
            output.prompt_logprobs = _take_prompt_logprobs(request.leader or request)
        if len(output.token_ids) > 1:
            request.num_computed_tokens += len(output.token_ids) - 1
            self.kv_cache.tables.publish(request)

    def _is_complete(self, request: Request) -> bool:
        return request.sampling.grammar is not None and self._runner.sampler.completes(request)

    def _retire(self, request: Request) -> None:
        if request.state is RequestState.RUNNING:
            self._scheduler.finish(request)

    def _accept(self, request: Request) -> None:
        prepare(request, self.facts)
        for each in (request, *request.forks):
            self._validate(each)
        if request.num_seats > self._scheduler.max_active:
            raise InvalidRequest(
                f"{request.num_seats} choices do not fit into a batch of {self._scheduler.max_active}",
                field="n",
            )
        check_room(request, self.kv_cache.tables)
        if request.sampling.prompt_logprobs is not None:
            request.prompt_logprobs = []

    def _validate(self, request: Request) -> None:
        """Whatever would disturb others in a batch, or could never end, is refused here."""
        params, vocab_size = request.sampling, self.facts.vocab_size
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens", field="prompt")
        if request.num_tokens >= self.facts.max_model_len:
            raise ContextLengthExceeded(
                f"{request.num_tokens} tokens leave no room in a context of {self.facts.max_model_len}",
                field="prompt",
            )
        if len(request.output_token_ids) >= params.max_tokens:
            raise InvalidRequest("max_tokens have been emitted already", field="max_tokens")
        if params.grammar is not None:
            self.grammars.compile(params.grammar)
        for field, token_ids in (
            ("prompt", request.tokens(0, request.num_tokens)),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", tuple(params.logit_bias)),
            ("allowed_token_ids", params.allowed_token_ids),
            ("bad_words", tuple(chain.from_iterable(params.bad_words))),
        ):
            if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
                raise InvalidRequest(f"{field}: token ids must be in [0, {vocab_size})", field=field)


def _take_prompt_logprobs(request: Request) -> tuple[TokenLogprob, ...]:
    """They are reported once."""
    taken, request.prompt_logprobs = request.prompt_logprobs, None
    assert taken is not None
    return tuple(taken)


def _logprobs(samples: Sequence[Sample]) -> tuple[TokenLogprob, ...] | None:
    found = [sample.logprob for sample in samples if sample.logprob is not None]
    return tuple(found) or None
