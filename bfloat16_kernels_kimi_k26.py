"""The CPU's kernels of few rows, of INT4 words, and of many rows, for processors with products of bfloat16, and so of bytes (VNNI).

Few rows meet INT4 words as integers of sixteen bits, two bytes each: products of bytes take half the time of those of bfloat16.
A value keeps 15 bits and a sign of the largest of its 32, which is more than bfloat16 has.

`PANELS` are the products of many rows where there are no tiles (`tile_kernels_kimi_k26`).
"""

BFLOAT16 = r"""
// ---------------------------------------------------------------------------------------- few rows

// y[r][o] = w[o] . x[r], one row of w after the other: memory is fastest where it is read as it lies.
// Each has two sums, of every other line, which do not wait for each other, where registers hold them for all rows.
template <int O, int R> static inline void dots(const bf16* w, const bf16* const* x, i64 k, float (*y)[BLOCK]) {
    constexpr int PARTS = ROWS * 4 > REGISTERS ? 1 : 2;
    __m512 sum[R][O];
    #pragma GCC unroll 4
    for (int o = 0; o < O; o++, w += k) {
        __m512 part[R][PARTS];
        for (int r = 0; r < R; r++) for (int n = 0; n < PARTS; n++) part[r][n] = _mm512_setzero_ps();
        const auto meet = [&](i64 i, int n, __mmask32 there) {
            ask_ahead(w + i);
            const __m512bh weight = load32(w + i, there);
            for (int r = 0; r < R; r++) part[r][n] = _mm512_dpbf16_ps(part[r][n], weight, load32(x[r] + i, there));
        };
        i64 i = 0;
        for (; i + 32 * PARTS <= k; i += 32 * PARTS) for (int n = 0; n < PARTS; n++) meet(i + 32 * n, n, ~0u);
        for (; i < k; i += 32) meet(i, 0, first32(k - i));
        for (int r = 0; r < R; r++) sum[r][o] = PARTS == 1 ? part[r][0] : _mm512_add_ps(part[r][0], part[r][1]);
    }
    settle<O, R>(sum, y);
}

// ---------------------------------------------------------------------------------------- INT4 words and few rows

// A spread row has the values themselves, then units of 128 inputs, which is what a line of INT4 words has: of each 32 values the largest
// sets a scale, and they become integers in two bytes, of even and of odd inputs, as a word's bytes have one of each. A lane of products
// has four bytes of words, eight values; of it the scale, and what is too much, as INT4 values are stored as v + 8.
enum { UNIT = 128, SPREAD = 192, MOST_GIVEN = 127 * 257 };  // inputs, and words of sixteen bits, of a unit; the largest integer
static const float LEAST = 1e-30f;  // what has no larger value is zero: its scale could not be divided by
struct Unit { __m512i upper[2], lower[2]; __m512 scale, less; };
static inline i64 spread_size(i64 k) { return k + (k + UNIT - 1) / UNIT * SPREAD; }
static void complete(bf16* row, i64 k) {  // once the values are there
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1)), half = _mm512_set1_epi32(128);
    for (i64 i = 0; i < (k + UNIT - 1) / UNIT * UNIT; i += 32) {
        const __mmask16 there = first16(k - i);
        const __m512 low = wide16(row + i, there), high = wide16(row + i + LANES, there);
        const auto size = [](__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); };
        const int bits = _mm512_reduce_max_epi32(_mm512_max_epi32(size(low), size(high)));
        float top;
        memcpy(&top, &bits, sizeof top);
        const bool finite = bits < 0x7f800000, usual = finite && top > LEAST;
        const float scale = usual ? top / MOST_GIVEN : finite ? 0 : NAN;
        const __m512 factor = _mm512_set1_ps(usual ? MOST_GIVEN / top : 0);
        const auto integers = [&](__m512i which) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_permutex2var_ps(low, which, high), factor)); };
        const __m512i values[2] = {integers(evens), integers(odds)};
        Unit& unit = *(Unit*)(row + k + i / UNIT * SPREAD);
        const i64 part = i % UNIT / 32;  // a quarter of each vector
        for (int odd = 0; odd < 2; odd++) {
            _mm_storeu_si128((__m128i*)&unit.upper[odd] + part, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(values[odd], half), 8)));
            _mm_storeu_si128((__m128i*)&unit.lower[odd] + part, _mm512_cvtepi32_epi8(values[odd]));
        }
        int sum[LANES];
        _mm512_storeu_si512(sum, _mm512_add_epi32(values[0], values[1]));
        float less[4];
        for (int n = 0; n < 4; n++) less[n] = (sum[4 * n] + sum[4 * n + 1] + sum[4 * n + 2] + sum[4 * n + 3]) * -8 * scale;
        memcpy((__m128*)&unit.less + part, less, sizeof less);
        _mm_storeu_ps((float*)((__m128*)&unit.scale + part), _mm_set1_ps(scale));
    }
}

// The scales of one unit's groups, of which there are `there`, for the lanes of its sums.
static inline __m512 lane_scales(const bf16* scales, __mmask8 there, __m512i group_of) {
    const __m512i some = _mm512_castsi128_si512(_mm_maskz_loadu_epi16(there, scales));
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, group_of, some));  // the upper half of a float
}

// y[r][o] = w[o] . x[r] for INT4 words and spread x: the sums of a lane are exact. A group has 32, 64, 128, … inputs. Two rows of w share
// what is loaded of x, as long as registers hold the sums.
template <int O, int R>
static inline void dots4(const uint8_t* w, const bf16* scales, const bf16* const* x, i64 k, i64 group, float (*y)[BLOCK]) {
    const i64 groups = k / group;
    const int fold = __builtin_ctzll(group / 32);  // 2^fold times 32 inputs have one scale
    const __mmask8 whole_scales = (1 << std::max(4 >> fold, 1)) - 1;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), four_bits = _mm512_set1_epi32(0x0f0f0f0f);
    const __m512i group_of = _mm512_slli_epi32(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(2 + std::min(fold, 2))), 16);
    constexpr int N = O < 2 || R > REGISTERS / 8 ? 1 : 2;  // rows of w at a time
    __m512 sum[R][O];
    const Unit* given[R];
    for (int r = 0; r < R; r++) given[r] = (const Unit*)(x[r] + k);
    #pragma GCC unroll 4
    for (int o = 0; o < O; o += N, w += N * k / 2, scales += N * groups) {
        __m512 total[N][R];  // apart from the others, or the compiler keeps them in memory
        for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) total[n][r] = _mm512_setzero_ps();
        _mm_prefetch((const char*)scales + AHEAD / 8, _MM_HINT_T1);
        if (N == 2) _mm_prefetch((const char*)(scales + groups) + AHEAD / 8, _MM_HINT_T1);
        const auto meet = [&](i64 i, __mmask32 there, __mmask8 scales_there) {
            __m512i even[N], odd[N];
            __m512 factor[N];
            for (int n = 0; n < N; n++) {
                ask_ahead(w + (n * k + i) / 2);
                const __m512i words = _mm512_maskz_loadu_epi16(there, w + (n * k + i) / 2);
                even[n] = _mm512_and_si512(words, four_bits);
                odd[n] = _mm512_and_si512(_mm512_srli_epi16(words, 4), four_bits);
                factor[n] = lane_scales(scales + n * groups + (i / 32 >> fold), scales_there, group_of);
            }
            for (int r = 0; r < R; r++) {
                const Unit& u = given[r][i / UNIT];
                const auto at = [](const void* from) { return _mm512_loadu_si512(from); };
                for (int n = 0; n < N; n++) {
                    __m512i all = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even[n], at(u.upper));
                    all = _mm512_slli_epi32(_mm512_dpbusd_epi32(all, odd[n], at(u.upper + 1)), 8);
                    all = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(all, even[n], at(u.lower)), odd[n], at(u.lower + 1));
                    const __m512 part = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_loadu_ps(&u.scale), _mm512_loadu_ps(&u.less));
                    total[n][r] = _mm512_fmadd_ps(part, factor[n], total[n][r]);
                }
            }
        };
        i64 i = 0;
        for (; i + UNIT <= k; i += UNIT) meet(i, ~0u, whole_scales);
        if (i < k) meet(i, (1u << (k - i) / 4) - 1, (1 << std::max<i64>((k - i) / group, 1)) - 1);
        for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) sum[r][o + n] = total[n][r];
    }
    settle<O, R>(sum, y);
}

// ---------------------------------------------------------------------------------------- many rows: what all ways of them share

enum { PANEL = 32, STRETCH = 32 };  // outputs of a panel; inputs whose sum is scaled

// INT4 values of words, at places 4 * i + n: set into the lower bits of the bfloat16 number 128 a value v, stored as v + 8, becomes 136 + v.
static inline __m512bh unpacked(__m512i words, int n) {
    const __m512i some = n ? _mm512_srli_epi16(words, 4 * n) : words;
    return (__m512bh)_mm512_ternarylogic_epi32(some, _mm512_set1_epi16(0x000f), _mm512_set1_epi16(0x4300), 0xea);  // (a & b) | c
}

// A pair has the inputs that a shift of INT4 words brings together: of eight the first and the fifth, and so on; of bfloat16 neighbours.
static inline __m512i as_pairs(__m512i x, bool packed) {  // 32 inputs
    const __m512i four = _mm512_setr_epi64(0x0005000100040000, 0x0007000300060002, 0x000d0009000c0008, 0x000f000b000e000a,
                                           0x0015001100140010, 0x0017001300160012, 0x001d0019001c0018, 0x001f001b001e001a);
    return packed ? _mm512_permutexvar_epi16(four, x) : x;
}

// `load(o, t, there)`: words `t` on of row `o`, those that are there; `put(t, words)` gets one of each of sixteen rows.
template <class L, class P> static inline void turn(i64 words, L load, P put) {
    for (i64 t = 0; t < words; t += LANES) {
        const i64 some = std::min<i64>(LANES, words - t);
        __m512i turned[LANES];
        for (int o = 0; o < LANES; o++) turned[o] = load(o, t, first16(some));
        transpose16(turned);
        for (i64 i = 0; i < some; i++) put(t + i, turned[i]);
    }
}

struct Panel { uint32_t* words; float* scales; };  // (words of a row, PANEL), (groups of a row, PANEL)

// Outputs `from` on, of which there are `outputs`; the last stands for those that are missing. The scales are stored; then
// `put(t, half, words)` gets word `t` of sixteen outputs, of the first or the second half of the panel (0 or LANES).
template <class P> static void fill(Panel to, Matrix m, i64 from, i64 outputs, i64 k, i64 group, P put) {
    const i64 words = m.scales ? k / 8 : k / 2, groups = m.scales ? k / group : 0;
    for (i64 half = 0; half < PANEL; half += LANES) {
        const auto row = [&](int o) { return std::min(from + half + o, outputs - 1); };
        turn(groups, [&](int o, i64 g, __mmask16 there) { return _mm512_castps_si512(wide16(m.scales + row(o) * groups + g, there)); },
             [&](i64 g, __m512i some) { _mm512_storeu_si512(to.scales + g * PANEL + half, some); });
        turn(words, [&](int o, i64 t, __mmask16 there) { return _mm512_maskz_loadu_epi32(there, (const uint32_t*)m.values + row(o) * words + t); },
             [&](i64 t, __m512i some) { put(t, half, some); });
    }
}

// Let the weights of some outputs come nearer while others are being multiplied.
static void ask_for(Ahead weights) { weights.ask((weights.end - weights.at + weights.last - weights.then) / 64); }
"""

PANELS = r"""
// ---------------------------------------------------------------------------------------- many rows: panels of weights

// Weights are turned, a panel of outputs at a time, so that each output has a lane of a vector. Every
// row then meets them a pair of values at a time, and any number of rows is as good. INT4 words are unpacked on the way, which
// costs little beside the products of a few rows; many rows meet words that have been.
enum { HEIGHT = 5, MANY = 40 };  // rows that registers hold; that are many

// One row as panels want it, in words: pairs of inputs, and of each stretch what is too much (see `unpacked`).
static inline i64 room_for(i64 rows) { return rows; }
static inline i64 paired_size(i64 k) { return k / 2 + k / STRETCH; }
static inline void put_pairs(uint32_t* row, i64 k, i64 at, __m512i x, bool packed) {
    _mm512_storeu_si512(row + at / 2, as_pairs(x, packed));
    const __m512bh less = (__m512bh)_mm512_set1_epi16((short)narrow(-136));
    if (packed) ((float*)row)[k / 2 + at / STRETCH] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), less, (__m512bh)x));
}

static inline i64 panel_words(i64 k) { return k / 2 * PANEL; }

// y[r] = the panel's outputs for R rows of pairs, `row` words apart: (R, PANEL). SCALED: the sums of stretches. PAIRS of a word: 1 or 4.
template <int R, bool SCALED, int PAIRS> static void meet(Panel w, i64 group, const uint32_t* x, i64 row, i64 k, float* y) {
    constexpr int V = PANEL / LANES;
    __m512 sum[R][V];
    for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
    const uint32_t* words = w.words;
    for (i64 s = 0, p = 0; s < k / STRETCH; s++) {
        __m512 part[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) part[r][v] = SCALED ? _mm512_set1_ps(((const float*)x)[r * row + k / 2 + s]) : sum[r][v];
        for (int four = 0; four < STRETCH / 8; four++, words += 4 / PAIRS * PANEL)
            #pragma GCC unroll 4
            for (int n = 0; n < 4; n++, p++) {
                __m512i some[V];
                for (int v = 0; v < V; v++) {
                    some[v] = _mm512_loadu_si512(words + n / PAIRS * PANEL + v * LANES);
                    if (PAIRS == 4) some[v] = (__m512i)unpacked(some[v], n);
                }
                for (int v = 0; v < V; v++) keep(some[v]);  // or the compiler keeps them in memory
                for (int r = 0; r < R; r++) {
                    const __m512bh given = (__m512bh)_mm512_set1_epi32(x[r * row + p]);
                    for (int v = 0; v < V; v++) part[r][v] = _mm512_dpbf16_ps(part[r][v], (__m512bh)some[v], given);
                }
            }
        const float* scales = SCALED ? w.scales + s * STRETCH / group * PANEL : nullptr;
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++)
                sum[r][v] = SCALED ? _mm512_fmadd_ps(part[r][v], _mm512_loadu_ps(scales + v * LANES), sum[r][v]) : part[r][v];
    }
    for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) _mm512_storeu_ps(y + r * PANEL + v * LANES, sum[r][v]);
}

// y[r] = outputs `from` on of a matrix, a panel of them, for all rows.
static void meet(Panel w, Matrix m, i64 from, i64 outputs, i64 group, const uint32_t* x, i64 rows, i64 row, i64 k, float* y) {
    const bool unpack = m.scales && rows >= MANY;
    fill(w, m, from, outputs, k, group, [&](i64 t, i64 half, __m512i words) {
        if (!unpack) _mm512_storeu_si512(w.words + t * PANEL + half, words);
        else for (int n = 0; n < 4; n++) _mm512_storeu_si512(w.words + (4 * t + n) * PANEL + half, (__m512i)unpacked(words, n));
    });
    const i64 pieces = (rows + HEIGHT - 1) / HEIGHT;  // of about as many rows each
    for (i64 piece = 0; piece < pieces; piece++) {
        const i64 first = rows * piece / pieces;
        with_constant<HEIGHT>(rows * (piece + 1) / pieces - first, [&](auto count) {
            const auto some = !m.scales ? meet<count, false, 1> : unpack ? meet<count, true, 1> : meet<count, true, 4>;
            some(w, group, x + first * row, row, k, y + first * PANEL);
        });
    }
}
"""
