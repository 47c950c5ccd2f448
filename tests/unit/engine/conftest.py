import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loader import load_model
from engine.models.config import read_config
from engine.models.llama_weights import weight_table
from engine.request import Request, SamplingParams

torch.set_num_threads(1)

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def random_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the config in `path` asks for, the same each time."""
    generator = torch.Generator().manual_seed(0)
    config, _ = read_config(path)
    return {
        source.name: torch.randn(source.shape, generator=generator) * 0.3
        for spec in weight_table(config)
        for source in spec.sources
    }


def write_checkpoint(path: Path, **overrides) -> Path:
    """A random tiny checkpoint; keyword arguments change config.json."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**TINY, **overrides}))
    save_file(random_tensors(path), path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_checkpoint(tmp_path):
    return lambda **overrides: write_checkpoint(tmp_path / "checkpoint", **overrides)


@pytest.fixture(scope="session")
def tiny_model(checkpoint):
    return load_model(checkpoint, EngineConfig())


class CheckedEngine(Engine):
    """Checks its invariants after every operation."""

    def step(self):
        result = super().step()
        self.check()
        return result

    def abort(self, key):
        found = super().abort(key)
        self.check()
        return found

    def commit(self, request, first_token, logprob):
        output = super().commit(request, first_token, logprob)
        self.check()
        return output

    def reserve(self, request):
        reserved = super().reserve(request)
        self.check()
        return reserved

    def run(self, *requests):
        """Submit, run to the end, return the output tokens of each."""
        outputs = self.run_beside(*requests)
        assert self.load().blocks_used == 0
        return outputs

    def run_beside(self, *requests):
        """The same, beside what is reserved or held."""
        for request in requests:
            self.submit(request)
        while self.has_work():
            self.step()
        return [request.output_token_ids for request in requests]


@pytest.fixture(scope="session")
def draft_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The first layer of the tiny checkpoint alone: it often agrees with both layers, and often not."""
    path = tmp_path_factory.mktemp("draft")
    (path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 1}))
    tensors = random_tensors(checkpoint)
    save_file({name: each for name, each in tensors.items() if ".1." not in name}, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def drafted_model(checkpoint, draft_checkpoint):
    return load_model(checkpoint, EngineConfig(speculative="draft", draft_model=draft_checkpoint))


@pytest.fixture
def make_engine(tiny_model, drafted_model, draft_checkpoint):
    def make(**overrides):
        settings = {"num_blocks": 64, "block_size": 4, **overrides}
        if settings.get("speculative") == "draft":
            settings["draft_model"] = draft_checkpoint
        model = drafted_model if settings.get("speculative") == "draft" else tiny_model
        engine = CheckedEngine(EngineConfig(**settings), model)
        for group in engine.kv_cache.groups:
            group.fill_(torch.nan)
        return engine

    return make


@pytest.fixture
def make_request():
    def make(prompt_len, *, key=None, outputs=(), prefill_only=False, choice=0, **sampling):
        defaults = {"max_tokens": 12, "temperature": 0.9, "seed": prompt_len, "ignore_eos": True}
        generator = torch.Generator().manual_seed(prompt_len)
        return Request(
            key=prompt_len if key is None else key,
            prompt_token_ids=torch.randint(3, 61, (prompt_len,), generator=generator).tolist(),
            output_token_ids=list(outputs),
            sampling=SamplingParams(**{**defaults, **sampling}),
            prefill_only=prefill_only,
            choice=choice,
        )

    return make


@pytest.fixture
def gpu():
    """torch's name of a GPU; goes with the marker of that name."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda:0"
