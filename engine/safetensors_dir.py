"""The safetensors files of a checkpoint directory: what they hold, checked before a byte of data is read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.models.json_reader import JsonReader
from runtime.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HASHED_BYTES = 4096
"""Of each tensor: enough to tell fine-tunes apart, few enough to hash 100 GB in no time."""
MAX_HEADER_BYTES = 100_000_000

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Data types of weights that we read, by their safetensors names."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its data, in bytes from the start of the file."""
    num_bytes: int


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name; raises CheckpointError for whatever does not fit together."""
    if (path / INDEX_FILE).is_file():
        return _read_sharded(path)
    if (path / SINGLE_FILE).is_file():
        return _read_header(path / SINGLE_FILE)
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise CheckpointError(
            str(path),
            None,
            "only pickled weights found, and loading those can run code: convert them with transformers, "
            "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)",
        )
    raise CheckpointError(str(path), None, f"expected {SINGLE_FILE} or {INDEX_FILE}")


def _read_sharded(path: Path) -> dict[str, StoredTensor]:
    index = JsonReader.open(path / INDEX_FILE)
    weight_map = index.nested("weight_map")
    if weight_map is None:
        raise index.error("weight_map", "missing")
    shards = {str(shard): _read_shard(path, str(shard), index) for shard in set(weight_map.values.values())}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.values.items():
        if name not in shards[shard]:
            raise CheckpointError(str(path / shard), name, f"missing, {INDEX_FILE} says it is here")
        tensors[name] = shards[shard][name]
    return tensors


def _read_shard(path: Path, shard: str, index: JsonReader) -> dict[str, StoredTensor]:
    if Path(shard).name != shard:
        raise index.error("weight_map", f"expected file names of this directory, got {shard!r}")
    if not (path / shard).is_file():
        raise index.error("weight_map", f"shard {shard} is missing")
    return _read_header(path / shard)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(str(file), None, f"truncated, {size} bytes are less than its header")
        raw = stream.read(header_bytes)
    try:
        entries = json.loads(raw)
        tensors = {
            name: _stored(file, name, entry, 8 + header_bytes)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(file), None, f"not a safetensors header ({error})") from error
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=size)
    if end > size:
        raise CheckpointError(str(file), None, f"truncated, expected {end} bytes, got {size}")
    return tensors


def _stored(file: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = map(int, entry["data_offsets"])
    return StoredTensor(
        file=file,
        name=name,
        dtype=str(entry["dtype"]),
        shape=tuple(map(int, entry["shape"])),
        start=data_start + start,
        num_bytes=end - start,
    )


def content_hash(canonical_config: str, tensors: Mapping[str, StoredTensor]) -> str:
    """SHA-256, as hex, over the canonical config and name, type, shape and first 4 KiB of each tensor.

    A fingerprint that tells checkpoints apart, not a proof that all their bytes are equal.
    """
    digest = hashlib.sha256(canonical_config.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            digest.update(stream.read(min(HASHED_BYTES, tensor.num_bytes)))
    return digest.hexdigest()


class TensorReader:
    """Reads tensors of open shards; each shard is mapped once."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def read(self, tensor: StoredTensor, part: tuple[slice, ...] = ()) -> Tensor:
        """The tensor on the CPU, in the type of the file; with `part`, those indices of it alone."""
        try:
            if tensor.file not in self._open:
                self._open[tensor.file] = safe_open(tensor.file, framework="pt")
            file = self._open[tensor.file]
            data: Tensor = file.get_slice(tensor.name)[part] if part else file.get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(tensor.file), tensor.name, f"not readable ({error})") from error
        return data
