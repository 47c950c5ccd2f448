"""The operators by the one name that callers use, bound once at import.

`layers`, `attention`, `paged_kv` and `sampling` are plain torch: the specification, and what runs where there
is nothing faster. `native` takes over fp32 on CPUs.
"""

from kernels import checksums, layers, native, paged_kv, sampling, verification

rms_norm = layers.rms_norm
add_rms_norm = native.add_rms_norm
rope = native.rope
silu_mul = native.silu_mul
store_kv = native.store_kv
copy_blocks = paged_kv.copy_blocks
gather_blocks = paged_kv.gather_blocks
scatter_blocks = paged_kv.scatter_blocks
paged_attention = native.paged_attention
checksum = checksums.checksum
gumbel_noise = sampling.gumbel_noise
sample = sampling.sample
apply_bit_mask = sampling.apply_bit_mask
count_accepted = verification.count_accepted
rejection_verify = verification.rejection_verify
