"""transformers' continuous batching beside our engine: one process, one model's weights, the same prompts."""

import dataclasses
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu_rows.bench import Bench, RowFunctions
from benchmarks.gpu_rows.catalogue import PEERS
from benchmarks.gpu_rows.models import random_model
from benchmarks.gpu_rows.row import Measured
from benchmarks.gpu_rows.serving import engine_config, make_engine, make_request

SHAPE, BATCH, PROMPT_LEN, OUTPUT_LEN = "8B", 32, 1024, 128
PAGE_SIZE = 256

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "as it comes": {},
    "graphs and async": {
        "use_cuda_graph": True, "use_async_batching": True, "default_compile_level": 1,
    },
}  # fmt: skip
"""Of ContinuousBatchingConfig, beside those of `_batching`."""


def rows(bench: Bench) -> RowFunctions:
    """See catalogue.peers."""
    arms = Arms(bench)
    return {
        f"8B, batch 32: beside transformers' continuous batching, {name}": lambda name=name: arms.row(name)
        for name in PEERS
    }


class Arms:
    """Both engines; ours runs once, and each setting of the peer is held against it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._prompt_len = bench.pick(PROMPT_LEN, 24)
        self._output_len = bench.pick(OUTPUT_LEN, 4)
        self._batch = bench.pick(BATCH, 2)
        self._shape = bench.shape(SHAPE)
        self._max_model_len = self._prompt_len + self._output_len + 16
        self._model = random_model(bench, self._shape, self._max_model_len)
        self._prompts = [
            make_request(self._shape.vocab, self._prompt_len, 1).prompt_token_ids for _ in range(self._batch)
        ]
        self._ours: float | None = None
        self._peer: Any = None

    def row(self, name: str) -> Measured:
        """Output tokens per second from the first submission to the last token, prefill included."""
        theirs, details = self._their_rate(SETTINGS[name])
        note = ", ".join(f"{flag}={value}" for flag, value in details["flags"].items())
        if self._ours is None:
            self._ours = self._our_rate()
        return Measured(value=self._ours, floor=theirs, details=details, note=note)

    def _our_rate(self) -> float:
        config = engine_config(
            self._bench, max_model_len=self._max_model_len, batches=(self._batch,),
            tokens=self._batch * self._max_model_len,
        )  # fmt: skip
        engine = make_engine(self._model, dataclasses.replace(config, prefix_cache=False))
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            for prompt in self._prompts:
                request = make_request(self._shape.vocab, 1, self._output_len)
                request.prompt_token_ids = list(prompt)
                engine.submit(request)
            num_tokens = 0
            while engine.has_work():
                num_tokens += sum(len(output.token_ids) for output in engine.step().outputs)
            seconds = time.perf_counter() - start
        if num_tokens != self._batch * self._output_len:
            raise RuntimeError(f"our engine gave {num_tokens} tokens")
        return num_tokens / seconds

    def _their_rate(self, settings: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        if self._peer is None:
            self._peer = self._their_model()
        batching = _batching(self._batch * self._max_model_len, settings)
        seconds = [self._their_seconds(batching) for _ in range(2)][-1]
        details = {
            "transformers": metadata.version("transformers"),
            "attention": self._peer.config._attn_implementation,
            "flags": {"attn_implementation": "sdpa", **_flags(batching)},
            "weights": "the same, random", "prompt": self._prompt_len, "output": self._output_len,
        }  # fmt: skip
        return self._batch * self._output_len / seconds, details

    def _their_model(self) -> Any:
        """A model of theirs over the memory of our weights."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**self._shape.config(self._max_model_len))
        default = torch.get_default_dtype()
        torch.set_default_dtype(self._bench.dtype)
        try:
            with torch.device(self._bench.device):
                model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        finally:
            torch.set_default_dtype(default)
        for name, parameter in model.named_parameters():
            parameter.data = self._model.tensors[name]
        return model.eval()

    def _their_seconds(self, batching: Any) -> float:
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=self._output_len
        )
        with self._peer.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching
        ) as manager:
            start = time.perf_counter()
            for prompt in self._prompts:
                manager.add_request(list(prompt), max_new_tokens=self._output_len)
            num_tokens = _collect(manager, len(self._prompts))
            seconds = time.perf_counter() - start
        if num_tokens != self._batch * self._output_len:
            raise RuntimeError(f"transformers gave {num_tokens} tokens")
        return seconds


def _collect(manager: Any, num_requests: int) -> int:
    """Number of tokens once every request is finished."""
    num_tokens = 0
    while num_requests:
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("transformers' batching thread died")
        elif output.is_finished():
            num_requests -= 1
            num_tokens += len(output.generated_tokens)
    return num_tokens


def _batching(num_tokens: int, settings: Mapping[str, Any]) -> Any:
    """Room for all requests at once and for 8k tokens in a step; names differ between releases."""
    from transformers.generation import ContinuousBatchingConfig

    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page = "page_size" if "page_size" in known else "block_size"
    wanted = {page: PAGE_SIZE, "num_blocks": 2 * num_tokens // PAGE_SIZE + 8, "max_batch_tokens": 8192}
    unknown = settings.keys() - known
    if unknown:
        raise RuntimeError(f"this transformers has no {', '.join(sorted(unknown))}")
    return ContinuousBatchingConfig(**wanted, **settings)


def _flags(batching: Any) -> dict[str, Any]:
    """What differs from the defaults."""
    return {
        field.name: getattr(batching, field.name)
        for field in dataclasses.fields(batching)
        if getattr(batching, field.name) != field.default
    }
