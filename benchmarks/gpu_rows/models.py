"""Models with random weights, made on the device: no checkpoint is read or written but for `save`."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.cpu_load import write_tokenizer
from benchmarks.gpu_rows.bench import Bench
from benchmarks.gpu_rows.floors import Shape
from engine.facts import KvGroupSpec, ModelFacts
from engine.loader import LoadedModel
from engine.models.config import LlamaConfig, read_config
from engine.models.llama import Llama
from engine.models.llama_weights import weight_table
from engine.models.rope import RopeTables, rope_tables

STANDARD_DEVIATION = 0.02
"""Of the weights, as at the start of a training."""


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """A model, and its tensors under the names of a Hugging Face checkpoint; both share their memory."""

    loaded: LoadedModel
    tensors: dict[str, Tensor]


def random_model(bench: Bench, shape: Shape, max_model_len: int) -> RandomModel:
    """The same weights each time on one kind of device."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config(max_model_len)))
        config, _ = read_config(Path(folder))
    weights, tensors = _weights(bench, config)
    tables = rope_tables(
        config.rope, head_dim=config.head_dim, max_position_embeddings=max_model_len,
        max_model_len=max_model_len,
    )  # fmt: skip
    rope = RopeTables(cos=tables.cos.to(bench.device), sin=tables.sin.to(bench.device))
    loaded = LoadedModel(
        module=Llama(config, weights, rope), facts=_facts(bench, config, max_model_len), path=Path("random")
    )
    return RandomModel(loaded=loaded, tensors=tensors)


def _weights(bench: Bench, config: LlamaConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator(bench.device).manual_seed(0)
    weights: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for spec in weight_table(config):
        weight = torch.ones(spec.shape, dtype=bench.dtype, device=bench.device)
        if weight.ndim > 1:
            weight.normal_(0, STANDARD_DEVIATION, generator=generator)
        parts = weight.split([source.part_shape[0] for source in spec.sources])
        tensors |= {source.name: part for source, part in zip(spec.sources, parts, strict=True)}
        weights[spec.name] = weight
    return weights, tensors


def _facts(bench: Bench, config: LlamaConfig, max_model_len: int) -> ModelFacts:
    dtype = str(bench.dtype).removeprefix("torch.")
    group = KvGroupSpec(
        name="target", num_layers=config.num_layers, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, dtype=dtype,
    )  # fmt: skip
    return ModelFacts(
        model_hash="random", vocab_size=config.vocab_size, max_model_len=max_model_len,
        eos_token_ids=config.eos_token_ids, dtype=dtype, rope="", kv_groups=(group,),
    )  # fmt: skip


def save(bench: Bench, shape: Shape, max_model_len: int, path: Path) -> None:
    """The same model as a Hugging Face directory, with a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape.config(max_model_len), indent=1))
    tensors = random_model(bench, shape, max_model_len).tensors
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_host, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path, shape.vocab)
