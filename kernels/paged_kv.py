"""Reference operators between packed tensors and the blocks of a KV pool."""

from collections.abc import Sequence

import torch
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    """Write new keys and values to their slots of one layer.

    k, v: [num_rows, num_kv_heads, head_dim]; kv_layer: [2, num_blocks, block_size, num_kv_heads,
    head_dim]; slot_mapping: int64 [num_slots], num_slots <= num_rows: rows beyond it, and those with a
    negative slot, which come last, are padding.
    """
    num_tokens = int((slot_mapping >= 0).sum())
    slots = kv_layer.flatten(1, 2)
    slots[0].index_copy_(0, slot_mapping[:num_tokens], k[:num_tokens])
    slots[1].index_copy_(0, slot_mapping[:num_tokens], v[:num_tokens])


def copy_blocks(group: Tensor, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
    """Copy whole blocks inside a pool, in all layers; no target is a source or another's target.

    group: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim].
    """
    blocks = _movable(group)
    blocks.index_copy_(2, _index(target_ids, group), blocks.index_select(2, _index(source_ids, group)))


def gather_blocks(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> int:
    """Copy blocks of a range of layers to the start of a slab; returns the number of bytes.

    group: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]; slab: contiguous uint8
    [slab_bytes]. The payload is contiguous [num_layers, 2, len(block_ids), block_size, num_kv_heads,
    head_dim] in the group's dtype.
    """
    layers = _movable(group).narrow(0, first_layer, num_layers)
    payload = _payload(layers, len(block_ids), slab)
    torch.index_select(layers, 2, _index(block_ids, group), out=payload)
    return payload.nbytes


def scatter_blocks(
    group: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, slab: Tensor
) -> int:
    """Copy a payload of `gather_blocks` from the start of a slab into blocks; returns its bytes."""
    layers = _movable(group).narrow(0, first_layer, num_layers)
    payload = _payload(layers, len(block_ids), slab)
    layers.index_copy_(2, _index(block_ids, group), payload)
    return payload.nbytes


def _movable(group: Tensor) -> Tensor:
    """As a type that torch copies by index on every device: float8 is none on GPUs."""
    return group.view(torch.uint8) if group.element_size() == 1 else group


def _payload(layers: Tensor, num_blocks: int, slab: Tensor) -> Tensor:
    shape = (*layers.shape[:2], num_blocks, *layers.shape[3:])
    num_bytes = layers[:, :, 0].numel() * num_blocks * layers.element_size()
    assert num_bytes <= slab.numel(), f"payload of {num_bytes} bytes, slab of {slab.numel()}"
    return slab[:num_bytes].view(layers.dtype).view(shape)


def _index(block_ids: Sequence[int], group: Tensor) -> Tensor:
    return torch.as_tensor(block_ids, dtype=torch.int64, device=group.device)
