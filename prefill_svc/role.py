"""The prefill worker: computes prompts, exports their KV blocks, samples the first token.

The life of an attempt here:
1. Submit: the engine queues the prompt; an Offer goes to the decode worker over the link to it.
2. Each step that finishes blocks makes them free to travel (Export); the link's pump gathers and sends.
   Of a long chunk the layers are, group by group, while the step still computes the next ones.
3. The step that computes the last chunk samples token 0, which goes to the gateway at once.
4. After the last block the link commits, and the engine's blocks are free; the acknowledgement ends the
   attempt: handed over. If token 0 ended the request, the Commit says so and no more blocks travel.
5. A refusal, a failed link or an abort ends it; the engine frees the blocks, the peer is told.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial

import grpc.aio

from engine.engine import Engine, StepOutput, StepResult
from engine.plan import Scheduled
from engine.request import Request
from kvtransfer.messages import FirstToken
from prefill_svc.export import Export
from prefill_svc.links import PrefillLinks
from prefill_svc.service import PrefillServicer
from protos.tandem.v1 import common_pb2 as pb
from protos.tandem.v1 import prefill_pb2, prefill_pb2_grpc
from runtime import faultpoints
from runtime.errors import Internal, InvalidRequest, TandemError
from worker.attach import AttemptKey
from worker.choices import continued
from worker.convert import FINISH_REASONS, to_request
from worker.fence import fence_for
from worker.main import WorkerParts
from worker.timeline import SEND

BlockTables = tuple[tuple[int, ...], ...]
"""Block ids per KV group, as they are at the moment."""

Progress = tuple[AttemptKey, BlockTables, int, int]
"""An attempt, its block ids so far, how many of its tokens are computed, and how many were cached."""


class PrefillRole:
    """Belongs to the event loop but for `between_steps`, `on_step` and `on_layers`, which run on the engine
    thread. What it tells the loop of blocks goes through the fence: they are written when the loop knows."""

    def __init__(self, parts: WorkerParts) -> None:
        self._bridge = parts.bridge
        self._metrics = parts.metrics
        self._block_size = parts.facts.block_size
        self._exports: dict[AttemptKey, Export] = {}
        self._links = PrefillLinks(parts, self)
        self._fence = fence_for(parts.engine.config.device)
        parts.engine.model.watch.listen(self.on_layers)

    def add_services(self, server: grpc.aio.Server) -> list[str]:
        """Attach; links are opened from here, not to here."""
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(self._bridge), server)
        return [prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name]

    def links(self) -> dict[str, str]:
        """Transports of the links with a live epoch, by peer."""
        return self._links.open_transports

    def num_transfers(self) -> int:
        """Exports that have not ended."""
        return len(self._exports)

    async def run(self) -> None:
        """Opens and serves the links."""
        await self._links.run()

    def submit(self, key: AttemptKey, submit: pb.Submit) -> None:
        """Start to compute, and offer the KV to the peer."""
        if not submit.HasField("peer"):
            raise InvalidRequest("a prefill worker needs a decode worker to send to", field="peer")
        request = to_request(key, submit, prefill_only=True)
        request.granted = False
        export = Export(
            key=key,
            transfer_id=submit.transfer_id,
            num_tokens=request.num_tokens,
            block_size=self._block_size,
            continued=continued(request),
        )
        self._exports[key] = export
        self._bridge.submit(key, request)
        self._links.add(submit.peer, export)

    def abort(self, key: AttemptKey) -> None:
        """Free everything of an attempt, on both ends."""
        export = self._exports.pop(key, None)
        if export is not None:
            self._links.cancel(export, "the attempt was aborted")
        self._bridge.abort(key)

    def abort_choice(self, key: AttemptKey, choice: int) -> None:
        """Nothing: choices go apart where they decode."""

    def between_steps(self, engine: Engine) -> None:
        """Keep the load for readers on other threads."""
        self._bridge.snapshot(engine)

    def num_tokens_due(self) -> int:
        """As of the last snapshot."""
        return self._bridge.num_tokens_due

    def on_step(self, engine: Engine, result: StepResult) -> None:
        """First tokens to the gateways at once; then the new blocks to their links."""
        if faultpoints.ACTIVE:
            faultpoints.reach("prefill.step")
        self._bridge.mark_prefills(result)
        self._metrics.stepped(result)
        self._bridge.publish(output for output in result.outputs if output.request.search is None)
        progress = [_progress(request) for request in result.computed]
        self._fence.then(partial(self._bridge.on_loop, self._advance, progress, result.outputs))

    def on_layers(self, chunks: Sequence[Scheduled], num_layers: int) -> None:
        """In the midst of a step: the first layers of these chunks are written."""
        progress = [(item.request.key, _tables(item.request), item.context_len) for item in chunks]
        self._fence.then(partial(self._bridge.on_loop, self._advance_layers, progress, num_layers))

    def _advance_layers(
        self, progress: Sequence[tuple[AttemptKey, BlockTables, int]], num_layers: int
    ) -> None:
        for key, block_tables, num_computed_tokens in progress:
            export = self._exports.get(key)
            if export is not None:
                export.advance_layers(block_tables, num_computed_tokens, num_layers)
                self._links.advance(export)
                self._mark_sending(export)

    def _advance(self, progress: Sequence[Progress], outputs: Sequence[StepOutput]) -> None:
        sampled: defaultdict[Hashable, list[FirstToken]] = defaultdict(list)
        for output in outputs:
            if output.error is None:
                sampled[output.request.key].append(_first_token(output))
            else:
                self._fail(output, output.error)
        for key, block_tables, num_computed_tokens, cached_tokens in progress:
            export = self._exports.get(key)
            if export is not None:
                export.advance(block_tables, num_computed_tokens)
                if num_computed_tokens == export.num_tokens:
                    export.first_tokens = (*export.continued, *sampled[key])
                    export.cached_tokens = cached_tokens
                self._links.advance(export)
                self._mark_sending(export)

    def _fail(self, output: StepOutput, error: str) -> None:
        """The gateway has been told, but of beams."""
        assert isinstance(output.request.key, AttemptKey)
        if output.request.search is None:
            self.abort(output.request.key)
        else:
            self._bridge.hub.fail(output.request.key, Internal(error))

    def _mark_sending(self, export: Export) -> None:
        if export.granted and export.has_taken:
            self._bridge.timelines.begin(export.key, SEND)

    def granted(self, key: AttemptKey) -> None:
        """The receiver has room: what is computed travels from now on."""
        export = self._exports.get(key)
        if export is not None:
            export.granted = True
            self._bridge.grant(key)
            self._mark_sending(export)

    def sent(self, key: AttemptKey) -> None:
        """The link will not read this attempt's blocks again."""
        export = self._exports.get(key)
        if export is not None:
            facts = {"tandem.kv.tokens": export.num_tokens, "tandem.kv.cached_tokens": export.cached_tokens}
            timeline = self._bridge.timelines.finish(key, SEND, attributes=facts)
            if timeline is not None:
                self._metrics.sent(timeline)
        self._bridge.abort(key)

    def committed(self, key: AttemptKey) -> None:
        """The decode worker owns the KV now."""
        if self._exports.pop(key, None) is not None:
            self._metrics.transfers.labels(self._metrics.side, "committed").inc()
            end = pb.AttemptEnd(request=key.request, attempt=key.attempt, handed_over=pb.HandedOver())
            self._bridge.end(key, end)

    def failed(self, key: AttemptKey, error: TandemError) -> None:
        """The transfer ended otherwise; the gateway hears of it if the attempt is still wanted."""
        self._metrics.transfers.labels(self._metrics.side, "failed").inc()
        self._bridge.hub.fail(key, error)


def _progress(request: Request) -> Progress:
    assert isinstance(request.key, AttemptKey)
    return request.key, _tables(request), request.num_computed_tokens, request.num_cached_tokens


def _tables(request: Request) -> BlockTables:
    return tuple(map(tuple, request.block_tables))


def _first_token(output: StepOutput) -> FirstToken:
    """A beam search goes on from the alternatives of its first token, whatever that is."""
    reason = output.finish_reason if output.request.search is None else None
    return FirstToken(
        choice=output.choice,
        token_id=output.token_ids[0],
        logprob=output.logprobs[0] if output.logprobs else None,
        finish_reason=FINISH_REASONS[reason] if reason else None,
    )
