/* The operators of kernels/layers.py, kernels/paged_kv.py and kernels/attention.py for fp32 on CPUs.
 *
 * Each row, and each request of paged_decode, is computed on its own, in one order of operations: its bits
 * do not depend on its batch. All arrays are dense in their last dimension; strides count floats.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

/* e**x to about 2 ulp (Cephes' expf), branch-free, so that loops over it become vector code. The two steps
 * of the reduction are explicit fmaf: reassociated they would lose their purpose. NaN stays NaN. */
static inline float exp_f32(float x) {
    const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = rintf(bounded * 1.44269504088896341f);
    const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, bounded));
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (int32_t)((uint32_t)((int32_t)n + 127) << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return x > 88.0f ? INFINITY : p * power;
}

/* Eight lanes, wherever they start. */
typedef float lanes __attribute__((vector_size(32), aligned(4)));
enum { LANES = 8, TILE = 8 };

static inline float total(lanes v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

static inline float dot(const float *restrict a, const float *restrict b, i64 n) {
    float sum = 0.0f;
    for (i64 i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* residual += x; out = rms_norm(residual) * weight. x, residual, out: [rows, hidden]. */
void add_rms_norm(const float *restrict x, float *restrict residual, const float *restrict weight,
                  float *restrict out, i64 rows, i64 hidden, float eps) {
    for (i64 row = 0; row < rows; row++, x += hidden, residual += hidden, out += hidden) {
        for (i64 i = 0; i < hidden; i++) residual[i] += x[i];
        const float scale = 1.0f / sqrtf(dot(residual, residual, hidden) / (float)hidden + eps);
        for (i64 i = 0; i < hidden; i++) out[i] = residual[i] * scale * weight[i];
    }
}

/* out = silu(first half) * second half. gate_up: [rows, 2 * width], out: [rows, width]. */
void silu_mul(const float *restrict gate_up, float *restrict out, i64 rows, i64 width) {
    for (i64 row = 0; row < rows; row++, gate_up += 2 * width, out += width) {
        const float *restrict up = gate_up + width;
        for (i64 i = 0; i < width; i++) out[i] = gate_up[i] / (1.0f + exp_f32(-gate_up[i])) * up[i];
    }
}

/* Rotates `heads` heads of each row in place, halves against each other.
 * x: [rows, heads, 2 * half], cosines, sines: [positions, half]. */
void rope(float *restrict x, i64 row_stride, const i64 *restrict positions, const float *restrict cosines,
          const float *restrict sines, i64 rows, i64 heads, i64 half) {
    for (i64 row = 0; row < rows; row++) {
        const float *restrict c = cosines + positions[row] * half;
        const float *restrict s = sines + positions[row] * half;
        for (i64 head = 0; head < heads; head++) {
            float *restrict first = x + row * row_stride + head * 2 * half;
            float *restrict second = first + half;
            for (i64 i = 0; i < half; i++) {
                const float a = first[i], b = second[i];
                first[i] = a * c[i] - b * s[i];
                second[i] = b * c[i] + a * s[i];
            }
        }
    }
}

/* Copies rows of `width` floats to their slots; a negative slot is none. */
void store_rows(const float *restrict rows, i64 row_stride, float *restrict slots,
                const i64 *restrict slot_mapping, i64 count, i64 width) {
    for (i64 row = 0; row < count; row++)
        if (slot_mapping[row] >= 0)
            memcpy(slots + slot_mapping[row] * width, rows + row * row_stride, width * sizeof(float));
}

/* Copies whole blocks of `layers` layers between a pool and a slab, and leaves the payload's checksum: the sum
 * of its words, each times the weight of its position (kernels/checksums.py).
 *
 * A run is one side of one block of one layer; strides and runs count 64-bit words. In the slab runs lie in
 * the order of layer, side, block. */
void copy_blocks(uint64_t *restrict pool, uint64_t *restrict slab, const i64 *restrict block_ids,
                 i64 layer_stride, i64 side_stride, i64 block_stride, i64 layers, i64 blocks, i64 run_words,
                 i64 to_slab, const uint64_t *restrict weights, uint64_t *restrict checksum) {
    uint64_t sum = 0;
    for (i64 side = 0; side < 2 * layers; side++) {
        uint64_t *restrict start = pool + side / 2 * layer_stride + side % 2 * side_stride;
        for (i64 b = 0; b < blocks; b++, slab += run_words, weights += run_words) {
            uint64_t *restrict block = start + block_ids[b] * block_stride;
            const uint64_t *restrict from = to_slab ? block : slab;
            uint64_t *restrict to = to_slab ? slab : block;
            for (i64 i = 0; i < run_words; i++) {
                const uint64_t word = from[i];
                to[i] = word;
                sum += word * weights[i];
            }
        }
    }
    *checksum = sum;
}

/* Softmax in place over scores[0..len). */
static void softmax(float *restrict scores, i64 len) {
    float largest = scores[0], sum = 0.0f;
    for (i64 i = 1; i < len; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (i64 i = 0; i < len; i++) {
        scores[i] = exp_f32(scores[i] - largest);
        sum += scores[i];
    }
    const float scale = 1.0f / sum;
    for (i64 i = 0; i < len; i++) scores[i] *= scale;
}

/* scores[t] = scale * query . keys[t], two keys at a time to hide the latency of their sums. */
static inline void score_keys(const float *restrict query, const float *restrict keys, i64 key_stride,
                              i64 tokens, i64 head_dim, float scale, float *restrict scores) {
    for (i64 t = 0; t < tokens; t += 2) {
        const float *restrict one = keys + t * key_stride;
        const float *restrict two = t + 1 < tokens ? one + key_stride : one;
        lanes sum_one = {0}, sum_two = {0};
        for (i64 i = 0; i < head_dim; i += LANES) {
            const lanes part = *(const lanes *)(query + i);
            sum_one += part * *(const lanes *)(one + i);
            sum_two += part * *(const lanes *)(two + i);
        }
        scores[t] = scale * total(sum_one);
        if (t + 1 < tokens) scores[t + 1] = scale * total(sum_two);
    }
}

/* sum[0..TILE * LANES) += weights . values, the sums in registers. */
static inline void add_values_tile(const float *restrict weights, const float *restrict values,
                                   i64 value_stride, i64 tokens, float *restrict sum) {
    lanes sums[TILE];
    for (int i = 0; i < TILE; i++) sums[i] = *(lanes *)(sum + i * LANES);
    for (i64 t = 0; t < tokens; t++)
        for (int i = 0; i < TILE; i++)
            sums[i] += weights[t] * *(const lanes *)(values + t * value_stride + i * LANES);
    for (int i = 0; i < TILE; i++) *(lanes *)(sum + i * LANES) = sums[i];
}

static inline void add_values(const float *restrict weights, const float *restrict values, i64 value_stride,
                              i64 tokens, i64 head_dim, float *restrict sum) {
    i64 i = 0;
    for (; i + TILE * LANES <= head_dim; i += TILE * LANES)
        add_values_tile(weights, values + i, value_stride, tokens, sum + i);
    for (; i < head_dim; i += LANES)
        for (i64 t = 0; t < tokens; t++)
            *(lanes *)(sum + i) += weights[t] * *(const lanes *)(values + t * value_stride + i);
}

/* One query token per request against the blocks of its context.
 *
 * q, out: [.., kv_heads * group, head_dim] by row, head_dim a multiple of LANES; keys, values: [blocks,
 * block_size, kv_heads, head_dim]; block_ids: the tables one after the other, that of request r starts at
 * first_block[r]; scratch: [kv_heads * group, scratch_stride >= longest context]. Each block is read once. */
void paged_decode(const float *restrict q, i64 q_stride, const float *restrict keys,
                  const float *restrict values, float *restrict out, const i64 *restrict rows,
                  const i64 *restrict context_lens, const i64 *restrict first_block,
                  const i64 *restrict block_ids, i64 requests, i64 block_size, i64 kv_heads, i64 group,
                  i64 head_dim, float scale, float *restrict scratch, i64 scratch_stride) {
    const i64 heads = kv_heads * group, token_stride = kv_heads * head_dim;
    for (i64 r = 0; r < requests; r++) {
        const float *restrict query = q + rows[r] * q_stride;
        float *restrict result = out + rows[r] * heads * head_dim;
        const i64 *restrict table = block_ids + first_block[r];
        const i64 len = context_lens[r];
        for (i64 start = 0; start < len; start += block_size) {
            const float *restrict block = keys + table[start / block_size] * block_size * token_stride;
            const i64 tokens = len - start < block_size ? len - start : block_size;
            for (i64 h = 0; h < heads; h++)
                score_keys(query + h * head_dim, block + h / group * head_dim, token_stride, tokens, head_dim,
                           scale, scratch + h * scratch_stride + start);
        }
        for (i64 h = 0; h < heads; h++) softmax(scratch + h * scratch_stride, len);
        memset(result, 0, heads * head_dim * sizeof(float));
        for (i64 start = 0; start < len; start += block_size) {
            const float *restrict block = values + table[start / block_size] * block_size * token_stride;
            const i64 tokens = len - start < block_size ? len - start : block_size;
            for (i64 h = 0; h < heads; h++)
                add_values(scratch + h * scratch_stride + start, block + h / group * head_dim, token_stride,
                           tokens, head_dim, result + h * head_dim);
        }
    }
}
