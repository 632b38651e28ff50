"""The source of the CPU's own kernels, in C++ for processors with AVX-512 and its bfloat16 products.

One token per row through one layer (`kimi_attention`, `kimi_route` and `kimi_experts`, or `kimi_dense`), attention of many
tokens (`kimi_prefill`), the output layer (`kimi_linear`). `native_kimi_k26` compiles it and knows its functions.
"""

SOURCE = r"""
#include <immintrin.h>
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef int64_t i64;
typedef uint16_t bf16;  // the upper half of a float

// ---------------------------------------------------------------------------------------- numbers and vectors

static inline float wide(bf16 x) { uint32_t b = (uint32_t)x << 16; float f; memcpy(&f, &b, 4); return f; }
static inline __m512 wide16(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}
static inline bf16 narrow(float x) {  // to nearest, ties to even, as PyTorch rounds
    uint32_t b; memcpy(&b, &x, 4);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bf16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline float rounded(float x) { return wide(narrow(x)); }
static inline __m256i narrow16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __m512bh load32(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
static inline __m512bh load32(const bf16* x, i64 left) {
    return (__m512bh)_mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, x);
}

// e^x: 2^n times a polynomial of the rest (Cephes expf); 0 far below.
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// A piece of `count` things for this thread, in whole units.
struct Share {
    i64 begin, end;
    Share(i64 count, i64 unit = 1) {
        i64 threads = omp_get_num_threads(), units = (count + unit - 1) / unit, me = omp_get_thread_num();
        begin = units * me / threads * unit;
        end = units * (me + 1) / threads * unit;
        if (end > count) end = count;
        if (begin > end) begin = end;
    }
};

// Memory that stays between calls, cut into pieces.
struct Arena {
    std::vector<char> bytes;
    size_t used = 0;
    template <class T> T* take(i64 count) {
        size_t at = used;
        used += (count * sizeof(T) + 127) / 64 * 64;
        return used <= bytes.size() ? (T*)(((uintptr_t)bytes.data() + 63) / 64 * 64 + at) : nullptr;
    }
    // Runs `plan` twice where there is too little room: the first time it only counts.
    template <class F> void layout(F plan) {
        used = 0; plan();
        if (used + 64 > bytes.size()) { bytes.resize(used + used / 2 + 4096); used = 0; plan(); }
    }
};
static thread_local Arena arena;

enum { MAX_THREADS = 1024 };

// ---------------------------------------------------------------------------------------- products

enum { ROWS = 8 };  // of x, multiplied at once

// The sums of up to sixteen vectors, in order: they are added while they are transposed.
template <int N> static inline __m512 sums_of(const __m512* v) {
    __m512 two[8], four[4], eight[2];
    const __m512 zero = _mm512_setzero_ps();
    for (int i = 0; i < 8; i++) {
        const __m512 a = 2 * i < N ? v[2 * i] : zero, b = 2 * i + 1 < N ? v[2 * i + 1] : zero;
        two[i] = 2 * i < N ? _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)) : zero;
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = 4 * i < N ? _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b))) : zero;
    }
    for (int i = 0; i < 2; i++) {
        const __m512 a = four[2 * i], b = four[2 * i + 1];
        eight[i] = 8 * i < N ? _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)) : zero;
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

template <int O, int R> static inline void settle(const __m512 (&sum)[O][R], float (*y)[ROWS]) {
    static_assert(O * R <= 16, "one vector of sums");
    float all[16];
    _mm512_storeu_ps(all, sums_of<O * R>(&sum[0][0]));
    for (int o = 0; o < O; o++) for (int r = 0; r < R; r++) y[o][r] = all[o * R + r];
}

// sum[o][r] += w[o] . x[r] for `O` neighbouring rows of w, lane by lane.
template <int O, int R> static inline void accumulate(const bf16* w, i64 stride, const bf16* const* x, i64 k, __m512 (&sum)[O][R]) {
    i64 i = 0;
    for (; i + 32 <= k; i += 32) {
        __m512bh given[R];
        for (int r = 0; r < R; r++) given[r] = load32(x[r] + i);
        for (int o = 0; o < O; o++) {
            __m512bh weight = load32(w + o * stride + i);
            for (int r = 0; r < R; r++) sum[o][r] = _mm512_dpbf16_ps(sum[o][r], weight, given[r]);
        }
    }
    if (i < k)
        for (int o = 0; o < O; o++)
            for (int r = 0; r < R; r++)
                sum[o][r] = _mm512_dpbf16_ps(sum[o][r], load32(w + o * stride + i, k - i), load32(x[r] + i, k - i));
}

template <int O, int R> static inline void dots(const bf16* w, i64 stride, const bf16* const* x, i64 k, float (*y)[ROWS]) {
    __m512 sum[O][R];
    for (int o = 0; o < O; o++) for (int r = 0; r < R; r++) sum[o][r] = _mm512_setzero_ps();
    accumulate<O, R>(w, stride, x, k, sum);
    settle<O, R>(sum, y);
}

// A weight: bfloat16, or INT4 words with a scale for each `group` inputs.
struct Matrix {
    const void* values;
    const bf16* scales;  // null: `values` are bfloat16
};

enum { AHEAD = 6144 };  // bytes: words are asked for so long before they are needed, as memory is slower than the unpacking

// The same for INT4 words: a group's sixteen possible weights stand in a table, from which its values pick.
template <int O, int R>
static inline void dots4(const uint8_t* w, const bf16* scales, const bf16* const* x, i64 k, i64 group, float (*y)[ROWS]) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512 sum[O][R];
    for (int o = 0; o < O; o++) for (int r = 0; r < R; r++) sum[o][r] = _mm512_setzero_ps();
    const i64 groups = k / group;
    for (i64 first = 0; first < groups; first += 16) {  // sixteen scales at once become float
        const i64 some = groups - first < 16 ? groups - first : 16;
        float scale[O][16];
        for (int o = 0; o < O; o++) {
            const bf16* at = scales + o * groups + first;
            _mm_prefetch((const char*)at + AHEAD / 8, _MM_HINT_T0);
            __m256i sixteen = _mm256_maskz_loadu_epi16((1u << some) - 1, at);
            _mm512_storeu_ps(scale[o], _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16)));
        }
        for (i64 g = 0; g < some; g++) {
            __m512i table[O];
            for (int o = 0; o < O; o++)
                table[o] = _mm512_broadcast_i64x4(narrow16(_mm512_mul_ps(values, _mm512_set1_ps(scale[o][g]))));
            const i64 begin = (first + g) * group;
            for (i64 i = begin; i < begin + group; i += 32) {
                __m512bh given[R];
                for (int r = 0; r < R; r++) given[r] = load32(x[r] + i);
                for (int o = 0; o < O; o++) {
                    const uint8_t* at = w + (o * k + i) / 2;
                    if (i % 128 == 0) _mm_prefetch(at + AHEAD, _MM_HINT_T0);
                    __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
                    pair = _mm512_or_si512(pair, _mm512_slli_epi32(pair, 12));  // the low five bits of each half pick
                    __m512bh weight = (__m512bh)_mm512_permutexvar_epi16(pair, table[o]);
                    for (int r = 0; r < R; r++) sum[o][r] = _mm512_dpbf16_ps(sum[o][r], weight, given[r]);
                }
            }
        }
    }
    settle<O, R>(sum, y);
}

template <int R> static void product(Matrix m, i64 from, i64 to, const bf16* const* x, i64 k, i64 group, float (*y)[ROWS]) {
    constexpr int O = R <= 4 ? 4 : 2;
    i64 o = from;
    if (m.scales) {
        const uint8_t* w = (const uint8_t*)m.values;
        for (; o + O <= to; o += O) dots4<O, R>(w + o * k / 2, m.scales + o * (k / group), x, k, group, y + o - from);
        for (; o < to; o++) dots4<1, R>(w + o * k / 2, m.scales + o * (k / group), x, k, group, y + o - from);
    } else {
        const bf16* w = (const bf16*)m.values;
        for (; o + O <= to; o += O) dots<O, R>(w + o * k, k, x, k, y + o - from);
        for (; o < to; o++) dots<1, R>(w + o * k, k, x, k, y + o - from);
    }
}

// y[o - from][r] = m[o] . x[r] for outputs `from` to `to` and up to eight rows.
static void product(Matrix m, i64 from, i64 to, const bf16* const* x, int rows, i64 k, i64 group, float (*y)[ROWS]) {
    switch (rows) {
        case 1: return product<1>(m, from, to, x, k, group, y);
        case 2: return product<2>(m, from, to, x, k, group, y);
        case 3: return product<3>(m, from, to, x, k, group, y);
        case 4: return product<4>(m, from, to, x, k, group, y);
        case 5: return product<5>(m, from, to, x, k, group, y);
        case 6: return product<6>(m, from, to, x, k, group, y);
        case 7: return product<7>(m, from, to, x, k, group, y);
        default: return product<8>(m, from, to, x, k, group, y);
    }
}

enum { BLOCK = 16 };  // outputs computed together

// The bfloat16 weights that one row of INT4 words stands for.
static void dequantize(const uint8_t* w, const bf16* scales, i64 k, i64 group, bf16* out) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    for (i64 g = 0; g < k / group; g++) {
        __m512i table = _mm512_broadcast_i64x4(narrow16(_mm512_mul_ps(values, _mm512_set1_ps(wide(scales[g])))));
        for (i64 i = g * group; i < (g + 1) * group; i += 32) {
            __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w + i / 2)));
            pair = _mm512_or_si512(pair, _mm512_slli_epi32(pair, 12));
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(pair, table));
        }
    }
}

// `sink(o, r, m[o] . x[r])` for outputs `from` to `to`, a block at most, and any number of rows. Many rows meet INT4
// words unpacked once, in `scratch`: (BLOCK, k).
template <class F>
static void products(Matrix m, i64 from, i64 to, const bf16* const* x, i64 rows, i64 k, i64 group, bf16* scratch, F sink) {
    float y[BLOCK][ROWS];
    i64 first = from, last = to;
    if (m.scales && rows > ROWS) {
        for (i64 o = from; o < to; o++)
            dequantize((const uint8_t*)m.values + o * k / 2, m.scales + o * (k / group), k, group, scratch + (o - from) * k);
        m = {scratch, nullptr};
        first = 0; last = to - from;
    }
    for (i64 r = 0; r < rows; r += ROWS) {
        const int some = rows - r < ROWS ? rows - r : ROWS;
        product(m, first, last, x + r, some, k, group, y);
        for (i64 o = from; o < to; o++) for (int i = 0; i < some; i++) sink(o, r + i, y[o - from][i]);
    }
}

// out[r] = bf16(w . x[r] + bias), this thread's share of the outputs, all rows; `sink(o, r, value)` takes the results.
template <class F> static void linear(const bf16* w, i64 outputs, i64 k, const bf16* x, i64 rows, Share share, F sink) {
    float y[BLOCK][ROWS];
    for (i64 o = share.begin; o < share.end; o += BLOCK) {
        i64 to = o + BLOCK < share.end ? o + BLOCK : share.end;
        for (i64 first = 0; first < rows; first += ROWS) {
            int some = rows - first < ROWS ? rows - first : ROWS;
            const bf16* given[ROWS];
            for (int r = 0; r < some; r++) given[r] = x + (first + r) * k;
            product({w, nullptr}, o, to, given, some, k, 0, y);
            for (i64 at = o; at < to; at++) for (int r = 0; r < some; r++) sink(at, first + r, y[at - o][r]);
        }
    }
}

// sum[h][:] += weights[h] . rows, where `weights` holds a pair of bfloat16 for each two rows; up to 32 columns, H sums.
// Two rows are interleaved, so the columns of a sum come in the order that `columns_of` undoes.
template <int H>
static inline void weigh(const bf16* rows, i64 stride, i64 width, i64 pairs, const uint32_t* weights, i64 weight_stride, __m512 (*sum)[2]) {
    for (i64 t = 0; t < pairs; t++) {
        __m512i one = (__m512i)load32(rows + 2 * t * stride, width), two = (__m512i)load32(rows + (2 * t + 1) * stride, width);
        __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, two), high = (__m512bh)_mm512_unpackhi_epi16(one, two);
        for (int h = 0; h < H; h++) {
            __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[h * weight_stride + t]);
            sum[h][0] = _mm512_dpbf16_ps(sum[h][0], weight, low);
            sum[h][1] = _mm512_dpbf16_ps(sum[h][1], weight, high);
        }
    }
}
static inline void columns_of(const __m512* sum, __m512& first, __m512& second) {  // 32 columns in order
    const __m512i a = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i b = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    first = _mm512_permutex2var_ps(sum[0], a, sum[1]);
    second = _mm512_permutex2var_ps(sum[0], b, sum[1]);
}

static void rms_norm(const bf16* x, const bf16* weight, bf16* out, i64 size, float eps) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < size; i++) sum += wide(x[i]) * wide(x[i]);
    float factor = 1.0f / sqrtf(sum / size + eps);
    for (i64 i = 0; i < size; i++) out[i] = narrow(wide(weight[i]) * rounded(wide(x[i]) * factor));
}

static void rotate(const bf16* x, const float* cos, const float* sin, bf16* out, i64 size) {  // pairs of neighbours
    for (i64 i = 0; i < size / 2; i++) {
        float a = wide(x[2 * i]), b = wide(x[2 * i + 1]);
        out[2 * i] = narrow(a * cos[i] - b * sin[i]);
        out[2 * i + 1] = narrow(b * cos[i] + a * sin[i]);
    }
}

// ---------------------------------------------------------------------------------------- attention

struct Attention {
    const bf16 *norm, *q_a, *q_a_bias, *q_a_norm, *q_b, *kv_a, *kv_a_bias, *kv_a_norm, *kv_b, *o, *o_bias;
    i64 hidden, q_lora, heads, nope, rope, v, rank;  // q_lora 0: q_b is applied to the hidden state itself
    float eps, latent_eps, scale;
};

struct Latents {  // what a cache holds of one layer: addresses, and strides in elements
    bf16 *latent, *rotary;
    i64 latent_row, latent_key, rotary_row, rotary_key;
    i64 past;             // keys before the new one
    const uint8_t* mask;  // null, or (rows, keys): 0 for padding
    i64 mask_row;
};

enum { KEYS = 32 };  // scored together: what is read of them stays in the first cache

// Queries that read the same keys and values: the heads of one token over the latents, or the tokens of one head over
// its expanded keys. A score has two parts, as queries and keys have: one that turns with the position, one that does not.
struct Part { const bf16 *query, *key; i64 query_row, key_row, size; };
struct Reading {
    Part parts[2];
    const bf16* value; i64 value_row, value_size;
    i64 queries;
    const i64* limits;    // null, or how many keys each query may see, in rising order
    const uint8_t* mask;  // null, or for each key 0 for padding
    float scale;
};
struct Sums {  // of each query: the largest score, the sum, the weighted values (queries, value_size)
    float *best, *total, *read;
    float *scores, *shrink; uint32_t* weights;  // (queries, KEYS), (queries), (queries, KEYS / 2): within a block
    void layout(i64 queries, i64 value_size) {
        best = arena.take<float>(queries); total = arena.take<float>(queries); read = arena.take<float>(queries * value_size);
        scores = arena.take<float>(queries * KEYS); shrink = arena.take<float>(queries); weights = arena.take<uint32_t>(queries * KEYS / 2);
    }
};

static void attend(const Reading& a, i64 begin, i64 end, const Sums& s) {
    const i64 queries = a.queries, size = a.value_size;
    for (i64 q = 0; q < queries; q++) { s.best[q] = -INFINITY; s.total[q] = 0; }
    memset(s.read, 0, queries * size * sizeof(float));
    for (i64 block = begin; block < end; block += KEYS) {
        const i64 keys = end - block < KEYS ? end - block : KEYS;
        i64 from = 0;  // queries before see nothing of this block
        while (a.limits && from < queries && a.limits[from] <= block) from++;
        for (i64 q = from; q < queries; q += 4) {
            const int some = queries - q < 4 ? queries - q : 4;
            const bf16* given[2][4];
            for (int p = 0; p < 2; p++)
                for (int i = 0; i < 4; i++) given[p][i] = a.parts[p].query + (q + (i < some ? i : 0)) * a.parts[p].query_row;
            for (i64 k = 0; k < keys; k += 4) {
                float y[4][ROWS];
                const int here = keys - k < 4 ? keys - k : 4;
                __m512 sum[4][4];
                for (int j = 0; j < 4; j++) for (int i = 0; i < 4; i++) sum[j][i] = _mm512_setzero_ps();
                for (int p = 0; p < 2; p++) {
                    const Part& part = a.parts[p];
                    const bf16* key = part.key + (block + k) * part.key_row;
                    if (here == 4) accumulate<4, 4>(key, part.key_row, given[p], part.size, sum);
                    else for (int j = 0; j < here; j++) accumulate<1, 4>(key + j * part.key_row, 0, given[p], part.size, *(__m512(*)[1][4])&sum[j]);
                }
                settle<4, 4>(sum, y);
                for (int j = 0; j < here; j++) for (int i = 0; i < some; i++) s.scores[(q + i) * KEYS + k + j] = y[j][i] * a.scale;
            }
        }
        for (i64 q = from; q < queries; q++) {
            float* score = s.scores + q * KEYS;
            uint32_t* weights = s.weights + q * KEYS / 2;
            const i64 seen = a.limits && a.limits[q] - block < keys ? a.limits[q] - block : keys;
            for (i64 j = seen; j < KEYS; j++) score[j] = -INFINITY;
            if (a.mask) for (i64 j = 0; j < seen; j++) if (!a.mask[block + j]) score[j] = -INFINITY;
            __m512 one = _mm512_loadu_ps(score), two = _mm512_loadu_ps(score + 16);
            const float top = fmaxf(s.best[q], _mm512_reduce_max_ps(_mm512_max_ps(one, two)));
            if (top == -INFINITY) {  // padding only, so far
                s.shrink[q] = 1;
                memset(weights, 0, KEYS * 2);
                continue;
            }
            one = exp16(_mm512_sub_ps(one, _mm512_set1_ps(top)));
            two = exp16(_mm512_sub_ps(two, _mm512_set1_ps(top)));
            s.shrink[q] = s.best[q] == -INFINITY ? 0 : expf(s.best[q] - top);
            s.total[q] = s.total[q] * s.shrink[q] + _mm512_reduce_add_ps(_mm512_add_ps(one, two));
            s.best[q] = top;
            _mm256_storeu_si256((__m256i*)weights, narrow16(one));
            _mm256_storeu_si256((__m256i*)(weights + 8), narrow16(two));
        }
        const i64 whole = keys / 2;
        const bf16* value = a.value + block * a.value_row;
        for (i64 column = 0; column < size; column += 32) {
            const i64 width = size - column < 32 ? size - column : 32;
            for (i64 q = from; q < queries; q += 8) {
                __m512 sum[8][2];
                for (int i = 0; i < 8; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
                const int some = queries - q < 8 ? queries - q : 8;
                const uint32_t* w = s.weights + q * KEYS / 2;
                if (some == 8) weigh<8>(value + column, a.value_row, width, whole, w, KEYS / 2, sum);
                else for (int i = 0; i < some; i++) weigh<1>(value + column, a.value_row, width, whole, w + i * KEYS / 2, 0, sum + i);
                if (keys % 2)  // the last key alone: the other weight of its pair is zero
                    for (int i = 0; i < some; i++) weigh<1>(value + (keys - 1) * a.value_row + column, 0, width, 1, w + i * KEYS / 2 + whole, 0, sum + i);
                for (int i = 0; i < some; i++) {
                    __m512 half[2];
                    columns_of(sum[i], half[0], half[1]);
                    const __m512 factor = _mm512_set1_ps(s.shrink[q + i]);
                    for (int n = 0; n < 2 && 16 * n < width; n++) {
                        float* to = s.read + (q + i) * size + column + 16 * n;
                        const __mmask16 there = width - 16 * n >= 16 ? 0xffff : (1 << (width - 16 * n)) - 1;
                        _mm512_mask_storeu_ps(to, there, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, to), factor, half[n]));
                    }
                }
            }
        }
    }
}

struct Expanded {  // addresses, and strides in elements along (batch, token, head)
    const bf16 *query, *turned, *key, *rotary, *value;
    bf16* out;
    i64 query_at[3], turned_at[3], key_at[3], rotary_at[3], value_at[3], out_at[3];
    i64 batch, queries, keys, heads, nope, rope, v;
    i64 first;  // place of the first query among the keys; each sees all up to itself
    const uint8_t* mask; i64 mask_row;
    float scale;
};

enum { QUERIES = 32 };  // of one head, that read together

// Attention of many tokens over the expanded keys and values of some heads.
extern "C" void kimi_prefill(const Expanded* given, i64 threads) {
    const Expanded& e = *given;
    Sums sums[MAX_THREADS];
    arena.layout([&] { for (i64 t = 0; t < threads; t++) sums[t].layout(QUERIES, e.v); });
    const i64 blocks = (e.queries + QUERIES - 1) / QUERIES;
    #pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (i64 unit = 0; unit < blocks * e.batch * e.heads; unit++) {
        // The longest first: the last queries see the most keys.
        const i64 q = (blocks - 1 - unit / (e.batch * e.heads)) * QUERIES, b = unit / e.heads % e.batch, h = unit % e.heads;
        const Sums& s = sums[omp_get_thread_num()];
        auto at = [&](const i64* strides, i64 token) { return b * strides[0] + token * strides[1] + h * strides[2]; };
        i64 limits[QUERIES];
        const i64 some = e.queries - q < QUERIES ? e.queries - q : QUERIES;
        for (i64 i = 0; i < some; i++) limits[i] = e.first + q + i + 1;
        const Reading reading = {
            {{e.query + at(e.query_at, q), e.key + at(e.key_at, 0), e.query_at[1], e.key_at[1], e.nope},
             {e.turned + at(e.turned_at, q), e.rotary + b * e.rotary_at[0], e.turned_at[1], e.rotary_at[1], e.rope}},
            e.value + at(e.value_at, 0), e.value_at[1], e.v, some, limits, e.mask ? e.mask + b * e.mask_row : nullptr, e.scale};
        attend(reading, 0, limits[some - 1] < e.keys ? limits[some - 1] : e.keys, s);
        for (i64 i = 0; i < some; i++) {
            bf16* to = e.out + at(e.out_at, q + i);
            const float factor = s.total[i] > 0 ? 1 / s.total[i] : 0;
            for (i64 d = 0; d < e.v; d++) to[d] = narrow(s.read[i * e.v + d] * factor);
        }
    }
}

// out = x + attention(norm(x)): one new token for each row, whose latent and rotary key are written into the cache.
extern "C" void kimi_attention(const Attention* given, const Latents* cache, i64 rows, const bf16* x, const float* cos,
                               const float* sin, bf16* out, i64 threads) {
    const Attention& a = *given;
    const Latents& c = *cache;
    const i64 head = a.nope + a.rope, keys = c.past + 1;
    // Each row's keys are cut into as many pieces as there are threads, however many rows there are: a row's sums are
    // then the same to the last bit in any company.
    const i64 pieces = threads;
    bf16 *normed, *query_a, *key_value, *query, *absorbed, *turned, *read16, *value;
    std::vector<Sums> sums(rows * pieces);
    arena.layout([&] {
        normed = arena.take<bf16>(rows * a.hidden);
        query_a = arena.take<bf16>(rows * (a.q_lora ? a.q_lora : 1));
        key_value = arena.take<bf16>(rows * (a.rank + a.rope));
        query = arena.take<bf16>(rows * a.heads * head);
        absorbed = arena.take<bf16>(rows * a.heads * a.rank);
        turned = arena.take<bf16>(rows * a.heads * a.rope);
        read16 = arena.take<bf16>(rows * a.heads * a.rank);
        value = arena.take<bf16>(rows * a.heads * a.v);
        for (Sums& one : sums) one.layout(a.heads, a.rank);
    });
    #pragma omp parallel num_threads(threads)
    {
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * a.hidden, a.norm, normed + s.begin * a.hidden, a.hidden, a.eps);
        #pragma omp barrier
        const i64 narrow_size = a.rank + a.rope;
        if (a.q_lora)
            linear(a.q_a, a.q_lora, a.hidden, normed, rows, Share(a.q_lora, BLOCK), [&](i64 o, i64 r, float y) {
                query_a[r * a.q_lora + o] = narrow(a.q_a_bias ? y + wide(a.q_a_bias[o]) : y);
            });
        linear(a.kv_a, narrow_size, a.hidden, normed, rows, Share(narrow_size, BLOCK), [&](i64 o, i64 r, float y) {
            key_value[r * narrow_size + o] = narrow(a.kv_a_bias ? y + wide(a.kv_a_bias[o]) : y);
        });
        #pragma omp barrier
        for (Share s(rows); s.begin < s.end; s.begin++) {
            const i64 r = s.begin;
            if (a.q_lora) rms_norm(query_a + r * a.q_lora, a.q_a_norm, query_a + r * a.q_lora, a.q_lora, a.latent_eps);
            const bf16* mine = key_value + r * narrow_size;
            rms_norm(mine, a.kv_a_norm, c.latent + r * c.latent_row + c.past * c.latent_key, a.rank, a.latent_eps);
            rotate(mine + a.rank, cos + r * a.rope / 2, sin + r * a.rope / 2, c.rotary + r * c.rotary_row + c.past * c.rotary_key, a.rope);
        }
        #pragma omp barrier
        linear(a.q_b, a.heads * head, a.q_lora ? a.q_lora : a.hidden, a.q_lora ? query_a : normed, rows,
               Share(a.heads * head, BLOCK), [&](i64 o, i64 r, float y) { query[r * a.heads * head + o] = narrow(y); });
        #pragma omp barrier
        // The expansion of keys moves into the query: (rows, nope) by (nope, rank) for each head.
        for (Share s(a.heads * (a.rank / 32)); s.begin < s.end; s.begin++) {
            const i64 h = s.begin / (a.rank / 32), column = s.begin % (a.rank / 32) * 32;
            const bf16* to_key = a.kv_b + h * (a.nope + a.v) * a.rank + column;
            for (i64 first = 0; first < rows; first += ROWS) {
                const int some = rows - first < ROWS ? rows - first : ROWS;
                __m512 sum[ROWS][2];
                for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
                const uint32_t* q = (const uint32_t*)(query + (first * a.heads + h) * head);  // two neighbours: a pair
                if (some == ROWS) weigh<ROWS>(to_key, a.rank, 32, a.nope / 2, q, a.heads * head / 2, sum);
                else for (int i = 0; i < some; i++) weigh<1>(to_key, a.rank, 32, a.nope / 2, q + i * a.heads * head / 2, 0, sum + i);
                for (int i = 0; i < some; i++) {
                    __m512 one, two;
                    columns_of(sum[i], one, two);
                    bf16* to = absorbed + ((first + i) * a.heads + h) * a.rank + column;
                    _mm256_storeu_si256((__m256i*)to, narrow16(one));
                    _mm256_storeu_si256((__m256i*)(to + 16), narrow16(two));
                }
            }
        }
        for (Share s(rows * a.heads); s.begin < s.end; s.begin++) {
            const i64 r = s.begin / a.heads;
            rotate(query + s.begin * head + a.nope, cos + r * a.rope / 2, sin + r * a.rope / 2, turned + s.begin * a.rope, a.rope);
        }
        #pragma omp barrier
        for (Share s(rows * pieces); s.begin < s.end; s.begin++) {
            const i64 r = s.begin / pieces, piece = s.begin % pieces;
            const bf16* latent = c.latent + r * c.latent_row;
            const Reading reading = {
                {{absorbed + r * a.heads * a.rank, latent, a.rank, c.latent_key, a.rank},
                 {turned + r * a.heads * a.rope, c.rotary + r * c.rotary_row, a.rope, c.rotary_key, a.rope}},
                latent, c.latent_key, a.rank, a.heads, nullptr, c.mask ? c.mask + r * c.mask_row : nullptr, a.scale};
            attend(reading, keys * piece / pieces, keys * (piece + 1) / pieces, sums[s.begin]);
        }
        #pragma omp barrier
        // The pieces become one; then the expansion of values, rank → v for each head.
        for (Share s(rows * a.heads); s.begin < s.end; s.begin++) {
            const i64 r = s.begin / a.heads, h = s.begin % a.heads;
            const Sums* mine = sums.data() + r * pieces;
            float top = -INFINITY, sum = 0, factor[MAX_THREADS];
            for (i64 p = 0; p < pieces; p++) top = fmaxf(top, mine[p].best[h]);
            for (i64 p = 0; p < pieces; p++) {
                factor[p] = mine[p].best[h] == -INFINITY ? 0 : expf(mine[p].best[h] - top);
                sum += factor[p] * mine[p].total[h];
            }
            sum = fmaxf(sum, 1e-30f);
            bf16* to = read16 + s.begin * a.rank;
            for (i64 i = 0; i < a.rank; i += 16) {
                __m512 all = _mm512_setzero_ps();
                for (i64 p = 0; p < pieces; p++)
                    all = _mm512_fmadd_ps(_mm512_loadu_ps(mine[p].read + h * a.rank + i), _mm512_set1_ps(factor[p] / sum), all);
                _mm256_storeu_si256((__m256i*)(to + i), narrow16(all));
            }
        }
        #pragma omp barrier
        for (Share s(a.heads * a.v, 4); s.begin < s.end; s.begin += 4) {
            const i64 h = s.begin / a.v, d = s.begin % a.v;
            const bf16* to_value = a.kv_b + (h * (a.nope + a.v) + a.nope + d) * a.rank;
            for (i64 first = 0; first < rows; first += ROWS) {
                const int some = rows - first < ROWS ? rows - first : ROWS;
                const bf16* from[ROWS];
                float y[BLOCK][ROWS];
                for (int i = 0; i < some; i++) from[i] = read16 + ((first + i) * a.heads + h) * a.rank;
                product({to_value, nullptr}, 0, 4, from, some, a.rank, 0, y);
                for (int i = 0; i < some; i++)
                    for (int j = 0; j < 4; j++) value[(first + i) * a.heads * a.v + s.begin + j] = narrow(y[j][i]);
            }
        }
        #pragma omp barrier
        linear(a.o, a.hidden, a.heads * a.v, value, rows, Share(a.hidden, BLOCK), [&](i64 o, i64 r, float y) {
            const i64 at = r * a.hidden + o;
            out[at] = narrow(wide(x[at]) + rounded(a.o_bias ? y + wide(a.o_bias[o]) : y));
        });
    }
}

// ---------------------------------------------------------------------------------------- feed-forward

struct FeedForward {
    const bf16 *norm, *gate, *up, *down;  // the dense network or the shared expert; null: none
    const bf16* router; const float* bias;
    i64 hidden, width, experts, top_k, groups, top_groups, normalize, expert_width, group_size;
    float eps, scaling;
};

struct Expert { Matrix gate, up, down; };

// From 16 sums each: bf16(bf16(silu(gate)) * up).
static inline void swish(const float* gate, const float* up, bf16* out, i64 count) {
    __m512 g = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(_mm512_loadu_ps(gate))), 16));
    __m512 u = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(_mm512_loadu_ps(up))), 16));
    __m512 s = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
    s = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(s)), 16));
    _mm256_mask_storeu_epi16(out, count >= 16 ? 0xffff : (1 << count) - 1, narrow16(_mm512_mul_ps(s, u)));
}

// inner[r][from … to] = silu(gate) * up of one network, for a block of outputs.
static void gate_up(const Expert& e, i64 from, i64 to, const bf16* const* x, i64 rows, i64 k, i64 group, bf16* const* inner,
                    bf16* scratch, float* gate, float* up) {  // gate, up: (rows, BLOCK)
    products(e.gate, from, to, x, rows, k, group, scratch, [&](i64 o, i64 r, float y) { gate[r * BLOCK + o - from] = y; });
    products(e.up, from, to, x, rows, k, group, scratch, [&](i64 o, i64 r, float y) { up[r * BLOCK + o - from] = y; });
    for (i64 r = 0; r < rows; r++) swish(gate + r * BLOCK, up + r * BLOCK, inner[r] + from, to - from);
}

// Each thread's own memory for the products of up to `rows` rows.
struct Bench {
    const bf16** x; bf16** inner; bf16* scratch; float *gate, *up, *sum;
    static void layout(Bench* benches, i64 threads, i64 rows, i64 k, i64 sums) {
        for (i64 t = 0; t < threads; t++)
            benches[t] = {arena.take<const bf16*>(rows), arena.take<bf16*>(rows), arena.take<bf16>(BLOCK * k),
                          arena.take<float>(rows * BLOCK), arena.take<float>(rows * BLOCK), arena.take<float>(sums * BLOCK)};
    }
};
// normed = norm(x); the router's logits, and the chosen experts of each row with their weights.
extern "C" void kimi_route(const FeedForward* given, i64 rows, const bf16* x, bf16* normed, float* logits, float* weights, i64* chosen,
                           i64 threads) {
    const FeedForward& f = *given;
    #pragma omp parallel num_threads(threads)
    {
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * f.hidden, f.norm, normed + s.begin * f.hidden, f.hidden, f.eps);
        #pragma omp barrier
        linear(f.router, f.experts, f.hidden, normed, rows, Share(f.experts, BLOCK), [&](i64 o, i64 r, float y) {
            logits[r * f.experts + o] = y;
        });
        #pragma omp barrier
        std::vector<float> score(f.experts), choice(f.experts), merit(f.groups);
        for (Share s(rows); s.begin < s.end; s.begin++) {
            const i64 r = s.begin, per = f.experts / f.groups;
            for (i64 e = 0; e < f.experts; e++) {
                score[e] = 1.0f / (1.0f + expf(-logits[r * f.experts + e]));
                choice[e] = score[e] + f.bias[e];
            }
            if (f.groups > 1) {  // only the groups with the largest sum of their two best take part
                for (i64 g = 0; g < f.groups; g++) {
                    float one = -INFINITY, two = -INFINITY;
                    for (i64 e = g * per; e < (g + 1) * per; e++) {
                        if (choice[e] > one) { two = one; one = choice[e]; } else if (choice[e] > two) two = choice[e];
                    }
                    merit[g] = one + two;
                }
                std::vector<char> stays(f.groups, 0);
                for (i64 n = 0; n < f.top_groups; n++) {
                    i64 top = -1;
                    for (i64 g = 0; g < f.groups; g++) if (!stays[g] && (top < 0 || merit[g] > merit[top])) top = g;
                    stays[top] = 1;
                }
                for (i64 e = 0; e < f.experts; e++) if (!stays[e / per]) choice[e] = -INFINITY;
            }
            float sum = 0;
            for (i64 n = 0; n < f.top_k; n++) {
                i64 top = -1;
                for (i64 e = 0; e < f.experts; e++) if (!std::isnan(choice[e]) && (top < 0 || choice[e] > choice[top])) top = e;
                if (top < 0) top = n;  // all are NaN: some expert must be named
                chosen[r * f.top_k + n] = top;
                weights[r * f.top_k + n] = score[top];
                sum += score[top];
                choice[top] = NAN;
            }
            for (i64 n = 0; n < f.top_k; n++) {
                float& w = weights[r * f.top_k + n];
                w = (f.normalize ? w / (sum + 1e-20f) : w) * f.scaling;
            }
        }
    }
}

// out = x + the weighted sum of each row's experts + the shared one; without x, and without a shared one, only the sum.
// `table`: the expert of each (row, choice), null where it is computed elsewhere.
extern "C" void kimi_experts(const FeedForward* given, i64 rows, const bf16* x, const bf16* normed, const float* weights,
                             const i64* chosen, const Expert* const* table, bf16* out, i64 threads) {
    const FeedForward& f = *given;
    const i64 pairs = rows * f.top_k, width = f.expert_width;
    struct Team { const Expert* expert; i64 first, rows; };  // an expert, and its pairs' places in `order`
    static thread_local std::vector<Team> teams;
    static thread_local std::vector<i64> order;  // by expert: a row's sum then has one order in any company
    teams.clear(); order.clear();
    for (i64 p = 0; p < pairs; p++) if (table[p]) order.push_back(p);
    std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return chosen[a] < chosen[b]; });
    for (i64 n = 0; n < (i64)order.size(); n++) {
        if (n == 0 || chosen[order[n]] != chosen[order[n - 1]]) teams.push_back({table[order[n]], n, 0});
        teams.back().rows++;
    }
    bf16 *inner, *shared;
    Bench benches[MAX_THREADS];
    arena.layout([&] {
        inner = arena.take<bf16>(pairs * width + 32);
        shared = arena.take<bf16>(rows * (f.gate ? f.width : 1) + 32);
        Bench::layout(benches, threads, rows, std::max(f.hidden, std::max(width, f.width)), rows);
    });
    const Team* team = teams.data();
    const i64* pair = order.data();
    const i64 count = teams.size(), blocks = (width + BLOCK - 1) / BLOCK, common_blocks = f.gate ? (f.width + BLOCK - 1) / BLOCK : 0;
    const Expert common = {{f.gate, nullptr}, {f.up, nullptr}, {f.down, nullptr}};
    #pragma omp parallel num_threads(threads)
    {
        const Bench& mine = benches[omp_get_thread_num()];
        #pragma omp for schedule(dynamic, 4)
        for (i64 unit = 0; unit < count * blocks + common_blocks; unit++) {
            const bool is_common = unit >= count * blocks;
            const Team t = is_common ? Team{&common, 0, rows} : team[unit / blocks];
            const i64 size = is_common ? f.width : width, from = (is_common ? unit - count * blocks : unit % blocks) * BLOCK;
            for (i64 r = 0; r < t.rows; r++) {
                mine.x[r] = normed + (is_common ? r : pair[t.first + r] / f.top_k) * f.hidden;
                mine.inner[r] = is_common ? shared + r * f.width : inner + pair[t.first + r] * width;
            }
            gate_up(*t.expert, from, std::min(from + BLOCK, size), mine.x, t.rows, f.hidden, is_common ? 0 : f.group_size,
                    mine.inner, mine.scratch, mine.gate, mine.up);
        }
        #pragma omp for schedule(dynamic, 1)
        for (i64 from = 0; from < f.hidden; from += BLOCK) {
            const i64 to = std::min(from + BLOCK, f.hidden);
            memset(mine.sum, 0, rows * BLOCK * sizeof(float));
            for (i64 n = 0; n < count; n++) {
                const Team& t = team[n];
                for (i64 r = 0; r < t.rows; r++) mine.x[r] = inner + pair[t.first + r] * width;
                products(t.expert->down, from, to, mine.x, t.rows, width, f.group_size, mine.scratch, [&](i64 o, i64 r, float y) {
                    const i64 p = pair[t.first + r];
                    mine.sum[p / f.top_k * BLOCK + o - from] += weights[p] * rounded(y);
                });
            }
            for (i64 i = 0; i < rows * BLOCK; i++) mine.sum[i] = rounded(mine.sum[i]);
            if (f.gate) {
                for (i64 r = 0; r < rows; r++) mine.x[r] = shared + r * f.width;
                products(common.down, from, to, mine.x, rows, f.width, 0, mine.scratch, [&](i64 o, i64 r, float y) {
                    float& sum = mine.sum[r * BLOCK + o - from];
                    sum = rounded(sum + rounded(y));
                });
            }
            for (i64 r = 0; r < rows; r++)
                for (i64 o = from; o < to; o++) {
                    const i64 at = r * f.hidden + o;
                    out[at] = narrow((x ? wide(x[at]) : 0) + mine.sum[r * BLOCK + o - from]);
                }
        }
    }
}

// out = x + down(silu(gate) * up) of norm(x): a dense layer.
extern "C" void kimi_dense(const FeedForward* given, i64 rows, const bf16* x, bf16* out, i64 threads) {
    const FeedForward& f = *given;
    bf16 *normed, *inner;
    Bench benches[MAX_THREADS];
    arena.layout([&] {
        normed = arena.take<bf16>(rows * f.hidden);
        inner = arena.take<bf16>(rows * f.width + 32);
        Bench::layout(benches, threads, rows, f.hidden, 1);
    });
    const Expert network = {{f.gate, nullptr}, {f.up, nullptr}, {f.down, nullptr}};
    #pragma omp parallel num_threads(threads)
    {
        const Bench& mine = benches[omp_get_thread_num()];
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * f.hidden, f.norm, normed + s.begin * f.hidden, f.hidden, f.eps);
        #pragma omp barrier
        for (i64 r = 0; r < rows; r++) { mine.x[r] = normed + r * f.hidden; mine.inner[r] = inner + r * f.width; }
        for (Share s(f.width, BLOCK); s.begin < s.end; s.begin += BLOCK)
            gate_up(network, s.begin, std::min(s.begin + BLOCK, s.end), mine.x, rows, f.hidden, 0, mine.inner, mine.scratch,
                    mine.gate, mine.up);
        #pragma omp barrier
        linear(f.down, f.hidden, f.width, inner, rows, Share(f.hidden, BLOCK), [&](i64 o, i64 r, float y) {
            const i64 at = r * f.hidden + o;
            out[at] = narrow(wide(x[at]) + rounded(y));
        });
    }
}

// out = x . w transposed, for the output layer.
extern "C" void kimi_linear(const bf16* w, i64 outputs, i64 inputs, i64 rows, const bf16* x, bf16* out,
                            i64 threads) {
    #pragma omp parallel num_threads(threads)
    linear(w, outputs, inputs, x, rows, Share(outputs, BLOCK), [&](i64 o, i64 r, float y) { out[r * outputs + o] = narrow(y); });
}

// INT4 words → the bfloat16 weights they stand for.
extern "C" void kimi_dequantize(const uint8_t* words, const bf16* scales, i64 outputs, i64 inputs, i64 group, bf16* out,
                                i64 threads) {
    #pragma omp parallel num_threads(threads)
    for (Share s(outputs); s.begin < s.end; s.begin++)
        dequantize(words + s.begin * inputs / 2, scales + s.begin * (inputs / group), inputs, group, out + s.begin * inputs);
}
"""
