"""The decode worker: takes KV blocks in, runs the batch, streams tokens.

The life of an attempt here:
1. Submit without a peer: the engine prefills and decodes by itself. With a peer, Submit (from the
   gateway) and Offer (over the prefill worker's link) come in either order and are paired by the
   transfer id; a link holds an Offer without Submit for RESERVE_TIMEOUT_S.
2. The engine reserves blocks for the whole sequence, in the order of its policy; while its pool is full
   the reservation waits. Reserved goes to the prefill worker: only now may frames come.
3. The link's pump receives a frame into a slab; the engine thread scatters it into the reserved blocks
   if the transfer is still alive, and gives the slab back either way.
4. Commit and every frame scattered: the engine takes the request into its batch, and token 0 is
   repeated to the gateway.
5. An abort, a cancel of the sender or a failed link ends it; the engine thread frees the blocks between
   two steps.
"""

from dataclasses import dataclass

import grpc.aio

from decode_svc.links import DecodeLink, DecodeLinks
from decode_svc.receiving import Receiving
from decode_svc.service import DecodeServicer
from engine.engine import Engine, StepResult
from engine.outputs import PreemptionMode
from engine.request import Request
from kvtransfer.messages import Commit
from protos.tandem.v1 import common_pb2 as pb
from protos.tandem.v1 import decode_pb2, decode_pb2_grpc, kvlink_pb2, kvlink_pb2_grpc
from runtime import faultpoints
from runtime.errors import AlreadyExists, Preempted, TandemError
from worker.attach import AttemptKey
from worker.choices import first_samples
from worker.convert import to_request
from worker.main import WorkerParts
from worker.timeline import GENERATE, RECEIVE, RESERVE


@dataclass(slots=True, kw_only=True, eq=False)
class Incoming:
    """One attempt whose KV comes from elsewhere, until it is committed; owned by the event loop."""

    key: AttemptKey
    transfer_id: bytes
    request: Request
    link: DecodeLink | None = None
    """Whose Offer it is paired with."""


class DecodeRole:
    """Belongs to the event loop but for `between_steps` and `on_step`, which run on the engine thread."""

    def __init__(self, parts: WorkerParts) -> None:
        self._bridge = parts.bridge
        self._metrics = parts.metrics
        self._incoming: dict[bytes, Incoming] = {}
        self._transfer_ids: dict[AttemptKey, bytes] = {}
        self._links = DecodeLinks(parts, self)
        self.receiving = Receiving(
            lambda *reservation: self._bridge.on_loop(self._reserved, *reservation),
            lambda *refusal: self._bridge.on_loop(self.failed, *refusal),
        )

    def add_services(self, server: grpc.aio.Server) -> list[str]:
        """Attach for gateways, KvLink for prefill workers."""
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(self._bridge), server)
        kvlink_pb2_grpc.add_KvLinkServiceServicer_to_server(self._links, server)
        return [
            decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name,
            kvlink_pb2.DESCRIPTOR.services_by_name["KvLinkService"].full_name,
        ]

    def links(self) -> dict[str, str]:
        """Transports of the links with a live epoch, by peer."""
        return self._links.open_transports

    def num_transfers(self) -> int:
        """Transfers that have not ended."""
        return len(self._incoming)

    async def run(self) -> None:
        """No work of its own: links live in the calls that opened them."""

    def submit(self, key: AttemptKey, submit: pb.Submit) -> None:
        """Start an attempt, or wait for its KV."""
        request = to_request(key, submit, prefill_only=False)
        if faultpoints.ACTIVE and submit.emitted:
            faultpoints.reach("decode.moved")
        if not submit.HasField("peer"):
            self._bridge.submit(key, request)
            return
        if submit.transfer_id in self._incoming:
            raise AlreadyExists("this transfer is already awaited", field="transfer_id")
        incoming = Incoming(key=key, transfer_id=submit.transfer_id, request=request)
        self._incoming[incoming.transfer_id] = incoming
        self._transfer_ids[key] = incoming.transfer_id
        self._bridge.timelines.begin(key, RESERVE)
        link = self._links.holding(incoming.transfer_id)
        if link is not None:
            self._pair(incoming, link)

    def offered(self, link: DecodeLink, transfer_id: bytes) -> None:
        """A prefill worker offers a transfer; without its Submit the link holds the Offer."""
        incoming = self._incoming.get(transfer_id)
        if incoming is not None and incoming.link is None:
            self._pair(incoming, link)

    def _pair(self, incoming: Incoming, link: DecodeLink) -> None:
        incoming.link = link
        link.hold(incoming.transfer_id)
        self._bridge.thread.post(
            lambda engine: self.receiving.want(engine, incoming.transfer_id, incoming.request)
        )

    def _reserved(self, transfer_id: bytes, num_blocks: int, num_cached_tokens: int) -> None:
        incoming = self._incoming.get(transfer_id)
        if incoming is None or incoming.link is None:
            return
        self._bridge.timelines.finish(incoming.key, RESERVE)
        self._bridge.timelines.begin(incoming.key, RECEIVE)
        try:
            incoming.link.reserve(transfer_id, num_blocks, num_cached_tokens)
            if faultpoints.ACTIVE:
                faultpoints.reach("decode.reserved")
        except TandemError as error:
            self.failed(transfer_id, error)

    def abort(self, key: AttemptKey) -> None:
        """Free everything of an attempt; a transfer's sender is told."""
        transfer_id = self._transfer_ids.pop(key, None)
        if transfer_id is None:
            self._bridge.abort(key)
            return
        incoming = self._incoming.pop(transfer_id)
        if incoming.link is not None:
            incoming.link.cancel(transfer_id, "the attempt was aborted")
        self._bridge.thread.post(lambda engine: self._drop(engine, transfer_id, key))

    def _drop(self, engine: Engine, transfer_id: bytes, key: AttemptKey) -> None:
        """The transfer may have been committed while the loop did not know."""
        self.receiving.drop(engine, transfer_id)
        engine.abort(key)

    def abort_choice(self, key: AttemptKey, choice: int) -> None:
        """End one choice; the others go on."""
        self._bridge.abort_choice(key, choice)

    def commit(self, transfer_id: bytes, commit: Commit, num_groups: int) -> None:
        """Every frame lies in the pool: the engine decodes from its next step on. From any thread."""
        self._bridge.thread.post(lambda engine: self._commit(engine, transfer_id, commit, num_groups))

    def committed(self, transfer_id: bytes) -> None:
        """Every frame lies in the pool, and the engine has been told."""
        incoming = self._incoming.pop(transfer_id, None)
        if incoming is None:
            return
        del self._transfer_ids[incoming.key]
        self._metrics.transfers.labels(self._metrics.side, "committed").inc()
        timeline = self._bridge.timelines.finish(incoming.key, RECEIVE)
        if timeline is not None:
            self._metrics.received(timeline)
        self._bridge.timelines.begin(incoming.key, GENERATE)

    def _commit(self, engine: Engine, transfer_id: bytes, commit: Commit, num_groups: int) -> None:
        request = self.receiving.take(transfer_id)
        if request is None:
            return
        if faultpoints.ACTIVE:
            faultpoints.reach("decode.committed")
        request.num_cached_tokens = commit.cached_tokens
        try:
            samples = first_samples(request, commit)
            outputs = engine.commit_choices(
                request, samples, has_kv=not commit.finished, num_groups=num_groups
            )
        except TandemError as error:
            assert isinstance(request.key, AttemptKey)
            self._bridge.fail(request.key, error)
        else:
            self._bridge.publish(outputs)

    def failed(self, transfer_id: bytes, error: TandemError) -> None:
        """A transfer ended otherwise; the gateway may try elsewhere."""
        incoming = self._incoming.get(transfer_id)
        if incoming is not None:
            self._metrics.transfers.labels(self._metrics.side, "failed").inc()
            self._bridge.hub.fail(incoming.key, error)

    def between_steps(self, engine: Engine) -> None:
        """Reserve for those who wait; keep the load for readers on other threads."""
        self.receiving.reserve_waiting(engine)
        load = self._bridge.snapshot(engine, waiting=self.receiving.num_waiting)
        self._metrics.blocks_swapped.set(load.blocks_swapped)

    def num_tokens_due(self) -> int:
        """As of the last snapshot."""
        return self._bridge.num_tokens_due

    def on_step(self, engine: Engine, result: StepResult) -> None:
        """All tokens of the step, in one call to the loop."""
        if faultpoints.ACTIVE:
            faultpoints.reach("decode.step")
        self._bridge.mark_prefills(result, then=GENERATE)
        self._metrics.stepped(result)
        self._bridge.publish(result.outputs)
        self._metrics.preempted(result.preempted)
        for item in result.preempted:
            if item.mode is PreemptionMode.HAND_BACK:
                self._hand_back(item.request)

    def _hand_back(self, request: Request) -> None:
        """Behind the tokens it has, which are on their way, the gateway runs another attempt."""
        assert isinstance(request.key, AttemptKey)
        self._bridge.fail(request.key, Preempted("other requests need the memory", retryable=True))
