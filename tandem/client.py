"""The Python client: one asynchronous object over the public gRPC service.

async with Client("127.0.0.1:50051") as client:
    async for delta in client.generate("def ", max_tokens=32):
        print(delta.text, end="")
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar, Unpack

import grpc.aio

from protos.tandem.v1 import inference_pb2, inference_pb2_grpc
from runtime import rpc
from runtime.access import call_metadata
from runtime.errors import Cancelled
from tandem import messages
from tandem.credentials import from_environment
from tandem.messages import Completion, Delta, Model, Prompt, ServerInfo
from tandem.rpc_errors import from_rpc_error
from tandem.sampling import Sampling, sampling_params

R = TypeVar("R")


class Client:
    """Talks to one gateway at `host:port`; errors are those of runtime.errors.

    `api_key` is shown with every call; None: that of TANDEM_API_KEY, or of the file that TANDEM_API_KEY_FILE
    names.
    `timeout` is in seconds and travels to the server as the call's deadline; None leaves it to the server.
    A client belongs to the event loop that it is used on.
    """

    def __init__(
        self, address: str = "127.0.0.1:50051", *, api_key: str | None = None, timeout: float | None = None
    ) -> None:
        self.address = address
        self._metadata = call_metadata(api_key or from_environment())
        self._timeout = timeout
        self._channel = rpc.channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and the connection."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        model: str = "",
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncIterator[Delta]:
        """Stream the answer to `prompt`; the last delta carries usage, a choice's last one its finish reason.

        Leaving the loop early cancels the request; use contextlib.aclosing where that must not wait for the
        garbage collector.
        """
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            model=model,
            priority=priority,
            cache_salt=cache_salt,
            sampling=sampling_params(sampling),
            **messages.prompt_fields(prompt),
        )
        call = self._stub.Generate(
            request, timeout=self._timeout if timeout is None else timeout, metadata=self._metadata
        )
        try:
            with self._errors():
                async for message in call:
                    yield messages.delta(message)
        finally:
            call.cancel()

    async def complete(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        model: str = "",
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The whole answer to `prompt` at once."""
        request = inference_pb2.CompleteRequest(
            request_id=request_id,
            model=model,
            priority=priority,
            cache_salt=cache_salt,
            sampling=sampling_params(sampling),
            **messages.prompt_fields(prompt),
        )
        call = self._stub.Complete(
            request, timeout=self._timeout if timeout is None else timeout, metadata=self._metadata
        )
        return messages.completion(await self._answer(call))

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool = True, model: str = ""
    ) -> list[int]:
        """Token ids of text or chat messages."""
        fields = messages.prompt_fields(prompt)
        if "token_ids" in fields:
            raise TypeError("tokenize takes text or chat messages")
        request = inference_pb2.TokenizeRequest(
            model=model,
            add_special_tokens=add_special_tokens,
            text=fields.get("text"),
            messages=fields.get("messages"),
        )
        answer = await self._answer(
            self._stub.Tokenize(request, timeout=self._timeout, metadata=self._metadata)
        )
        return list(answer.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        answer = await self._answer(
            self._stub.Detokenize(request, timeout=self._timeout, metadata=self._metadata)
        )
        return str(answer.text)

    async def models(self) -> list[Model]:
        """What the server serves."""
        request = inference_pb2.ListModelsRequest()
        answer = await self._answer(
            self._stub.ListModels(request, timeout=self._timeout, metadata=self._metadata)
        )
        return [Model(id=m.id, root=m.root, max_model_len=m.max_model_len) for m in answer.models]

    async def server_info(self) -> ServerInfo:
        """The gateway and the workers that it knows."""
        request = inference_pb2.GetServerInfoRequest()
        return messages.server_info(
            await self._answer(
                self._stub.GetServerInfo(request, timeout=self._timeout, metadata=self._metadata)
            )
        )

    async def abort(self, *request_ids: str) -> list[str]:
        """End live requests; returns those that were live."""
        request = inference_pb2.AbortRequest(request_ids=request_ids)
        answer = await self._answer(self._stub.Abort(request, timeout=self._timeout, metadata=self._metadata))
        return list(answer.aborted)

    async def _answer(self, call: Awaitable[R]) -> R:
        with self._errors():
            return await call

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """grpc.aio also raises CancelledError for a status CANCELLED of the server; only ours may pass."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.address) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Cancelled("the server cancelled the call") from error
