"""The operators by the one name that callers use, bound once at import.

Each name is bound to its plain torch reference, which is the specification.
"""

from kernels import attention, checksums, layers, paged_kv, sampling, verification

rms_norm = layers.rms_norm
add_rms_norm = layers.add_rms_norm
rope = layers.rope
silu_mul = layers.silu_mul
store_kv = paged_kv.store_kv
copy_blocks = paged_kv.copy_blocks
gather_blocks = paged_kv.gather_blocks
scatter_blocks = paged_kv.scatter_blocks
paged_attention = attention.paged_attention
checksum = checksums.checksum
gumbel_noise = sampling.gumbel_noise
sample = sampling.sample
apply_bit_mask = sampling.apply_bit_mask
count_accepted = verification.count_accepted
rejection_verify = verification.rejection_verify
