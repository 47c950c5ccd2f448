"""The operators by the one name that callers use, bound once at import.

`layers`, `attention`, `paged_kv`, `sampling` and their like are plain torch: the specification, and what runs
where there is nothing faster. `native` takes over fp32 on CPUs, `triton_*` what lies on a GPU.
"""

from kernels import (
    checksums,
    layers,
    native,
    paged_kv,
    rope_store,
    sampling,
    truncation,
    verification,
)
from kernels.by_device import by_device

rms_norm = by_device(layers.rms_norm, "triton_layers")
add_rms_norm = by_device(native.add_rms_norm, "triton_layers")
silu_mul = by_device(native.silu_mul, "triton_layers")
rope = native.rope
store_kv = native.store_kv
rope_store_kv = by_device(rope_store.rope_store_kv, "triton_rope")
copy_blocks = paged_kv.copy_blocks
gather_blocks = by_device(paged_kv.gather_blocks, "triton_blocks")
scatter_blocks = by_device(paged_kv.scatter_blocks, "triton_blocks")
gather_blocks_summed = by_device(native.gather_blocks_summed, "triton_blocks")
scatter_blocks_summed = by_device(native.scatter_blocks_summed, "triton_blocks")
paged_attention = by_device(native.paged_attention, "triton_paged_attention")
checksum = checksums.checksum
gumbel_noise = sampling.gumbel_noise
finite_best = sampling.finite_best
argmax = sampling.argmax
sample = by_device(sampling.sample, "triton_sampling")
draw = by_device(truncation.draw, "triton_sampling")
apply_bit_mask = sampling.apply_bit_mask
count_accepted = by_device(verification.count_accepted, "triton_verification")
rejection_verify = by_device(verification.rejection_verify, "triton_verification")
