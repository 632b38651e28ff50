"""The CPU's kernels of products where the processor has none in bfloat16: in integers of sixteen bits, but for few rows and weights
in bfloat16, which are read once and become float32.

AVX2 multiplies and adds sixteen pairs of such integers in the time of eight fused products in float32. Of each 32 values of a
row, or 32 weights of an output, the largest sets a scale; sums of 32 products are exact, and are scaled and added up in float32.
A row's values keep 14 bits and a sign, weights 12 (INT4 all they have): rounding them makes less of an error than the eight bits
of bfloat16 that they come with.
"""

INTEGERS = r"""
// ---------------------------------------------------------------------------------------- integers of sixteen bits

// Outputs of a panel; rows that registers hold; values that have one scale; inputs of a panel that the nearest cache holds; the largest
// integers, 32 of whose products fit a word.
enum { PANEL = 32, HEIGHT = 6, STRETCH = 32, DEPTH = 512, MOST_GIVEN = 16383, MOST_WEIGHT = 4095 };
static const float LEAST = 1e-30f;  // what has no larger value is zero: its scale could not be divided by

// Memory that is needed very soon, all lines at once.
static inline void nearer(const void* from, i64 bytes) {
    for (const char *line = (const char*)from, *end = line + bytes; line < end; line += 64) _mm_prefetch(line, _MM_HINT_T0);
}

// One row of two parts; what is missing at the end is zero.
static void join(bf16* to, i64 size, const bf16* still, i64 nope, const bf16* turning, i64 rope) {
    memcpy(to, still, nope * sizeof(bf16));
    memcpy(to + nope, turning, rope * sizeof(bf16));
    memset(to + nope + rope, 0, (size - nope - rope) * sizeof(bf16));
}

// What makes the largest of bfloat16 values `most`, and the scale of such integers: NaN if a value is not finite.
static inline float scale_of(const bf16* x, i64 count, int most, float& factor) {
    __m256i larger = _mm256_setzero_si256();
    #pragma GCC unroll 4
    for (i64 i = 0; i < count; i += 16) larger = _mm256_max_epi16(larger, _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(x + i)), _mm256_set1_epi16(0x7fff)));
    const __m128i largest = _mm_max_epi16(_mm256_castsi256_si128(larger), _mm256_extracti128_si256(larger, 1));
    const bf16 bits = 0x7fff - _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(0x7fff), largest)));
    const float top = wide(bits);
    const bool usual = bits < 0x7f80 && top > LEAST;
    factor = usual ? most / top : 0;
    return usual ? top * (1.0f / most) : bits < 0x7f80 ? 0 : NAN;
}
// Values of bfloat16, or of two vectors of floats as pairs, as integers.
static inline __m256i sixteen_integers(__m256i x, __m256 factor) {  // added to so much, the integer is what the lower bits are
    const auto rounded = [&](__m256 floats) { return _mm256_castps_si256(_mm256_fmadd_ps(floats, factor, _mm256_set1_ps(0x1.8p23f))); };
    return _mm256_blend_epi16(rounded(first_of(x)), _mm256_slli_epi32(rounded(second_of(x)), 16), 0xaa);
}
static inline __m512i pairs_of(__m512 one, __m512 two) {  // none is negative
    const auto eight = [](__m256 low, __m256 high) { return _mm256_or_si256(_mm256_cvtps_epi32(low), _mm256_slli_epi32(_mm256_cvtps_epi32(high), 16)); };
    return {eight(one.low, two.low), eight(one.high, two.high)};
}
// Of each eight integers pairs of those that a shift of INT4 words brings together: the first and the fifth, and so on.
static inline __m256i fifths(__m256i some) { return _mm256_unpacklo_epi16(some, _mm256_srli_si256(some, 8)); }
// Thirty-two bfloat16 values as integers, in order; returns their scale.
static inline float to_integers(const __m512i& x, __m512i& to) {
    float factor;
    const float scale = scale_of((const bf16*)&x, STRETCH, MOST_GIVEN, factor);
    to = {sixteen_integers(x.low, _mm256_set1_ps(factor)), sixteen_integers(x.high, _mm256_set1_ps(factor))};
    return scale;
}

// ---------------------------------------------------------------------------------------- few rows

// y[r][o] of neighbouring outputs, whose sums are eight lanes: see the other `settle`.
template <int O, int R> static inline void settle(const __m256 (&sum)[R][O], float (*y)[BLOCK]) {
    for (int r = 0; r < R; r++) {
        const auto of = [&](int o) { return o < O ? sum[r][o] : _mm256_setzero_ps(); };
        const __m256 fours = _mm256_hadd_ps(_mm256_hadd_ps(of(0), of(1)), _mm256_hadd_ps(of(2), of(3)));
        const __m128 all = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
        memcpy(y[r], &all, O * sizeof(float));
    }
}

// sum[p][n][r] += products of some neighbouring rows of w and of x, in float32: of even lines of values (p = 0), of odd ones or of both.
template <int N, int R, int FIRST, int LAST>
static inline void add_up(const bf16* w, const bf16* const* x, i64 k, i64 begin, i64 end, __m256 (&sum)[2][N][R]) {
    __m256 part[LAST - FIRST][N][R];  // in registers
    for (int p = FIRST; p < LAST; p++) for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) part[p - FIRST][n][r] = sum[p][n][r];
    const auto meet = [&](i64 i, int p, auto load) {
        __m256 first[N], second[N];
        for (int n = 0; n < N; n++) {
            const __m256i pairs = load(w + n * k + i);
            first[n] = first_of(pairs); second[n] = second_of(pairs);
        }
        for (int r = 0; r < R; r++) {
            const __m256i pairs = load(x[r] + i);
            for (int n = 0; n < N; n++) part[p - FIRST][n][r] = _mm256_fmadd_ps(first[n], first_of(pairs), part[p - FIRST][n][r]);
            for (int n = 0; n < N; n++) part[p - FIRST][n][r] = _mm256_fmadd_ps(second[n], second_of(pairs), part[p - FIRST][n][r]);
        }
    };
    const auto line = [&](i64 i, int p) {
        for (i64 at = i; at < i + 32; at += 16) meet(at, p, [](const bf16* x) { return _mm256_loadu_si256((const __m256i*)x); });
    };
    i64 i = begin;
    for (; i + 64 <= end; i += 64) {
        for (int n = FIRST * N / 2; n < LAST * N / 2; n++) for (int p = 0; p < 2; p++) ask_ahead(w + (N - 1 + n) * k + i + 32 * p);
        for (int p = FIRST; p < LAST; p++) line(i + 32 * p, p);
    }
    if (FIRST == 0) for (; i < end; i += 16) meet(i, 0, [&](const bf16* at) { return _mm256_maskz_loadu_epi16(first16(end - i), at); });
    for (int p = FIRST; p < LAST; p++) for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) sum[p][n][r] = part[p - FIRST][n][r];
}

// y[r][o] = w[o] . x[r]. Of one row of x, memory is fastest where w is read as it lies; of more, two rows of w share what x is turned to.
// What registers do not hold at once comes one after the other, while the values are near.
template <int O, int R> static inline void dots(const bf16* w, const bf16* const* x, i64 k, float (*y)[BLOCK]) {
    constexpr int N = O < 2 || R < 2 ? 1 : 2, NEAR = 512;
    __m256 total[R][O];
    #pragma GCC unroll 4
    for (int o = 0; o < O; o += N, w += N * k) {
        __m256 sum[2][N][R];
        for (auto& part : sum) for (auto& row : part) for (auto& one : row) one = _mm256_setzero_ps();
        if (2 * N * R <= 8) add_up<N, R, 0, 2>(w, x, k, 0, k, sum);
        else
            for (i64 begin = 0; begin < k; begin += NEAR) {
                const i64 end = std::min<i64>(begin + NEAR, k);
                add_up<N, R, 0, 1>(w, x, k, begin, end, sum);
                add_up<N, R, 1, 2>(w, x, k, begin, end, sum);
            }
        for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) total[r][o + n] = _mm256_add_ps(sum[0][n][r], sum[1][n][r]);
    }
    settle<O, R>(total, y);
}

// ---------------------------------------------------------------------------------------- INT4 words and few rows

// A spread row has the values themselves, then units of 64 inputs, which 32 bytes of INT4 words have in two halves of one group or more:
// its integers, every fourth one, as four shifts of the words bring them; what is too much, as INT4 values are stored as v + 8; its scale.
enum { UNIT = 64, SPREAD = 96 };  // inputs, and words of sixteen bits, of a unit
struct Unit { __m256i fourth[4], less; __m256 scale; };
static inline i64 spread_size(i64 k) { return k + (k + UNIT - 1) / UNIT * SPREAD; }
static void complete(bf16* row, i64 k) {  // once the values are there
    bf16* to = row + k;
    for (i64 i = 0; i < k; i += UNIT, to += SPREAD) {
        __m512i values[2];
        float scale[2]; int less[2];
        for (int half = 0; half < 2; half++) {
            values[half] = _mm512_setzero_si512();
            scale[half] = i + half * 32 < k ? to_integers(_mm512_loadu_si512(row + i + half * 32), values[half]) : 0;
            int all[8];
            const __m256i eights = _mm256_set1_epi16(-8);
            _mm256_storeu_si256((__m256i*)all, _mm256_add_epi32(_mm256_madd_epi16(values[half].low, eights), _mm256_madd_epi16(values[half].high, eights)));
            less[half] = std::accumulate(all, all + 8, 0);
        }
        // Eight neighbours of each half at a time, whose pairs are transposed.
        const auto eight = [](__m256i one, __m256i two, auto which) { return fifths(_mm256_permute2x128_si256(one, two, which)); };
        constexpr std::integral_constant<int, 0x20> FIRST; constexpr std::integral_constant<int, 0x31> SECOND;
        const __m256i a = eight(values[0].low, values[1].low, FIRST), b = eight(values[0].low, values[1].low, SECOND);
        const __m256i c = eight(values[0].high, values[1].high, FIRST), d = eight(values[0].high, values[1].high, SECOND);
        const __m256i ab[2] = {_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)}, cd[2] = {_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d)};
        Unit unit;
        for (int n = 0; n < 2; n++) {
            unit.fourth[2 * n] = _mm256_unpacklo_epi64(ab[n], cd[n]);
            unit.fourth[2 * n + 1] = _mm256_unpackhi_epi64(ab[n], cd[n]);
        }
        unit.less = _mm256_setr_epi32(less[0], 0, 0, 0, less[1], 0, 0, 0);
        unit.scale = _mm256_setr_ps(scale[0], scale[0], scale[0], scale[0], scale[1], scale[1], scale[1], scale[1]);
        memcpy(to, &unit, sizeof unit);
    }
}

// y[r][o] = w[o] . x[r] for INT4 words and spread x: the sums of each half of a unit are scaled.
template <int O, int R>
static inline void dots4(const uint8_t* w, const bf16* scales, const bf16* const* x, i64 k, i64 group, float (*y)[BLOCK]) {
    const int shift = __builtin_ctzll(group);  // a group has 2^shift inputs
    const i64 groups = k >> shift;
    const __m256i low = _mm256_set1_epi16(15);
    // Two scales in each word: the first as a float in four lanes, the second in the other four.
    const __m256i floats = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13, -1, -1, 2, 3, -1, -1, 6, 7, -1, -1, 10, 11, -1, -1, 14, 15);
    constexpr int N = O < 2 || R > 2 ? 1 : 2;  // rows of w at a time
    __m256 total[R][O];
    const Unit* given[R];
    for (int r = 0; r < R; r++) given[r] = (const Unit*)(x[r] + k);
    #pragma GCC unroll 4
    for (int o = 0; o < O; o += N, w += N * k / 2, scales += N * groups) {
        __m256 sum[N][R];  // apart from the others, or the compiler keeps them in memory
        for (auto& row : sum) for (auto& one : row) one = _mm256_setzero_ps();
        const auto meet = [&](const uint8_t* at, i64 unit, auto load, auto two_scales) {
            for (int n = 0; n < N; n++) {
                ask_ahead(at + n * k / 2);
                const __m256i words = load(at + n * k / 2);
                const __m256i weight[4] = {_mm256_and_si256(words, low), _mm256_and_si256(_mm256_srli_epi16(words, 4), low),
                                           _mm256_and_si256(_mm256_srli_epi16(words, 8), low), _mm256_srli_epi16(words, 12)};
                const __m256 scale = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(two_scales(scales + n * groups)), floats));
                for (int r = 0; r < R; r++) {
                    const Unit& u = given[r][unit];
                    const auto at = [](const void* from) { return _mm256_loadu_si256((const __m256i*)from); };
                    __m256i all = at(&u.less);
                    for (int f = 0; f < 4; f++) all = _mm256_add_epi32(all, _mm256_madd_epi16(weight[f], at(u.fourth + f)));
                    sum[n][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), _mm256_mul_ps(scale, _mm256_castsi256_ps(at(&u.scale))), sum[n][r]);
                }
            }
        };
        const i64 units = k / UNIT;
        const auto load = [](const uint8_t* at) { return _mm256_loadu_si256((const __m256i*)at); };
        if (group == STRETCH)
            for (i64 u = 0; u < units; u++) meet(w + u * UNIT / 2, u, load, [&](const bf16* at) { uint32_t two; memcpy(&two, at + 2 * u, 4); return two; });
        else
            for (i64 u = 0; u < units; u++) meet(w + u * UNIT / 2, u, load, [&](const bf16* at) { return at[u * UNIT >> shift] * 0x10001u; });
        if (k % UNIT)
            meet(w + units * UNIT / 2, units, [](const uint8_t* at) { return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)at)); },
                 [&](const bf16* at) { return (uint32_t)at[groups - 1]; });
        for (int n = 0; n < N; n++) for (int r = 0; r < R; r++) total[r][o + n] = sum[n][r];
    }
    settle<O, R>(total, y);
}

// ---------------------------------------------------------------------------------------- many rows: panels of weights

// One row as panels want it, in words: pairs of inputs, `fifths` for INT4 words, neighbours for bfloat16; then the scales.
static inline i64 room_for(i64 rows) { return rows; }
static inline i64 paired_size(i64 k) { return k / 2 + k / STRETCH; }
static inline void put_pairs(uint32_t* row, i64 k, i64 at, __m512i x, bool packed) {
    __m512i values;
    ((float*)row)[k / 2 + at / STRETCH] = to_integers(x, values);
    if (packed) values = {fifths(values.low), fifths(values.high)};
    _mm512_storeu_si512(row + at / 2, values);
}

// Weights are turned, a panel of outputs at a time, so that each output has a lane of a vector.
struct Panel { uint32_t* words; float* scales; };  // (pairs of a row, PANEL), (scales of a row, PANEL)
static inline i64 panel_words(i64 k) { return std::min<i64>(k, DEPTH) / 2 * PANEL; }

static inline void transpose8(__m256i* r) {  // 8 x 8 words
    __m256i t[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            r[4 * i + 2 * j] = _mm256_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        const __m256i low = r[i], high = r[4 + i];
        t[i] = _mm256_permute2x128_si256(low, high, 0x20);
        t[4 + i] = _mm256_permute2x128_si256(low, high, 0x31);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

// Sixteen pairs of bfloat16 weights of eight outputs, one to a lane, as integers; returns the scales.
static inline __m256 to_integers(const __m256i* x, uint32_t* to) {
    const __m256i size = _mm256_set1_epi16(0x7fff), upper = _mm256_set1_epi32(0xffff0000);
    __m256i larger = _mm256_setzero_si256();
    for (int p = 0; p < STRETCH / 2; p++) larger = _mm256_max_epi16(larger, _mm256_and_si256(x[p], size));
    larger = _mm256_slli_epi32(_mm256_max_epi16(larger, _mm256_srli_epi32(larger, 16)), 16);
    const __m256 top = _mm256_castsi256_ps(larger), some = _mm256_cmp_ps(top, _mm256_set1_ps(LEAST), _CMP_GT_OQ);
    const __m256 endless = _mm256_castsi256_ps(_mm256_cmpgt_epi32(larger, _mm256_set1_epi32(0x7f7fffff)));
    const __m256 factor = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(MOST_WEIGHT), top));
    for (int p = 0; p < STRETCH / 2; p++) {
        const __m256i one = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x[p], 16)), factor));
        const __m256i two = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(x[p], upper)), factor));
        _mm256_storeu_si256((__m256i*)(to + p * PANEL), _mm256_blend_epi16(one, _mm256_slli_epi32(two, 16), 0xaa));
    }
    return _mm256_or_ps(_mm256_and_ps(some, _mm256_mul_ps(top, _mm256_set1_ps(1.0f / MOST_WEIGHT))), endless);
}

// Inputs `begin` to `end` of outputs `from` on, of which there are `outputs`; the last stands for those that are missing.
static void fill(Panel to, Matrix m, i64 from, i64 outputs, i64 begin, i64 end, i64 k, i64 group) {
    const i64 words = (end - begin) / (m.scales ? 8 : 2), groups = m.scales ? std::max<i64>((end - begin) / group, 1) : 0;
    const int shift = __builtin_ctzll(group | 1ull << 62);  // a group has 2^shift inputs
    for (i64 lane = 0; lane < PANEL; lane += 8, to.words += 8, to.scales += 8) {
        i64 row[8];
        for (int o = 0; o < 8; o++) row[o] = std::min(from + lane + o, outputs - 1) * k + begin;
        if (!m.scales)
            for (i64 t = 0; t < words; t += STRETCH / 2) {
                __m256i turned[16];
                for (int half = 0; half < 2; half++) {
                    for (int o = 0; o < 8; o++) turned[half * 8 + o] = _mm256_loadu_si256((const __m256i*)((const bf16*)m.values + row[o] + 2 * t) + half);
                    transpose8(turned + half * 8);
                }
                _mm256_storeu_ps(to.scales + t / (STRETCH / 2) * PANEL, to_integers(turned, to.words + t * PANEL));
            }
        else {
            i64 t = 0;
            const auto next = [&](auto some) {
                const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(some), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
                __m256i turned[8];
                for (int o = 0; o < 8; o++) turned[o] = _mm256_maskload_epi32((const int*)((const uint8_t*)m.values + row[o] / 2) + t, there);
                transpose8(turned);
                for (int i = 0; i < some; i++)
                    for (int n = 0; n < 4; n++) {  // stored as v + 8
                        const __m256i values = _mm256_and_si256(n ? _mm256_srli_epi16(turned[i], 4 * n) : turned[i], _mm256_set1_epi16(15));
                        _mm256_storeu_si256((__m256i*)(to.words + ((t + i) * 4 + n) * PANEL), _mm256_sub_epi16(values, _mm256_set1_epi16(8)));
                    }
                t += some;
            };
            while (t + 8 <= words) next(std::integral_constant<int, 8>());
            if (t < words) next((int)(words - t));
        }
        for (i64 g = 0; g < groups; g += 8) {
            const int some = std::min<i64>(groups - g, 8);
            __m256i turned[8];
            for (int o = 0; o < 8; o++) {
                const bf16* at = m.scales + (row[o] >> shift) + g;
                bf16 all[8] = {};
                if (some < 8) for (int i = 0; i < some; i++) all[i] = at[i];
                turned[o] = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(some < 8 ? all : at))), 16);
            }
            transpose8(turned);
            for (int i = 0; i < some; i++) _mm256_storeu_si256((__m256i*)(to.scales + (g + i) * PANEL), turned[i]);
        }
    }
}

// Pair `P` of R rows, `row` bytes apart, and of sixteen outputs: part[r] += x[r] * words. The first pair makes the sums. In assembler, as the
// compiler would load all rows of x first, keep sums in memory then, and compute the address of each row anew.
template <int R, int P, bool FIRST> static inline void multiply_pair(const uint32_t* words, const uint32_t* x, const uint32_t* fourth, i64 row, __m256i (&part)[R][2]) {
    __m256i weight[2];
    for (int v = 0; v < 2; v++) {
        weight[v] = _mm256_loadu_si256((const __m256i*)(words + P * PANEL) + v);
        asm volatile("" : "+x"(weight[v]));
    }
    for (int r = 0; r < R; r++) {
        __m256i given, product;
        const uint32_t* from = r < 3 ? x : fourth;
        if (r % 3 == 0) asm volatile("vpbroadcastd %c2(%1), %0" : "=x"(given) : "r"(from), "i"(P * sizeof(uint32_t)));
        if (r % 3 == 1) asm volatile("vpbroadcastd %c3(%1,%2), %0" : "=x"(given) : "r"(from), "r"(row), "i"(P * sizeof(uint32_t)));
        if (r % 3 == 2) asm volatile("vpbroadcastd %c3(%1,%2,2), %0" : "=x"(given) : "r"(from), "r"(row), "i"(P * sizeof(uint32_t)));
        if (FIRST && P == 0)
            asm volatile("vpmaddwd %3, %2, %0\n\tvpmaddwd %4, %2, %1" : "=&x"(part[r][0]), "=x"(part[r][1]) : "x"(given), "x"(weight[0]), "x"(weight[1]));
        else
            asm volatile("vpmaddwd %4, %2, %3\n\tvpmaddwd %5, %2, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
                         : "+x"(part[r][0]), "+x"(part[r][1]), "+x"(given), "=&x"(product) : "x"(weight[0]), "x"(weight[1]));
    }
}
template <int R, bool FIRST> static inline void multiply_pairs(const uint32_t* words, const uint32_t* x, const uint32_t* fourth, i64 row, __m256i (&part)[R][2]) {
    multiply_pair<R, 0, FIRST>(words, x, fourth, row, part);
    multiply_pair<R, 1, FIRST>(words, x, fourth, row, part);
    multiply_pair<R, 2, FIRST>(words, x, fourth, row, part);
    multiply_pair<R, 3, FIRST>(words, x, fourth, row, part);
}

// One stretch of R rows of pairs, `row` words apart, and sixteen outputs of a panel: y[r] += them; `FRESH`: y[r] =.
template <int R, bool FRESH>
static inline __attribute__((always_inline)) void meet_stretch(Panel w, const uint32_t* x, const float* scales, i64 row, float* y) {
    asm volatile("" ::: "memory");  // or y would stay in registers that the sums need
    __m256i part[R][2];
    const uint32_t *fourth = x + 3 * row, *end = x + STRETCH / 2;
    multiply_pairs<R, true>(w.words, x, fourth, row * sizeof(uint32_t), part);
    while (x += 4, fourth += 4, w.words += 4 * PANEL, x != end) multiply_pairs<R, false>(w.words, x, fourth, row * sizeof(uint32_t), part);
    const __m256 low = _mm256_loadu_ps(w.scales), high = _mm256_loadu_ps(w.scales + 8);
    const float* after = scales + 3 * row;
    for (int r = 0; r < R; r++) {
        const __m256 given = _mm256_set1_ps((r < 3 ? scales : after)[r % 3 * row]);
        for (int v = 0; v < 2; v++) {
            float* to = y + r * PANEL + v * 8;
            const __m256 sum = _mm256_cvtepi32_ps(part[r][v]), scale = _mm256_mul_ps(v ? high : low, given);
            _mm256_storeu_ps(to, FRESH ? _mm256_mul_ps(sum, scale) : _mm256_fmadd_ps(sum, scale, _mm256_loadu_ps(to)));
        }
    }
}

// The same for many stretches; `fresh`: y[r] = their sum. Each scale of the panel is for `same` stretches.
template <int R>
static __attribute__((noinline)) void meet(Panel w, i64 same, const uint32_t* x, const float* scales, i64 row, i64 stretches, float* y, bool fresh) {
    i64 turn = same;
    for (i64 s = 0; s < stretches; s++, x += STRETCH / 2, scales++, w.words += STRETCH / 2 * PANEL) {
        if (fresh && s == 0) meet_stretch<R, true>(w, x, scales, row, y);
        else meet_stretch<R, false>(w, x, scales, row, y);
        if (--turn == 0) { turn = same; w.scales += PANEL; }
    }
}

// What will be multiplied later: it comes nearer a few lines at a time while what is here already is multiplied.
static thread_local Ahead coming;
static void ask_for(Ahead weights) { coming = weights; }

// The same with a panel's outputs, all or the first sixteen, for any number of rows, whose scales lie apart from their pairs: (rows, PANEL).
// A few rows meet the whole panel before the next ones, which may come from far. So many `lines` of what is coming are asked for meanwhile.
static void meet(Panel w, i64 same, const uint32_t* x, const float* scales, i64 rows, i64 row, i64 stretches, float* y, bool fresh,
                 int outputs = PANEL, i64 lines = 0) {
    const i64 pieces = (rows + HEIGHT - 1) / HEIGHT;  // of about as many rows each
    for (i64 piece = 0; piece < pieces; piece++) {
        const i64 first = rows * piece / pieces;
        if (lines) coming.ask(lines / pieces + 1);
        with_constant<HEIGHT>(rows * (piece + 1) / pieces - first, [&](auto count) {
            for (int half = 0; half < outputs; half += LANES)
                meet<count>({w.words + half, w.scales + half}, same, x + first * row, scales + first * row, row, stretches, y + first * PANEL + half, fresh);
        });
    }
}

// y[r] = outputs `from` on of a matrix, a panel of them, for all rows.
static void meet(Panel w, Matrix m, i64 from, i64 outputs, i64 group, const uint32_t* x, i64 rows, i64 row, i64 k, float* y) {
    // In order: filled are eight rows at a time, which memory is slower to answer.
    nearer((const char*)m.values + from * row_bytes(m, k), std::min<i64>(PANEL, outputs - from) * row_bytes(m, k));
    for (i64 begin = 0; begin < k; begin += DEPTH) {
        const i64 end = std::min<i64>(begin + DEPTH, k);
        fill(w, m, from, outputs, begin, end, k, group);
        meet(w, m.scales ? group / STRETCH : 1, x + begin / 2, (const float*)x + k / 2 + begin / STRETCH, rows, row, (end - begin) / STRETCH, y,
             begin == 0, PANEL, PANEL * row_bytes(m, end - begin) / 64);
    }
}

// Of sixteen queries, one to a lane, scores (keys, PANEL) become 2^(score - the largest of its stretch), to be multiplied by `factor` for each
// stretch. Returns what the sums so far are to be multiplied by, as the largest of all scores may have become larger.
static __m512 soften(float* scores, i64 stretches, float* best, float* total, __m512* factor) {
    const __m512 never = _mm512_set1_ps(-INFINITY), before = _mm512_loadu_ps(best);
    // Where all is hidden so far any finite number serves: every weight becomes zero.
    const auto finite = [&](__m512 top) { return _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, never, _CMP_EQ_OQ), _mm512_setzero_ps()); };
    __m512 now = before;
    for (i64 n = 0; n < stretches; n++) {
        factor[n] = largest(scores + n * STRETCH * PANEL, STRETCH, PANEL);
        now = _mm512_max_ps(now, factor[n]);
    }
    const __m512 shrink = two_to(_mm512_sub_ps(before, finite(now)));
    __m512 all = _mm512_mul_ps(_mm512_loadu_ps(total), shrink);
    for (i64 n = 0; n < stretches; n++) {
        const __m512 top = finite(factor[n]);
        factor[n] = two_to(_mm512_sub_ps(factor[n], finite(now)));
        __m512 sum = _mm512_setzero_ps();
        for (i64 k = n * STRETCH; k < (n + 1) * STRETCH; k++) {
            const __m512 one = two_to(_mm512_sub_ps(_mm512_loadu_ps(scores + k * PANEL), top));
            sum = _mm512_add_ps(sum, one);
            _mm512_storeu_ps(scores + k * PANEL, one);
        }
        all = _mm512_fmadd_ps(sum, factor[n], all);
    }
    _mm512_storeu_ps(best, now);
    _mm512_storeu_ps(total, all);
    return shrink;
}
"""
