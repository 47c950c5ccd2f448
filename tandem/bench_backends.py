"""How a benchmark's requests travel: our gRPC service, or any OpenAI-compatible HTTP server's completions."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from runtime.errors import Internal, NotFound, Overloaded, TandemError, Unauthenticated, Unavailable
from tandem.bench import Workload
from tandem.client import Client
from tandem.messages import Model


class GrpcBackend:
    """Generate on one channel."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def model(self) -> Model:
        """The served model."""
        return (await self._client.models())[0]

    async def stream(self, prompt: list[int], workload: Workload) -> AsyncIterator[int]:
        """See tandem.bench.Backend."""
        deltas = self._client.generate(
            prompt,
            max_tokens=workload.output_len,
            temperature=workload.temperature,
            seed=workload.seed,
            ignore_eos=True,
        )
        async for delta in deltas:
            yield len(delta.token_ids)


class HttpBackend:
    """POST /v1/completions with `stream`; tokens are counted by the server's `token_ids`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._model: Model | None = None

    async def model(self) -> Model:
        """The first model of /v1/models."""
        try:
            response = await self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise Unavailable(f"cannot reach {self._http.base_url} ({error})") from error
        _raise_for_error(response.status_code, response.content)
        card = response.json()["data"][0]
        self._model = Model(
            id=card["id"], root=card.get("root", ""), max_model_len=card.get("max_model_len", 0)
        )
        return self._model

    async def stream(self, prompt: list[int], workload: Workload) -> AsyncIterator[int]:
        """See tandem.bench.Backend."""
        body = {
            "model": (self._model or await self.model()).id,
            "prompt": prompt,
            "max_tokens": workload.output_len,
            "temperature": workload.temperature,
            "seed": workload.seed,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    _raise_for_error(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    event = _event(line)
                    if event is not None:
                        yield sum(len(choice.get("token_ids") or ()) for choice in event["choices"])
        except httpx.HTTPError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error


def vocab_size(model: Model) -> int | None:
    """From the checkpoint's config.json, if the server's directory is on this machine."""
    path = Path(model.root) / "config.json"
    if not model.root or not path.is_file():
        return None
    size: int | None = json.loads(path.read_text()).get("vocab_size")
    return size


def _event(line: str) -> dict[str, Any] | None:
    """The JSON of one server-sent event; None for [DONE], comments and blank lines."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise Internal(event["error"]["message"])
    return event


def _raise_for_error(status: int, body: bytes) -> None:
    if status == 200:
        return
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace")
    by_status: dict[int, type[TandemError]] = {
        401: Unauthenticated,
        404: NotFound,
        429: Overloaded,
        503: Unavailable,
    }
    raise by_status.get(status, Internal)(f"HTTP {status}: {message}")
