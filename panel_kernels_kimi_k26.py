"""The CPU's kernels of many rows: products of rows with panels of weights, in bfloat16 where the processor has such products."""

PANELS = r"""
// ---------------------------------------------------------------------------------------- panels

// Weights are turned, a panel of outputs at a time, so that each output has a lane of a vector. Every
// row then meets them a pair of values at a time, and any number of rows is as good. INT4 words are unpacked on the way, which
// costs nothing beside the products of a few rows.
enum { PANEL = 32, HEIGHT = 5, STRETCH = 32 };  // outputs of a panel; rows that registers hold; inputs whose sum is scaled

// One row as panels want it, in words: pairs of inputs, and of each stretch what is too much (see `unpacked`). A pair has the
// inputs that a shift of INT4 words brings together: of eight the first and the fifth, and so on; of bfloat16 neighbours.
static inline i64 paired_size(i64 k) { return k / 2 + k / STRETCH; }
static inline __m512i as_pairs(__m512i x, bool packed) {  // 32 inputs
    const __m512i four = _mm512_setr_epi64(0x0005000100040000, 0x0007000300060002, 0x000d0009000c0008, 0x000f000b000e000a,
                                           0x0015001100140010, 0x0017001300160012, 0x001d0019001c0018, 0x001f001b001e001a);
    return packed ? _mm512_permutexvar_epi16(four, x) : x;
}
static inline void put_pairs(uint32_t* row, i64 k, i64 at, __m512i x, bool packed) {
    _mm512_storeu_si512(row + at / 2, as_pairs(x, packed));
    const __m512bh less = (__m512bh)_mm512_set1_epi16((short)narrow(-136));
    if (packed) ((float*)row)[k / 2 + at / STRETCH] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), less, (__m512bh)x));
}

struct Panel { uint32_t* words; float* scales; };  // (words of a row, PANEL), (groups of a row, PANEL)
static inline i64 panel_words(i64 k, i64 group) { return k / (group ? 8 : 2) * PANEL; }

// Outputs `from` on, of which there are `outputs`; the last stands for those that are missing.
static void fill(Panel to, Matrix m, i64 from, i64 outputs, i64 k, i64 group) {
    const i64 words = m.scales ? k / 8 : k / 2, groups = m.scales ? k / group : 0;
    for (i64 half = 0; half < PANEL; half += LANES) {
        const auto row = [&](int o) { return std::min(from + half + o, outputs - 1); };
        __m512i turned[LANES];
        for (i64 t = 0; t < words; t += LANES) {
            const i64 some = std::min<i64>(LANES, words - t);
            for (int o = 0; o < LANES; o++) turned[o] = _mm512_maskz_loadu_epi32(first16(some), (const uint32_t*)m.values + row(o) * words + t);
            transpose16(turned);
            for (i64 i = 0; i < some; i++) _mm512_storeu_si512(to.words + (t + i) * PANEL + half, turned[i]);
        }
        for (i64 g = 0; g < groups; g += LANES) {
            const i64 some = std::min<i64>(LANES, groups - g);
            for (int o = 0; o < LANES; o++)
                turned[o] = _mm512_castps_si512(wide16(m.scales + row(o) * groups + g, first16(some)));
            transpose16(turned);
            for (i64 i = 0; i < some; i++) _mm512_storeu_si512(to.scales + (g + i) * PANEL + half, turned[i]);
        }
    }
}

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
    fill(w, m, from, outputs, k, group);
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
