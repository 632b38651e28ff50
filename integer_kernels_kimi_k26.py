"""The CPU's kernels of many rows where the processor has no products in bfloat16: they are taken in integers of sixteen bits.

AVX2 multiplies and adds sixteen pairs of such integers in the time of eight fused products in float32. Of each 32 values of a
row, or 32 weights of an output, the largest sets a scale; sums of 32 products are exact, and are scaled and added up in float32.
A row's values keep 14 bits and a sign, weights 12 (INT4 all they have): rounding them makes less of an error than the eight bits
of bfloat16 that they come with.
"""

INTEGERS = r"""
// ---------------------------------------------------------------------------------------- panels, in integers

// Outputs of a panel; rows that registers hold; values that have one scale; the largest integers, 32 of whose products fit a word.
enum { PANEL = 32, HEIGHT = 6, STRETCH = 32, MOST_GIVEN = 16383, MOST_WEIGHT = 4095 };
static const float LEAST = 1e-30f;  // what has no larger value is zero: its scale could not be divided by

// Thirty-two bfloat16 values as integers, in order; returns their scale, which is NaN if one is not finite.
static inline float to_integers(__m512i x, __m512i& to) {
    const __m256i size = _mm256_set1_epi16(0x7fff);
    const __m256i larger = _mm256_max_epi16(_mm256_and_si256(x.low, size), _mm256_and_si256(x.high, size));
    const __m128i largest = _mm_max_epi16(_mm256_castsi256_si128(larger), _mm256_extracti128_si256(larger, 1));
    const bf16 bits = 0x7fff - _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(0x7fff), largest)));
    const float top = wide(bits);
    if (!(top > LEAST && bits < 0x7f80)) {
        to = _mm512_setzero_si512();
        return top > LEAST || bits >= 0x7f80 ? NAN : 0;
    }
    const __m256 factor = _mm256_set1_ps(MOST_GIVEN / top);
    const auto eight = [&](__m128i some) {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16)), factor));
    };
    const auto sixteen = [&](__m256i some) {
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(eight(_mm256_castsi256_si128(some)), eight(_mm256_extracti128_si256(some, 1))), 0xd8);
    };
    to = {sixteen(x.low), sixteen(x.high)};
    return top / MOST_GIVEN;
}

// One row as panels want it, in words: pairs of inputs, then the scales. A pair has the inputs that a shift of INT4 words brings
// together: of eight the first and the fifth, and so on; of bfloat16 neighbours.
static inline i64 paired_size(i64 k) { return k / 2 + k / STRETCH; }
static inline void put_pairs(uint32_t* row, i64 k, i64 at, __m512i x, bool packed) {
    __m512i values;
    ((float*)row)[k / 2 + at / STRETCH] = to_integers(x, values);
    const auto fifth = [](__m256i some) { return _mm256_unpacklo_epi16(some, _mm256_srli_si256(some, 8)); };
    if (packed) values = {fifth(values.low), fifth(values.high)};
    _mm512_storeu_si512(row + at / 2, values);
}

// Weights are turned, a panel of outputs at a time, so that each output has a lane of a vector.
struct Panel { uint32_t* words; float* scales; };  // (pairs of a row, PANEL), (scales of a row, PANEL)
static inline i64 panel_words(i64 k, i64 group) { return k / 2 * PANEL; }

// Sixteen pairs of weights of eight outputs, one to a lane; returns the scales.
static inline __m256 to_integers(const __m256i* x, i64 step, uint32_t* to) {
    const __m256i size = _mm256_set1_epi16(0x7fff), upper = _mm256_set1_epi32(0xffff0000);
    __m256i larger = _mm256_setzero_si256();
    for (int p = 0; p < STRETCH / 2; p++) larger = _mm256_max_epi16(larger, _mm256_and_si256(x[p * step], size));
    larger = _mm256_slli_epi32(_mm256_max_epi16(larger, _mm256_srli_epi32(larger, 16)), 16);
    const __m256 top = _mm256_castsi256_ps(larger), some = _mm256_cmp_ps(top, _mm256_set1_ps(LEAST), _CMP_GT_OQ);
    const __m256 endless = _mm256_castsi256_ps(_mm256_cmpgt_epi32(larger, _mm256_set1_epi32(0x7f7fffff)));
    const __m256 factor = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(MOST_WEIGHT), top));
    for (int p = 0; p < STRETCH / 2; p++) {
        const __m256i one = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x[p * step], 16)), factor));
        const __m256i two = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(x[p * step], upper)), factor));
        _mm256_storeu_si256((__m256i*)(to + p * PANEL), _mm256_blend_epi16(one, _mm256_slli_epi32(two, 16), 0xaa));
    }
    return _mm256_or_ps(_mm256_and_ps(some, _mm256_mul_ps(top, _mm256_set1_ps(1.0f / MOST_WEIGHT))), endless);
}

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
            if (!m.scales) {
                float* scales = to.scales + t / LANES * PANEL + half;
                for (int eight = 0; eight < 2; eight++)
                    _mm256_storeu_ps(scales + eight * 8, to_integers((const __m256i*)turned + eight, 2, to.words + t * PANEL + half + eight * 8));
                continue;
            }
            for (i64 i = 0; i < some; i++)
                for (int n = 0; n < 4; n++) {  // stored as v + 8
                    const __m512i values = _mm512_and_si512(_mm512_srli_epi16(turned[i], 4 * n), _mm512_set1_epi16(15));
                    _mm512_storeu_si512(to.words + ((t + i) * 4 + n) * PANEL + half, _mm512_add_epi16(values, _mm512_set1_epi16(-8)));
                }
        }
        for (i64 g = 0; g < groups; g += LANES) {
            const i64 some = std::min<i64>(LANES, groups - g);
            for (int o = 0; o < LANES; o++) turned[o] = _mm512_castps_si512(wide16(m.scales + row(o) * groups + g, first16(some)));
            transpose16(turned);
            for (i64 i = 0; i < some; i++) _mm512_storeu_si512(to.scales + (g + i) * PANEL + half, turned[i]);
        }
    }
}

// y[r] += sixteen outputs of a panel for R rows of pairs, `row` words apart. Each scale of the panel is for `same` stretches. The
// compiler would rather load all rows of x first, and keep sums in memory then: hence the assembler.
template <int R> static __attribute__((noinline)) void meet(Panel w, i64 same, const uint32_t* x, const float* scales, i64 row, i64 stretches, float* y) {
    for (i64 s = 0; s < stretches; s++, x += STRETCH / 2) {
        asm volatile("" ::: "memory");  // or y would stay in registers that the sums need
        __m256i part[R][2];
        for (int r = 0; r < R; r++) part[r][0] = part[r][1] = _mm256_setzero_si256();
        #pragma GCC unroll 2
        for (int p = 0; p < STRETCH / 2; p++, w.words += PANEL) {
            __m256i weight[2];
            for (int v = 0; v < 2; v++) {
                weight[v] = _mm256_loadu_si256((const __m256i*)w.words + v);
                asm volatile("" : "+x"(weight[v]));
            }
            for (int r = 0; r < R; r++) {
                __m256i given, product;
                asm volatile("vpbroadcastd %1, %0" : "=x"(given) : "m"(x[r * row + p]));
                for (int v = 0; v < 2; v++)
                    asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(part[r][v]), "=&x"(product) : "x"(given), "x"(weight[v]));
            }
        }
        for (int v = 0; v < 2; v++) {
            const __m256 scale = _mm256_loadu_ps(w.scales + s / same * PANEL + v * 8);
            for (int r = 0; r < R; r++) {
                float* to = y + r * PANEL + v * 8;
                const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(scales[r * row + s]));
                _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(part[r][v]), both, _mm256_loadu_ps(to)));
            }
        }
    }
}

// y[r] += a panel's outputs, for any number of rows, whose scales lie apart from their pairs: (rows, PANEL).
static void meet(Panel w, i64 same, const uint32_t* x, const float* scales, i64 rows, i64 row, i64 stretches, float* y) {
    const i64 pieces = (rows + HEIGHT - 1) / HEIGHT;  // of about as many rows each
    for (i64 half = 0; half < PANEL; half += LANES, w.words += LANES, w.scales += LANES, y += LANES)
        for (i64 piece = 0; piece < pieces; piece++) {
            const i64 first = rows * piece / pieces;
            const auto some = [&](auto count) { meet<count>(w, same, x + first * row, scales + first * row, row, stretches, y + first * PANEL); };
            switch (rows * (piece + 1) / pieces - first) {
                case 1: some(std::integral_constant<int, 1>()); break;
                case 2: some(std::integral_constant<int, 2>()); break;
                case 3: some(std::integral_constant<int, 3>()); break;
                case 4: some(std::integral_constant<int, 4>()); break;
                case 5: some(std::integral_constant<int, 5>()); break;
                default: some(std::integral_constant<int, HEIGHT>());
            }
        }
}

// y[r] = outputs `from` on of a matrix, a panel of them, for all rows.
static void meet(Panel w, Matrix m, i64 from, i64 outputs, i64 group, const uint32_t* x, i64 rows, i64 row, i64 k, float* y) {
    fill(w, m, from, outputs, k, group);
    memset(y, 0, rows * PANEL * sizeof(float));
    meet(w, m.scales ? group / STRETCH : 1, x, (const float*)x + k / 2, rows, row, k / STRETCH, y);
}
"""
