"""From a checkpoint directory to a module that runs, and the facts that two workers must share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.models.config import LlamaConfig, canonical_json, read_config
from engine.models.llama import Llama
from engine.models.llama_weights import WeightSpec, is_ignored, weight_table
from engine.models.rope import RopeTables, rope_tables
from engine.safetensors_dir import DTYPES, StoredTensor, TensorReader, content_hash, read_headers
from runtime.errors import CheckpointError, StartupError

Progress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all) after each weight."""


@dataclass(frozen=True, kw_only=True)
class KvGroupSpec:
    """Layers whose KV has one shape."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values in all layers."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What peers compare before KV moves between them, and what a gateway must know."""

    model_hash: str
    """Hex; see `engine.safetensors_dir.content_hash` for what it covers."""
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    rope: str
    """Canonical JSON of everything that the rotary tables are made of."""
    kv_groups: tuple[KvGroupSpec, ...]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A module with its weights on the device, and its facts."""

    module: Llama
    facts: ModelFacts
    path: Path
    """Directory of the checkpoint."""
    draft: "LoadedModel | None" = None
    """The small model that speculates; its KV group is the last one of the facts."""


def load_model(path: Path, config: EngineConfig, *, progress: Progress | None = None) -> LoadedModel:
    """Load a checkpoint, and the draft that the config names; raises CheckpointError or StartupError."""
    target = load_checkpoint(path, config, progress=progress)
    if config.draft_model is None:
        return target
    draft = load_checkpoint(
        config.draft_model, replace(config, max_model_len=target.facts.max_model_len), progress=progress
    )
    if draft.facts.vocab_size != target.facts.vocab_size:
        raise StartupError(
            f"--speculative draft:{config.draft_model}: its vocabulary has {draft.facts.vocab_size} tokens, "
            f"the model's {target.facts.vocab_size}"
        )
    # The name tells two drafts of one shape apart when workers compare their groups.
    group = replace(draft.facts.kv_groups[0], name=f"draft-{draft.facts.model_hash[:16]}")
    return replace(
        target, draft=draft, facts=replace(target.facts, kv_groups=(*target.facts.kv_groups, group))
    )


def load_checkpoint(path: Path, config: EngineConfig, *, progress: Progress | None = None) -> LoadedModel:
    """Load a Hugging Face checkpoint of the Llama family; raises CheckpointError or StartupError."""
    model_config, raw_config = read_config(path)
    max_model_len = _max_model_len(model_config, config)
    stored = _checked(read_headers(path), model_config)
    dtype = _dtype(config, stored["model.embed_tokens.weight"])
    weights = _load_weights(weight_table(model_config), stored, dtype, config.device, progress)
    module = Llama(model_config, weights, _rope_tables(model_config, max_model_len, config.device))
    model_hash = content_hash(canonical_json(raw_config), stored)
    facts = _facts(model_config, model_hash, max_model_len, dtype)
    return LoadedModel(module=module, facts=facts, path=path)


def _facts(config: LlamaConfig, model_hash: str, max_model_len: int, dtype: torch.dtype) -> ModelFacts:
    dtype_name = str(dtype).removeprefix("torch.")
    group = KvGroupSpec(
        name="target",
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype_name,
    )
    return ModelFacts(
        model_hash=model_hash,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=config.eos_token_ids,
        dtype=dtype_name,
        rope=canonical_json(
            config.rope.facts(config.head_dim, config.max_position_embeddings, max_model_len)
        ),
        kv_groups=(group,),
    )


def _max_model_len(model: LlamaConfig, config: EngineConfig) -> int:
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_supported_len:
        raise StartupError(
            f"--max-model-len {config.max_model_len}: the checkpoint is made for {model.max_supported_len}"
        )
    return config.max_model_len


def _dtype(config: EngineConfig, embedding: StoredTensor) -> torch.dtype:
    """Of weights and KV. A CPU gets float32, where results are exact by definition."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    return torch.float32 if torch.device(config.device).type == "cpu" else DTYPES[embedding.dtype]


def _rope_tables(config: LlamaConfig, max_model_len: int, device: str) -> RopeTables:
    tables = rope_tables(
        config.rope,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        max_model_len=max_model_len,
    )
    return RopeTables(cos=tables.cos.to(device), sin=tables.sin.to(device))


def _checked(stored: Mapping[str, StoredTensor], config: LlamaConfig) -> dict[str, StoredTensor]:
    """The tensors that the module needs, all there and in shape; any other must be harmless."""
    needed = {source.name: source for spec in weight_table(config) for source in spec.sources}
    any_file = str(next(iter(stored.values())).file) if stored else "checkpoint"
    for name, source in needed.items():
        if name not in stored:
            raise CheckpointError(any_file, name, f"missing, expected a tensor of shape {list(source.shape)}")
        _check_tensor(stored[name], source.shape)
    for name, tensor in stored.items():
        if name not in needed and not is_ignored(name, config):
            raise CheckpointError(
                str(tensor.file), name, "unexpected tensor, config.json has no place for it"
            )
    return {name: stored[name] for name in needed}


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            str(tensor.file), tensor.name, f"expected shape {list(shape)}, got {list(tensor.shape)}"
        )
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            str(tensor.file), tensor.name, f"expected type {' or '.join(DTYPES)}, got {tensor.dtype}"
        )


def _load_weights(
    table: list[WeightSpec],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: str,
    progress: Progress | None,
) -> dict[str, Tensor]:
    reader = TensorReader()
    weights: dict[str, Tensor] = {}
    total_bytes = sum(tensor.num_bytes for tensor in stored.values())
    loaded_bytes = 0
    for spec in table:
        weight = torch.empty(spec.shape, dtype=dtype, device=device)
        parts = weight.split([source.shape[0] for source in spec.sources])
        for source, part in zip(spec.sources, parts, strict=True):
            part.copy_(reader.read(stored[source.name]))
            loaded_bytes += stored[source.name].num_bytes
        weights[spec.name] = weight
        if progress is not None:
            progress(loaded_bytes, total_bytes)
    return weights
