"""The public gRPC face, tandem.v1.InferenceService. Converts and delegates."""

import secrets
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias

import grpc.aio

from gateway.exchange import REQUEST_ID
from gateway.flow import Flow, Generation
from gateway.output import Delta, join
from gateway.patience import Patience
from gateway.prompts import Messages, tokenize
from gateway.registry import STATES
from gateway.tracing import Origin
from gateway.validation import check_prompt
from protos.tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from runtime import rpc
from runtime.access import Keys
from runtime.errors import InvalidRequest
from runtime.version import VERSION

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

WIRE_STATES = {state: number for number, state in STATES.items()}

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Skin over one flow: the client's deadline is the request's, its cancel an abort."""

    def __init__(
        self, flow: Flow, api_keys: Keys, abort: Callable[[list[str], str], Awaitable[list[str]]]
    ) -> None:
        """`api_keys` have been checked; they tell clients apart. `abort` reaches requests elsewhere, too."""
        self._abort = abort
        self._flow = flow
        self._api_keys = api_keys

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """Writes deltas; the last one of a choice carries its finish reason, the last one of all usage."""
        async with rpc.translated(context):
            asked = self._asked(request, context, stream=True)
            with Patience() as patience:
                async with aclosing(self._flow.stream(asked)) as deltas:
                    async for delta in deltas:
                        patience.begin()
                        await context.write(_response(asked.request_id, delta))
                        patience.end()

    async def Complete(
        self, request: inference_pb2.CompleteRequest, context: Context
    ) -> inference_pb2.CompleteResponse:
        """All choices, each whole, at once."""
        async with rpc.translated(context):
            asked = self._asked(request, context, stream=False)
            async with aclosing(self._flow.stream(asked)) as deltas:
                wholes = join([delta async for delta in deltas])
        return inference_pb2.CompleteResponse(
            request_id=asked.request_id,
            model=self._flow.model.name,
            completions=[_completion(whole) for whole in wholes],
            usage=wholes[-1].usage,
            prompt_logprobs=wholes[0].prompt_logprobs,
        )

    def _asked(
        self,
        request: inference_pb2.GenerateRequest | inference_pb2.CompleteRequest,
        context: Context,
        *,
        stream: bool,
    ) -> Generation:
        metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        origin = Origin(
            operation="chat" if request.WhichOneof("prompt") == "messages" else "text_completion",
            method=f"{SERVICE}/{'Generate' if stream else 'Complete'}",
            stream=stream,
            traceparent=metadata.get("traceparent", "")[:256],
        )
        with self._flow.reading(origin):
            asked = _generation(request, context.time_remaining(), metadata.get("x-request-id", ""), origin)
        return replace(asked, tenant=self._tenant(context))

    def _tenant(self, context: Context) -> str:
        metadata = context.invocation_metadata() or ()
        return self._api_keys.tenant([value for key, value in metadata if key == "authorization"])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Text or messages to token ids."""
        async with rpc.translated(context):
            self._flow.model.check_name(request.model)
            prompt = _prompt(request)
            assert not isinstance(prompt, list)
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            token_ids = await tokenize(self._flow.model, prompt, add_special_tokens=special)
        max_model_len = self._flow.limits.max_model_len
        return inference_pb2.TokenizeResponse(token_ids=token_ids, max_model_len=max_model_len)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Token ids to text; special tokens are not shown."""
        async with rpc.translated(context):
            self._flow.model.check_name(request.model)
            check_prompt(request.token_ids or [0], self._flow.limits, "token_ids")
        return inference_pb2.DetokenizeResponse(text=self._flow.model.tokenizer.decode(request.token_ids))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """The one served model."""
        model = inference_pb2.Model(
            id=self._flow.model.name,
            root=str(self._flow.model.root),
            max_model_len=self._flow.limits.max_model_len,
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def GetServerInfo(
        self, request: inference_pb2.GetServerInfoRequest, context: Context
    ) -> inference_pb2.GetServerInfoResponse:
        """Version, model and workers."""
        fleet = self._flow.fleet
        workers = [
            inference_pb2.WorkerStatus(
                identity=worker.info.identity,
                role=worker.info.role,
                state=WIRE_STATES[worker.state],
                load=fleet.load(worker.worker_id),
            )
            for worker in fleet.registry.all()
        ]
        return inference_pb2.GetServerInfoResponse(
            version=VERSION,
            model=self._flow.model.name,
            max_model_len=self._flow.limits.max_model_len,
            workers=workers,
            requests=self._flow.num_live,
        )

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: Context
    ) -> inference_pb2.AbortResponse:
        """End live requests of the caller; unknown ids are no error."""
        aborted = await self._abort(list(request.request_ids), self._tenant(context))
        return inference_pb2.AbortResponse(aborted=aborted)


def _generation(
    request: inference_pb2.GenerateRequest | inference_pb2.CompleteRequest,
    remaining_s: float | None,
    request_id: str,
    origin: Origin,
) -> Generation:
    return Generation(
        request_id=_request_id(request.request_id or request_id),
        prompt=_prompt(request),
        sampling=request.sampling,
        timeout_s=float("inf") if remaining_s is None else remaining_s,
        model=request.model,
        priority=request.priority,
        cache_salt=request.cache_salt,
        origin=origin,
    )


def _request_id(given: str) -> str:
    if not given:
        return secrets.token_hex(16)
    if not REQUEST_ID.fullmatch(given):
        raise InvalidRequest("request_id must be 1 to 128 visible ASCII characters", field="request_id")
    return given


def _prompt(request: Any) -> str | list[int] | Messages:
    match request.WhichOneof("prompt"):
        case "text":
            text: str = request.text
            return text
        case "token_ids":
            return list(request.token_ids.ids)
        case "messages":
            return tuple(
                {"role": message.role, "content": message.content} for message in request.messages.messages
            )
        case _:
            raise InvalidRequest("prompt is missing", field="prompt")


def _response(request_id: str, delta: Delta) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(
        request_id=request_id,
        choice=delta.choice,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=delta.logprobs,
        usage=delta.usage,
        prompt_logprobs=delta.prompt_logprobs,
    )
    if delta.finish_reason is not None:
        response.finish_reason = delta.finish_reason
    if delta.stop_reason is not None:
        response.stop_reason = str(delta.stop_reason)
    return response


def _completion(whole: Delta) -> inference_pb2.Completion:
    completion = inference_pb2.Completion(
        choice=whole.choice,
        token_ids=whole.token_ids,
        text=whole.text,
        logprobs=whole.logprobs,
        finish_reason=whole.finish_reason or common_pb2.FINISH_REASON_UNSPECIFIED,
    )
    if whole.stop_reason is not None:
        completion.stop_reason = str(whole.stop_reason)
    return completion
