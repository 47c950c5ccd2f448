"""From a checkpoint directory to a module that runs, and the facts that two workers must share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.facts import KvGroupSpec, ModelFacts
from engine.layer_watch import LayerWatch, watch_layers
from engine.models.config import LlamaConfig, canonical_json, read_config
from engine.models.decoder import Decoder
from engine.models.llama import Llama
from engine.models.llama_weights import SourceTensor, WeightSpec, is_ignored, weight_table
from engine.models.rope import RopeTables, rope_tables
from engine.parallel.ranks import ONE_RANK, Ranks
from engine.parallel.shard import WHOLE, Shard, require_divisible
from engine.parallel.slices import cut
from engine.safetensors_dir import DTYPES, StoredTensor, TensorReader, content_hash, read_headers
from runtime.errors import CheckpointError, StartupError

Progress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all) after each weight."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A module with its weights on the device, and its facts."""

    module: Decoder
    facts: ModelFacts
    path: Path
    """Directory of the checkpoint."""
    ranks: Ranks = ONE_RANK
    """Who computes it; the draft is rank 0's alone."""
    watch: LayerWatch = field(default_factory=lambda: LayerWatch(0))
    """Tells of the module's layers."""
    draft: "LoadedModel | None" = None
    """The small model that speculates; its KV group is the last one of the facts."""


def load_model(
    path: Path, config: EngineConfig, *, ranks: Ranks = ONE_RANK, progress: Progress | None = None
) -> LoadedModel:
    """Load a checkpoint, and the draft that the config names; raises CheckpointError or StartupError."""
    shard, facts = load_checkpoint(path, config, shard=ranks.shard, progress=progress)
    module = ranks.lead_model(shard, facts.vocab_size)
    watch = watch_layers(shard, config.layer_stream_threshold)
    target = LoadedModel(module=module, facts=facts, path=path, ranks=ranks, watch=watch)
    return target if config.draft_model is None else _with_draft(target, config, progress)


def _with_draft(target: LoadedModel, config: EngineConfig, progress: Progress | None) -> LoadedModel:
    assert config.draft_model is not None
    module, facts = load_checkpoint(
        config.draft_model, replace(config, max_model_len=target.facts.max_model_len), progress=progress
    )
    if facts.vocab_size != target.facts.vocab_size:
        raise StartupError(
            f"--speculative draft:{config.draft_model}: its vocabulary has {facts.vocab_size} tokens, "
            f"the model's {target.facts.vocab_size}"
        )
    # The name tells two drafts of one shape apart when workers compare their groups.
    group = replace(facts.kv_groups[0], name=f"draft-{facts.model_hash[:16]}")
    draft = LoadedModel(module=module, facts=facts, path=config.draft_model)
    return replace(
        target, draft=draft, facts=replace(target.facts, kv_groups=(*target.facts.kv_groups, group))
    )


def load_checkpoint(
    path: Path, config: EngineConfig, *, shard: Shard = WHOLE, progress: Progress | None = None
) -> tuple[Llama, ModelFacts]:
    """Load one rank's shard of a Hugging Face checkpoint, and the whole's facts.

    Of the weights it reads no more than this rank needs. Raises CheckpointError or StartupError.
    """
    model_config, raw_config = read_config(path)
    max_model_len = _max_model_len(model_config, config)
    stored = _checked(read_headers(path), model_config)
    dtype = _dtype(config, stored["model.embed_tokens.weight"])
    require_divisible(model_config, shard.size)
    table = cut(weight_table(model_config), model_config, shard)
    weights = _load_weights(table, stored, dtype, config.device, progress)
    rope = _rope_tables(model_config, max_model_len, config.device)
    module = Llama(shard.config(model_config), weights, rope)
    model_hash = content_hash(canonical_json(raw_config), stored)
    return module, _facts(model_config, model_hash, max_model_len, dtype)


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
    total_bytes = sum(_num_bytes(source, stored) for spec in table for source in spec.sources)
    loaded_bytes = 0
    for spec in table:
        weight = torch.empty(spec.shape, dtype=dtype, device=device)
        parts = weight.split([source.part_shape[0] for source in spec.sources])
        for source, part in zip(spec.sources, parts, strict=True):
            part.copy_(reader.read(stored[source.name], source.indices))
            loaded_bytes += _num_bytes(source, stored)
        weights[spec.name] = weight
        if progress is not None:
            progress(loaded_bytes, total_bytes)
    return weights


def _num_bytes(source: SourceTensor, stored: Mapping[str, StoredTensor]) -> int:
    """Read of the source's tensor."""
    return math.prod(source.part_shape) * DTYPES[stored[source.name].dtype].itemsize
