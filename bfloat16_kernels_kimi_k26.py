"""The CPU's kernels of INT4 words, and of many rows, in products of bfloat16: for processors that have them.

`PANELS` are the products of many rows where there are no tiles (`tile_kernels_kimi_k26`).
"""

BFLOAT16 = r"""
// ---------------------------------------------------------------------------------------- INT4 words and few rows

// INT4 values are unpacked a line of memory at a time. Set into the lower bits of the bfloat16 number 128 a value v, stored
// as v + 8, becomes 136 + v; what that is too much is taken off each sum. x comes `spread` for it: of each unit the
// values at places 4 * i, then those at 4 * i + 1, 4 * i + 2, 4 * i + 3, then sixteen sums to begin with, in float. A last
// unit that is not full has zeros.
enum { UNIT = 128, SPREAD = UNIT + 32 };
static inline __m512bh unpacked(__m512i words, int n) {  // values at places 4 * i + n
    const __m512i some = n ? _mm512_srli_epi16(words, 4 * n) : words;
    return (__m512bh)_mm512_ternarylogic_epi32(some, _mm512_set1_epi16(0x000f), _mm512_set1_epi16(0x4300), 0xea);  // (a & b) | c
}
static inline __m512 too_much(const bf16* unit) {  // four times 32 values, however they stand
    const __m512bh less = (__m512bh)_mm512_set1_epi16((short)narrow(-136));
    __m512 sum = _mm512_setzero_ps();
    for (int n = 0; n < 4; n++) sum = _mm512_dpbf16_ps(sum, less, load32(unit + n * 32));
    return sum;
}

static inline i64 spread_size(i64 k) { return (k + UNIT - 1) / UNIT * SPREAD; }
static inline bf16* spread_place(bf16* row, i64 k) { return row + k / UNIT * SPREAD + k % 4 * (UNIT / 4) + k % UNIT / 4; }
static void complete(bf16* row, i64 k) {  // once the values are there
    for (i64 unit = 0; unit < k; unit += UNIT, row += SPREAD) _mm512_storeu_ps(row + UNIT, too_much(row));
}
// Sixteen values from place `o` of a row on, put where `spread` would.
static inline void store_spread(bf16* row, i64 o, __m256i values) {
    const __m256i by_place = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    alignas(32) uint64_t four[4];
    _mm256_store_si256((__m256i*)four, _mm256_permutexvar_epi16(by_place, values));
    for (int n = 0; n < 4; n++) memcpy(spread_place(row, o + n), four + n, sizeof *four);
}
static void spread(const bf16* x, i64 k, bf16* to) {
    if (k % UNIT) memset(to + k / UNIT * SPREAD, 0, SPREAD * sizeof(bf16));
    for (i64 i = 0; i < k; i++) *spread_place(to, i) = x[i];
    complete(to, k);
}

// The scales of one unit's groups, of which there are `there`, for the lanes of its sums.
static inline __m512 lane_scales(const bf16* scales, __mmask8 there, __m512i group_of) {
    const __m512i some = _mm512_castsi128_si512(_mm_maskz_loadu_epi16(there, scales));
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, group_of, some));  // the upper half of a float
}

// y[r][o] = w[o] . x[r] for INT4 words and spread x: integers are multiplied exactly, and each group's sum is scaled. A group has 32, 64,
// 128, … inputs. Two rows of w share what is loaded of x, as long as registers hold the sums: their words are half the time.
template <int O, int R>
static inline void dots4(const uint8_t* w, const bf16* scales, const bf16* const* x, i64 k, i64 group, float (*y)[BLOCK]) {
    const i64 groups = k / group;
    const int fold = __builtin_ctzll(group / 32);  // 2^fold times 32 inputs have one scale
    const __mmask8 whole_scales = (1 << std::max(4 >> fold, 1)) - 1;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i group_of = _mm512_slli_epi32(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(2 + std::min(fold, 2))), 16);
    constexpr int N = O < 2 || R > REGISTERS / 8 ? 1 : 2;  // rows of w at a time
    __m512 sum[R][O];
    #pragma GCC unroll 4
    for (int o = 0; o < O; o += N, w += N * k / 2, scales += N * groups) {
        __m512 total[N][R];  // apart from the others, or the compiler keeps them in memory
        for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) total[n][r] = _mm512_setzero_ps();
        _mm_prefetch((const char*)scales + AHEAD / 8, _MM_HINT_T1);
        if (N == 2) _mm_prefetch((const char*)(scales + groups) + AHEAD / 8, _MM_HINT_T1);
        const auto meet = [&](i64 i, __mmask32 there, __mmask8 scales_there) {
            const i64 unit = i / UNIT * SPREAD;
            __m512i words[N];
            __m512 part[N][R];
            for (int n = 0; n < N; n++) {
                ask_ahead(w + (n * k + i) / 2);
                words[n] = _mm512_maskz_loadu_epi16(there, w + (n * k + i) / 2);
            }
            for (int r = 0; r < R; r++) {
                const __m512 less = _mm512_loadu_ps(x[r] + unit + UNIT);
                for (int n = 0; n < N; n++) part[n][r] = less;
            }
            for (int q = 0; q < 4; q++) {
                __m512bh weight[N];
                for (int n = 0; n < N; n++) weight[n] = unpacked(words[n], q);
                for (int r = 0; r < R; r++) {
                    const __m512bh given = load32(x[r] + unit + q * (UNIT / 4));
                    for (int n = 0; n < N; n++) part[n][r] = _mm512_dpbf16_ps(part[n][r], weight[n], given);
                }
            }
            for (int n = 0; n < N; n++) {
                const __m512 factor = lane_scales(scales + n * groups + (i / 32 >> fold), scales_there, group_of);
                for (int r = 0; r < R; r++) total[n][r] = _mm512_fmadd_ps(part[n][r], factor, total[n][r]);
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
static void ask_for(Matrix m, i64 from, i64 k) {
    const i64 row = row_bytes(m, k);
    const char* begin = (const char*)m.values + from * row;
    for (const char* at = begin; at < begin + PANEL * row; at += 64) _mm_prefetch(at, _MM_HINT_T1);
}
"""

PANELS = r"""
// ---------------------------------------------------------------------------------------- many rows: panels of weights

// Weights are turned, a panel of outputs at a time, so that each output has a lane of a vector. Every
// row then meets them a pair of values at a time, and any number of rows is as good. INT4 words are unpacked on the way, which
// costs nothing beside the products of a few rows.
enum { HEIGHT = 5 };  // rows that registers hold

// One row as panels want it, in words: pairs of inputs, and of each stretch what is too much (see `unpacked`).
static inline i64 room_for(i64 rows) { return rows; }
static inline i64 paired_size(i64 k) { return k / 2 + k / STRETCH; }
static inline void put_pairs(uint32_t* row, i64 k, i64 at, __m512i x, bool packed) {
    _mm512_storeu_si512(row + at / 2, as_pairs(x, packed));
    const __m512bh less = (__m512bh)_mm512_set1_epi16((short)narrow(-136));
    if (packed) ((float*)row)[k / 2 + at / STRETCH] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), less, (__m512bh)x));
}

static inline i64 panel_words(i64 k, i64 group) { return k / (group ? 8 : 2) * PANEL; }

// y[r] = the panel's outputs for R rows of pairs, `row` words apart: (R, PANEL).
template <int R, bool PACKED> static void meet(Panel w, i64 group, const uint32_t* x, i64 row, i64 k, float* y) {
    constexpr int WORDS = PACKED ? STRETCH / 8 : STRETCH / 2, PAIRS = PACKED ? 4 : 1;  // of a stretch, of a word
    constexpr int V = 2;  // vectors of outputs at a time
    for (int from = 0; from < PANEL; from += V * LANES) {
        __m512 sum[R][V];
        for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
        const uint32_t* words = w.words + from;
        for (i64 s = 0, p = 0; s < k / STRETCH; s++) {
            __m512 part[R][V];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) part[r][v] = PACKED ? _mm512_set1_ps(((const float*)x)[r * row + k / 2 + s]) : sum[r][v];
            for (int t = 0; t < WORDS; t++, words += PANEL)
                for (int n = 0; n < PAIRS; n++, p++) {
                    __m512i some[V];
                    for (int v = 0; v < V; v++) {
                        some[v] = _mm512_loadu_si512(words + v * LANES);
                        if (PACKED) some[v] = (__m512i)unpacked(some[v], n);
                    }
                    for (int v = 0; v < V; v++) keep(some[v]);  // or the compiler keeps them in memory
                    for (int r = 0; r < R; r++) {
                        const __m512bh given = (__m512bh)_mm512_set1_epi32(x[r * row + p]);
                        for (int v = 0; v < V; v++) part[r][v] = _mm512_dpbf16_ps(part[r][v], (__m512bh)some[v], given);
                    }
                }
            const float* scales = PACKED ? w.scales + s * STRETCH / group * PANEL + from : nullptr;
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++)
                    sum[r][v] = PACKED ? _mm512_fmadd_ps(part[r][v], _mm512_loadu_ps(scales + v * LANES), sum[r][v]) : part[r][v];
        }
        for (int r = 0; r < R; r++) for (int v = 0; v < V; v++) _mm512_storeu_ps(y + r * PANEL + from + v * LANES, sum[r][v]);
    }
}

// y[r] = outputs `from` on of a matrix, a panel of them, for all rows.
static void meet(Panel w, Matrix m, i64 from, i64 outputs, i64 group, const uint32_t* x, i64 rows, i64 row, i64 k, float* y) {
    fill(w, m, from, outputs, k, group, [&](i64 t, i64 half, __m512i words) { _mm512_storeu_si512(w.words + t * PANEL + half, words); });
    const i64 pieces = (rows + HEIGHT - 1) / HEIGHT;  // of about as many rows each
    for (i64 piece = 0; piece < pieces; piece++) {
        const i64 first = rows * piece / pieces;
        const auto some = [&](auto count) {
            if (m.scales) meet<count, true>(w, group, x + first * row, row, k, y + first * PANEL);
            else meet<count, false>(w, group, x + first * row, row, k, y + first * PANEL);
        };
        switch (rows * (piece + 1) / pieces - first) {
            case 1: some(std::integral_constant<int, 1>()); break;
            case 2: some(std::integral_constant<int, 2>()); break;
            case 3: some(std::integral_constant<int, 3>()); break;
            case 4: some(std::integral_constant<int, 4>()); break;
            default: some(std::integral_constant<int, HEIGHT>());
        }
    }
}
"""
