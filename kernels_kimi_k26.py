"""The source of the CPU's own kernels, in C++ with the intrinsics of AVX-512: what all have in common.

Numbers, vectors, memory; products of few rows, which read each weight once; products of many rows, which have a row in each
lane of a vector. `native_kimi_k26` compiles the parts as one and knows their functions.
"""

INCLUDES = r"""
#include <immintrin.h>
#include <omp.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
"""

COMMON = r"""
typedef int64_t i64;
typedef uint16_t bf16;  // the upper half of a float

// ---------------------------------------------------------------------------------------- numbers and vectors

static inline float wide(bf16 x) { uint32_t b = (uint32_t)x << 16; float f; memcpy(&f, &b, 4); return f; }
static inline bf16 narrow(float x) {  // to nearest, ties to even, as PyTorch rounds
    uint32_t b; memcpy(&b, &x, 4);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bf16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline float rounded(float x) { return wide(narrow(x)); }
static inline __m512 wide16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline __m512 wide16(const bf16* x, __mmask16 there) { return wide16(_mm256_maskz_loadu_epi16(there, x)); }
static inline __m256i narrow16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline void narrow16(bf16* to, __m512 x, __mmask16 there) { _mm256_mask_storeu_epi16(to, there, narrow16(x)); }
static inline __m512 rounded16(__m512 x) { return wide16(narrow16(x)); }
static inline __mmask16 first16(i64 count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }
static inline __m512bh load32(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
static inline __m512bh load32(const bf16* x, __mmask32 there) { return (__m512bh)_mm512_maskz_loadu_epi16(there, x); }
static inline __mmask32 first32(i64 count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

// 2^x: that of the whole part times a polynomial of the rest, from 0 to 1; 0 far below. Of its degree it is the one that is 1 at 0 and whose
// largest relative error is least: 9e-8, and 1.4e-7 as floats are rounded.
static inline __m512 two_to(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // in this order NaN stays
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0x1.e975aap-10f);
    for (float c : {0x1.277824p-7f, 0x1.c91cf0p-5f, 0x1.ebdb56p-3f, 0x1.62e4bap-1f, 1.0f}) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, x);
}
static const float LOG2_E = 1.44269504f;  // e^x = 2^(x LOG2_E)

// The largest of some vectors, `apart` floats from each other. Four at a time, as each of a chain waits for the one before.
static inline __m512 largest(const float* at, i64 count, i64 apart) {
    __m512 top[4];
    for (auto& one : top) one = _mm512_set1_ps(-INFINITY);
    i64 i = 0;
    for (; i + 4 <= count; i += 4)
        for (int n = 0; n < 4; n++) top[n] = _mm512_max_ps(top[n], _mm512_loadu_ps(at + (i + n) * apart));
    for (; i < count; i++) top[0] = _mm512_max_ps(top[0], _mm512_loadu_ps(at + i * apart));
    return _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
}

struct Range {
    i64 begin, end;
    bool none() const { return begin >= end; }
    Range take(i64 most = 16) {
        const i64 from = begin;
        return {from, begin = std::min(begin + most, end)};
    }
    Range next(i64) { return take(end - begin); }  // all at once: see `Dealt`
};

// A piece of `count` things for this thread or another one, in whole units.
struct Share : Range {
    Share(i64 count, i64 unit = 1, i64 thread = omp_get_thread_num()) {
        i64 threads = omp_get_num_threads(), units = (count + unit - 1) / unit;
        begin = units * thread / threads * unit;
        end = units * (thread + 1) / threads * unit;
        if (end > count) end = count;
        if (begin > end) begin = end;
    }
};

// The same, some units at a time, from its front on, as memory is fastest where it is read as it lies. Who has none left takes from the
// backs of the next three threads' shares: one of them may be slower, as others use its core.
struct alignas(64) Taken { std::atomic<i64> units{0}; };  // of a thread's share: from its front in the lower half, from its back in the upper
struct Dealt : Share {
    Taken* taken;  // by all threads
    i64 count, unit;
    Dealt(Taken* taken, i64 count, i64 unit = 16) : Share(count, unit), taken(taken), count(count), unit(unit) {}
    Range next(i64 most = 1) {  // units; of others' shares one
        constexpr i64 ASKED = 4, BACK = (i64)1 << 32;
        const i64 threads = omp_get_num_threads();
        for (i64 n = 0; n < std::min(threads, ASKED); n++) {
            const i64 thread = (omp_get_thread_num() + n) % threads;
            const Share share(count, unit, thread);
            const i64 units = (share.end - share.begin + unit - 1) / unit, before = taken[thread].units.fetch_add(n ? BACK : most);
            const i64 front = before % BACK, back = before / BACK, left = units - front - back;
            if (left <= 0) continue;
            const i64 at = share.begin + (n ? units - 1 - back : front) * unit;
            return {at, std::min(at + std::min(n ? 1 : most, left) * unit, share.end)};
        }
        return {count, count};
    }
    bool follows(Range one) const { return one.begin >= begin && one.end < end; }  // whether this thread has what comes behind it
};

// The outputs of a linear layer, as its products want them. Those without tiles ask for what lies right behind the weights they multiply, so that a
// thread keeps to its share.
#ifdef TILES
typedef Dealt Outputs;
#else
struct Outputs : Share { Outputs(Taken*, i64 count) : Share(count, 16) {} };
#endif

// Calls f with `n`, from 1 to N, as a constant.
template <int N, class F> static inline void with_constant(i64 n, F f) {
    if constexpr (N > 1)
        if (n < N) return with_constant<N - 1>(n, f);
    f(std::integral_constant<int, N>());
}

enum { PART = 64 };  // outputs that a thread takes at once where matrices follow one another
static inline Range part_of(i64 part, i64 count) { return {std::min(part * PART, count), std::min((part + 1) * PART, count)}; }

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

// ---------------------------------------------------------------------------------------- products

enum { ROWS = REGISTERS > 8 ? 8 : 4, BLOCK = 16 };  // of x, multiplied at once; outputs that are computed together

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

// y[r][o] of neighbouring outputs.
template <int O, int R> static inline void settle(const __m512 (&sum)[R][O], float (*y)[BLOCK]) {
    static_assert(O * R <= 16, "one vector of sums");
    float all[16];
    _mm512_storeu_ps(all, sums_of<R * O>(&sum[0][0]));
    for (int r = 0; r < R; r++) memcpy(y[r], all + r * O, O * sizeof(float));
}

// Memory that will be read soon, a stretch and another one: some lines of it are asked for while others are worked on.
struct Ahead {
    const char *at = nullptr, *end = nullptr, *then = nullptr, *last = nullptr;
    Ahead() = default;
    Ahead(const void* one, i64 bytes, const void* other = nullptr, i64 of_other = 0)
        : at((const char*)one), end(at + bytes), then((const char*)other), last(then + of_other) { turn(); }
    void turn() { if (at >= end) { at = then; end = last; then = last; } }
    void ask(i64 lines) {
        for (; at < end && lines > 0; lines--, turn()) {
            _mm_prefetch(at, _MM_HINT_T1);
            at += 64;
        }
    }
};
static inline Ahead rows_of(const bf16* w, i64 k, Range outputs) { return {w + outputs.begin * k, (outputs.end - outputs.begin) * k * (i64)sizeof *w}; }

enum { AHEAD = 6144 };  // bytes: weights are asked for so long before they are needed, as memory is slow to answer
static inline void ask_ahead(const void* at) { _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T1); }

// A weight: bfloat16, or INT4 words with a scale for each `group` inputs.
struct Matrix {
    const void* values;
    const bf16* scales;  // null: `values` are bfloat16
};
static inline i64 row_bytes(Matrix m, i64 k) { return m.scales ? k / 2 : k * 2; }  // of the values of one output

// y[r][o] = w[o] . x[r] for `O` neighbouring rows of w.
template <int O, int R> static inline void dots(const bf16* w, const bf16* const* x, i64 k, float (*y)[BLOCK]);
// The same for INT4 words, and rows that are spread for them: see `complete`.
template <int O, int R>
static inline void dots4(const uint8_t* w, const bf16* scales, const bf16* const* x, i64 k, i64 group, float (*y)[BLOCK]);

// y[r][o - from] = m[o] . x[r] for outputs `from` to `to`, a block at most.
template <int R> static void product(Matrix m, i64 from, i64 to, const bf16* const* x, i64 k, i64 group, float (*y)[BLOCK]) {
    constexpr int COUNT = R <= 4 ? 4 : 2;  // outputs whose sums make one vector
    i64 o = from;
    const auto next = [&](auto count) {
        float (*to)[BLOCK] = (float (*)[BLOCK])(&y[0][o - from]);
        if (m.scales) dots4<count, R>((const uint8_t*)m.values + o * k / 2, m.scales + o * (k / group), x, k, group, to);
        else dots<count, R>((const bf16*)m.values + o * k, x, k, to);
        o += count;
    };
    while (o + COUNT <= to) next(std::integral_constant<int, COUNT>());
    while (o < to) next(std::integral_constant<int, 1>());
}

// `sink(o, r, y, there)` gets y = m[o …] . x[r] of a block of outputs at a time, of which those exist that are `there`. Up to
// `MOST` rows, so that weights come from memory once; spread ones for INT4 words. A row has the same results in any company.
template <class F> static void products(Matrix m, i64 from, i64 to, const bf16* const* x, i64 rows, i64 k, i64 group, F sink) {
    const i64 some = rows > ROWS ? 4 : BLOCK;  // outputs that all rows meet before the next ones
    float sums[2][MOST][BLOCK];
    const auto give = [&](i64 o, float (*y)[BLOCK]) {
        for (i64 r = 0; r < rows; r++) sink(o, r, _mm512_loadu_ps(y[r]), first16(to - o));
    };
    int turn = 0;
    for (i64 block = from; block < to; block += BLOCK, turn ^= 1) {
        const i64 end = std::min<i64>(block + BLOCK, to);
        for (i64 o = block; o < end; o += some)
            for (i64 r = 0; r < rows; r += ROWS) {
                const i64 last = std::min<i64>(o + some, end);
                float (*y)[BLOCK] = (float (*)[BLOCK])(&sums[turn][r][o - block]);
                with_constant<ROWS>(std::min<i64>(rows - r, ROWS), [&](auto count) { product<count>(m, o, last, x + r, k, group, y); });
            }
        // One block later, as what was just written in small pieces cannot be read at once as a whole.
        if (block > from) give(block - BLOCK, sums[turn ^ 1]);
    }
    if (from < to) give(from + (to - from - 1) / BLOCK * BLOCK, sums[turn ^ 1]);
}

#ifndef TILES
// The same for bfloat16 weights, some of the outputs, and any number of rows that are `row` values apart.
template <class F> static void linear(const bf16* w, i64 k, const bf16* x, i64 row, i64 rows, Range outputs, F sink, Ahead = {}) {
    for (i64 first = 0; first < rows; first += MOST) {
        const bf16* given[MOST];
        const i64 some = std::min<i64>(rows - first, MOST);
        for (i64 r = 0; r < some; r++) given[r] = x + (first + r) * row;
        products({w, nullptr}, outputs.begin, outputs.end, given, some, k, 0,
                 [&](i64 o, i64 r, __m512 y, __mmask16 there) { sink(o, first + r, y, there); });
    }
}
#endif

// Thirty-two values of INT4 words, each in the low bits of sixteen; of what stands above, a table takes no notice.
static inline __m512i nibbles(const uint8_t* at) {
    const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
    return _mm512_or_si512(pair, _mm512_slli_epi32(pair, 12));
}

// The bfloat16 weights that one row of INT4 words stands for.
static void dequantize(const uint8_t* w, const bf16* scales, i64 k, i64 group, bf16* out) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    for (i64 g = 0; g < k / group; g++) {
        __m512i table = _mm512_broadcast_i64x4(narrow16(_mm512_mul_ps(values, _mm512_set1_ps(wide(scales[g])))));
        for (i64 i = g * group; i < (g + 1) * group; i += 32) {
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(nibbles(w + i / 2), table));
        }
    }
}

// Two vectors of lanes as pairs: one word in each lane, the first below.
static inline __m512i paired16(__m256i one, __m256i two) {
#ifdef __AVX512BF16__
    return _mm512_or_si512(_mm512_cvtepu16_epi32(one), _mm512_slli_epi32(_mm512_cvtepu16_epi32(two), 16));
#else
    const __m256i low = _mm256_unpacklo_epi16(one, two), high = _mm256_unpackhi_epi16(one, two);
    return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
#endif
}
static inline __m512i paired(__m512 one, __m512 two) {
#ifdef __AVX512BF16__
    alignas(64) static const uint16_t turns[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(turns), (__m512i)_mm512_cvtne2ps_pbh(two, one));
#else
    return paired16(narrow16(one), narrow16(two));
#endif
}

#ifndef TILES
enum { WEIGHED = ROWS };
// sum[i] = weights[i] . w for up to `WEIGHED` rows of weights, pairs of bfloat16 for each two rows of w, which has `width` columns,
// whole lines of them. w is read as it lies, a few rows at a time, while the sums stay in the nearest cache. Two rows are
// interleaved, so the columns of a sum come in the order that `store_columns` undoes.
static void weigh(const bf16* w, i64 width, i64 pairs, const uint32_t* weights, i64 weight_stride, i64 rows, float* sum, Ahead) {
    constexpr int SOME = REGISTERS > 8 ? 4 : 2;  // pairs at a time
    memset(sum, 0, rows * width * sizeof(float));
    const bf16* ahead = w + 2 * SOME * width;
    for (i64 p = 0; p < pairs; p += SOME, w += 2 * SOME * width, weights += SOME) {
        const int there = std::min<i64>(SOME, pairs - p);
        for (i64 column = 0; column < width; column += 32) {
            __m512bh low[SOME], high[SOME];
            for (int n = 0; n < there; n++, ahead += 64) {
                _mm_prefetch(ahead, _MM_HINT_T1);
                _mm_prefetch(ahead + 32, _MM_HINT_T1);
                const __m512i one = (__m512i)load32(w + 2 * n * width + column), two = (__m512i)load32(w + (2 * n + 1) * width + column);
                low[n] = (__m512bh)_mm512_unpacklo_epi16(one, two);
                high[n] = (__m512bh)_mm512_unpackhi_epi16(one, two);
            }
            for (i64 i = 0; i < rows; i++) {
                float* to = sum + i * width + column;
                __m512 first = _mm512_loadu_ps(to), second = _mm512_loadu_ps(to + 16);
                for (int n = 0; n < there; n++) {
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[i * weight_stride + n]);
                    first = _mm512_dpbf16_ps(first, weight, low[n]);
                    second = _mm512_dpbf16_ps(second, weight, high[n]);
                }
                _mm512_storeu_ps(to, first);
                _mm512_storeu_ps(to + 16, second);
            }
        }
    }
}
#endif
static inline void store_columns(__m512 low, __m512 high, bf16* to) {  // 32 columns in order
#ifdef TILES
    _mm512_storeu_si512(to, paired(low, high));
#else
    const __m512i a = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i b = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _mm256_storeu_si256((__m256i*)to, narrow16(_mm512_permutex2var_ps(low, a, high)));
    _mm256_storeu_si256((__m256i*)(to + 16), narrow16(_mm512_permutex2var_ps(low, b, high)));
#endif
}

static void rms_norm(const bf16* x, const bf16* weight, bf16* out, i64 size, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (i64 i = 0; i < size; i += 16) {
        const __m512 some = wide16(x + i, first16(size - i));
        sum = _mm512_fmadd_ps(some, some, sum);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / size + eps));
    for (i64 i = 0; i < size; i += 16) {
        const __mmask16 there = first16(size - i);
        narrow16(out + i, _mm512_mul_ps(wide16(weight + i, there), rounded16(_mm512_mul_ps(wide16(x + i, there), factor))), there);
    }
}

// ---------------------------------------------------------------------------------------- many rows: one to a lane

enum { LANES = 16 };

// `G` vectors of sixteen rows of x meet `N` rows of w: sum[n][g] += w[n] . x[g], a row of x in each lane. Neighbouring
// inputs stand together as one 32-bit word: x is packed, (pairs, G * 16) words; word p of w's row n is w[n * row + p * step].
// `NEXT` lets the rows of w that follow come nearer, a line with each pair: steadily, for a burst would have to wait.
template <int G, int N, bool NEXT = false>
static inline void lanes(const uint32_t* x, const uint32_t* w, i64 row, i64 step, i64 pairs, __m512 (&sum)[N][G]) {
    for (i64 p = 0; p < pairs; p++) {
        __m512bh given[G];
        if (NEXT) _mm_prefetch((const char*)(w + N * row + p * LANES), _MM_HINT_T0);
        for (int g = 0; g < G; g++) given[g] = (__m512bh)_mm512_loadu_si512(x + (p * G + g) * LANES);
        for (int n = 0; n < N; n++) {
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(w[n * row + p * step]);
            for (int g = 0; g < G; g++) sum[n][g] = _mm512_dpbf16_ps(sum[n][g], given[g], weight);
        }
    }
}

static inline void transpose16(__m512i (&r)[16]) {  // 16 x 16 words
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

// Rows of x, `pairs` words each, into sixteen lanes of a packed matrix whose words of one pair stand `stride` apart; a
// missing row is a row of zeros.
static void pack(const bf16* const* x, i64 rows, i64 pairs, uint32_t* to, i64 stride) {
    for (i64 p = 0; p < pairs; p += LANES) {
        const i64 some = pairs - p < LANES ? pairs - p : LANES;
        const __mmask16 there = some == LANES ? 0xffff : (1 << some) - 1;
        __m512i words[LANES];
        for (int r = 0; r < LANES; r++)
            words[r] = r < rows ? _mm512_maskz_loadu_epi32(there, (const uint32_t*)x[r] + p) : _mm512_setzero_si512();
        transpose16(words);
        for (i64 i = 0; i < some; i++) _mm512_storeu_si512(to + (p + i) * stride, words[i]);
    }
}

// Sixteen columns of sixteen rows: from a lane for each row to a vector for each row.
static inline void rows_of(const __m512* columns, i64 stride, __m512 (&row)[LANES]) {
    __m512i words[LANES];
    for (int c = 0; c < LANES; c++) words[c] = _mm512_castps_si512(columns[c * stride]);
    transpose16(words);
    for (int r = 0; r < LANES; r++) row[r] = _mm512_castsi512_ps(words[r]);
}

// Pairs of neighbours turned. Products are rounded before they are added up, as PyTorch does it.
static void rotate(const bf16* x, const float* cos, const float* sin, bf16* out, i64 size) {
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;  // in so many words, or they would be fused
    for (i64 i = 0; i < size / 2; i += LANES) {
        const __mmask16 there = first16(size / 2 - i);
        const __m512i both = _mm512_maskz_loadu_epi32(there, x + 2 * i);
        const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
        const __m512 c = _mm512_maskz_loadu_ps(there, cos + i), s = _mm512_maskz_loadu_ps(there, sin + i);
        const __m512 one = _mm512_sub_ps(_mm512_mul_round_ps(a, c, NEAREST), _mm512_mul_round_ps(b, s, NEAREST));
        const __m512 two = _mm512_add_ps(_mm512_mul_round_ps(b, c, NEAREST), _mm512_mul_round_ps(a, s, NEAREST));
        _mm512_mask_storeu_epi32(out + 2 * i, there, paired(one, two));
    }
}
"""
