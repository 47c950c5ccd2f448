"""The OpenAI-compatible HTTP face. Converts and delegates; `exchange` does the reading and writing."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gateway import openai
from gateway.exchange import (
    EventStream,
    error_response,
    read_json,
    request_id_of,
    timeout_of,
    until_disconnect,
)
from gateway.flow import Flow, Generation
from gateway.openai_answer import Answer
from gateway.output import Delta, join
from gateway.prompts import tokenize
from gateway.tracing import Origin
from gateway.validation import check_prompt
from runtime.access import Keys
from runtime.admin_http import json_response
from runtime.errors import Internal, InvalidRequest, TandemError
from runtime.version import VERSION


class HttpFace:
    """Endpoints over one flow."""

    def __init__(self, flow: Flow, api_keys: Keys, *, max_body_bytes: int) -> None:
        """`api_keys` have been checked; they tell clients apart."""
        self._api_keys = api_keys
        self._flow = flow
        self._max_body_bytes = max_body_bytes
        self._started = int(time.time())

    def routes(self) -> list[BaseRoute]:
        """All public routes."""
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/version", self.version),
        ]

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        with self._flow.reading(_origin(request, "text_completion")):
            asked = openai.parse_completion(await read_json(request, self._max_body_bytes))
            timeout_of(request)
        return await self._generate(request, asked)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        with self._flow.reading(_origin(request, "chat")):
            asked = openai.parse_chat(await read_json(request, self._max_body_bytes))
            timeout_of(request)
        return await self._generate(request, asked)

    async def models(self, _: Request) -> Response:
        """GET /v1/models: the one served model."""
        return json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._flow.model.check_name(request.path_params["model"])
        return json_response(self._model_card())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: `prompt` or `messages` to token ids."""
        body = await read_json(request, self._max_body_bytes)
        self._flow.model.check_name(openai.get_text(body, "model"))
        if "messages" in body:
            token_ids = await tokenize(self._flow.model, openai.messages(body))
        else:
            prompt = openai.get_text(body, "prompt")
            if prompt is None:
                raise InvalidRequest("prompt must be a string", field="prompt")
            special = openai.get_bool(body, "add_special_tokens", default=True)
            token_ids = await tokenize(self._flow.model, prompt, add_special_tokens=special)
        max_model_len = self._flow.limits.max_model_len
        return json_response({"tokens": token_ids, "count": len(token_ids), "max_model_len": max_model_len})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: `tokens` to text; special tokens are not shown."""
        body = await read_json(request, self._max_body_bytes)
        self._flow.model.check_name(openai.get_text(body, "model"))
        token_ids = openai.get_token_ids(body, "tokens")
        check_prompt(token_ids or [0], self._flow.limits, "tokens")
        return json_response({"prompt": self._flow.model.tokenizer.decode(token_ids)})

    async def version(self, _: Request) -> Response:
        """GET /version."""
        return json_response({"version": VERSION})

    async def _generate(self, request: Request, asked: openai.ApiRequest) -> Response:
        request_id = request_id_of(request, asked.request_id)
        answer = Answer(asked, request_id, self._flow.model.name, self._flow.model.tokenizer)
        tenant = self._api_keys.tenant(request.headers.getlist("authorization"))
        deltas = self._flow.stream(_generation(request, asked, request_id, tenant))
        if asked.stream:
            return EventStream(deltas, answer.events, b"data: [DONE]\n\n")  # without it: not complete
        joined = await until_disconnect(request.receive, _collect(deltas))
        return json_response(answer.whole(joined))

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._flow.model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "tandem",
            "root": str(self._flow.model.root),
            "parent": None,
            "max_model_len": self._flow.limits.max_model_len,
        }


def _generation(request: Request, asked: openai.ApiRequest, request_id: str, tenant: str) -> Generation:
    return Generation(
        request_id=request_id,
        prompt=asked.prompt,
        sampling=asked.sampling,
        timeout_s=timeout_of(request),
        model=asked.model,
        priority=asked.priority,
        default_max_tokens=asked.default_max_tokens,
        names=asked.names,
        cache_salt=asked.cache_salt,
        tenant=tenant,
        origin=_origin(request, "chat" if asked.kind == "chat" else "text_completion", stream=asked.stream),
    )


def _origin(request: Request, operation: str, *, stream: bool = False) -> Origin:
    return Origin(
        operation=operation,
        method=request.scope["path"],
        is_http=True,
        stream=stream,
        traceparent=request.headers.get("traceparent", "")[:256],
    )


async def _collect(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    async with aclosing(deltas):
        return join([delta async for delta in deltas])


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    return error_response(error)


async def _on_bug(_: Request, error: Exception) -> Response:
    return error_response(Internal("internal error"))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return json_response({"error": body}, error.status_code, dict(error.headers or {}))


def build_app(face: HttpFace, admin_routes: list[Route]) -> ASGIApp:
    """The ASGI application: public and admin routes, JSON errors."""
    app = Starlette(
        routes=[*face.routes(), *admin_routes],
        exception_handlers={
            TandemError: _on_error,
            HTTPException: _on_http_exception,
            Exception: _on_bug,
        },
    )
    app.router.redirect_slashes = False  # it would build a URL from what the client calls this host
    return app
