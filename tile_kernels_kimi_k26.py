"""The CPU's kernels of products of matrices in tiles (AMX), for processors that have them: 16 × 32 values meet 32 × 16 at once."""

# What stands before all else: the tiles, and for tests what does the same without them.
TILES = r"""
#if defined(TILES_ALLOWED) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define TILES
#endif
#ifdef TILES
#define BFLOAT16_PRODUCTS

// A processor has eight tiles of sixteen lines of memory, which instructions name by number. `load_tile` and `store_tile` take the
// distance of two lines in bytes. `multiply_tiles(sum, a, b)`: sum[m][n] += the products of a's row m, 32 values, and b's column n,
// whose values stand in pairs: a line of b has two values of each of sixteen columns.
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define clear_tile(n) _tile_zero(n)
// The compiler's own, here and below, does not say what memory it reads, which may then be written too late.
#define load_tile(n, at, row) asm volatile("tileloadd (%0, %1, 1), %%tmm" #n : : "r"((const void*)(at)), "r"((long)(row)) : "memory")
#define store_tile(n, at, row) _tile_stored(n, at, row)
#define multiply_tiles(sum, a, b) _tile_dpbf16ps(sum, a, b)
struct Tiles {  // lets this thread use tiles while it lives
    Tiles() {
        alignas(64) struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {1};
        for (int n = 0; n < 8; n++) { shape.bytes[n] = 64; shape.rows[n] = 16; }
        asm volatile("ldtilecfg %0" : : "m"(shape));
    }
    ~Tiles() { _tile_release(); }
};
#else
static thread_local struct { float line[16][16]; } tile[8];
static void clear_tile(int n) { memset(&tile[n], 0, sizeof tile[n]); }
static void load_tile(int n, const void* at, int64_t row) { for (int m = 0; m < 16; m++) memcpy(tile[n].line[m], (const char*)at + m * row, 64); }
static void store_tile(int n, void* at, int64_t row) { for (int m = 0; m < 16; m++) memcpy((char*)at + m * row, tile[n].line[m], 64); }
static void multiply_tiles(int sum, int a, int b) {
    const auto value = [](float pair, int which) {
        uint32_t bits;
        memcpy(&bits, &pair, 4);
        bits = which ? bits & 0xffff0000 : bits << 16;
        memcpy(&pair, &bits, 4);
        return pair;
    };
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 32; k++) {
            const float one = value(tile[a].line[m][k / 2], k % 2);
            for (int n = 0; n < 16; n++) tile[sum].line[m][n] += one * value(tile[b].line[k / 2][n], k % 2);
        }
}
struct Tiles {};
#endif
#else
struct Tiles {};
#endif
"""

# Many rows, in place of the panels of `bfloat16_kernels_kimi_k26`; few rows, in place of `linear` of `kernels_kimi_k26`.
PRODUCTS_IN_TILES = r"""
// ---------------------------------------------------------------------------------------- few rows of bfloat16

// Memory that will be read as it lies, from an address to another one, and behind that what comes `after`.
struct Early {
    const char *at, *end;
    Ahead after;
    Early(const bf16* from, const bf16* to, Ahead after) : at((const char*)from), end((const char*)to), after(after) {}
    template <int LINES> void ask() {
        if (at >= end) return after.ask(LINES);
        for (int i = 0; i < LINES; i++) _mm_prefetch(at + 64 * i, _MM_HINT_T1);
        at += 64 * LINES;
    }
};

static thread_local std::vector<uint32_t> paired_rows;  // of x, see `linear`

// `sink(o, r, y, there)` gets y = w[o …] . x[r] of a block of outputs at a time, of which those exist that are `there`; rows of x are `row`
// values apart. Sixteen outputs are a tile as they lie, 32 inputs of them; of up to sixteen rows of x the other one has pairs,
// those of a place together: its lines overlap where there are fewer rows, and what they have too much is not looked at.
// `outputs` gives them out, about `PORTION` bytes of weights at a time: to take some, a thread waits for all that it asked for. The weights of its
// own outputs are asked for `EARLY` bytes before they are needed, in the order in which they lie; behind the last of them what is to come
// `after`. The sums of a block are given away after those of the next one, as the processor would wait for them and ask for nothing meanwhile.
enum { EARLY = 8192, PORTION = 1 << 17 };
template <class T, class F> static void linear(const bf16* w, i64 k, const bf16* x, i64 row, i64 rows, T outputs, F sink, Ahead after = {}) {
    const i64 steps = (k + 31) / 32, most = steps * 16 * LANES;
    paired_rows.resize((rows + LANES - 1) / LANES * most + LANES);
    for (i64 first = 0; first < rows; first += LANES) {
        const i64 some = std::min<i64>(rows - first, LANES);
        uint32_t* to = paired_rows.data() + first / LANES * most;
        const bf16* given[LANES];
        for (i64 r = 0; r < some; r++) given[r] = x + (first + r) * row;
        if (some == 1) memcpy(to, given[0], k * sizeof(bf16));
        else pack(given, some, k / 2, to, some);
        memset(to + k / 2 * some, 0, (steps * 16 - k / 2) * some * sizeof *to);
        if (k % 2) for (i64 r = 0; r < some; r++) memcpy(to + k / 2 * some + r, given[r] + k - 1, sizeof(bf16));  // one that has no pair
    }
    struct { Range outputs; i64 first, rows; } made = {};
    alignas(64) __m512 column[2][LANES];
    int turn = 0;
    const auto give = [&] {
        if (!made.rows) return;
        __m512 y[LANES];
        rows_of(column[turn], 1, y);
        for (i64 r = 0; r < made.rows; r++) sink(made.outputs.begin, made.first + r, y[r], first16(made.outputs.end - made.outputs.begin));
    };
    Early early(w + outputs.begin * k, w + outputs.end * k, after);
    early.ask<EARLY / 64>();
    Range part = {};
    const auto next = [&] {
        if (part.none()) part = outputs.next(std::max<i64>(PORTION / (32 * k), 1));
        return part.take();
    };
    for (Range some = next(); !some.none(); some = next()) {
        for (i64 first = 0; first < rows; first += LANES) {
            const i64 there = std::min<i64>(rows - first, LANES);
            const uint32_t* given = paired_rows.data() + first / LANES * most;
            clear_tile(0);
            for (i64 s = 0; s < steps; s++, given += 16 * there) {
                if (!first) early.ask<16>();
                load_tile(1, given, there * 4);
                if (some.begin + 16 <= some.end && s * 32 + 32 <= k) load_tile(2, w + some.begin * k + s * 32, k * sizeof(bf16));
                else {
                    alignas(64) bf16 copy[16][32];
                    for (i64 i = 0; i < 16; i++)
                        _mm512_storeu_si512(copy[i], (__m512i)load32(w + std::min(some.begin + i, some.end - 1) * k + s * 32, first32(k - s * 32)));
                    load_tile(2, copy, 64);
                }
                multiply_tiles(0, 2, 1);
            }
            store_tile(0, column[turn ^ 1], 64);
            give();
            turn ^= 1;
            made = {some, first, there};
        }
    }
    give();
}

// sum[i] = weights[i] . w for `R` rows of weights, pairs of bfloat16 for each two rows of w, which has `width` columns, whole lines of them;
// `next` is what will be asked for behind it. w is read as it lies, sixteen rows at a time; of a line the sums of the even columns come first. Tiles
// would take a third longer: they want sixteen rows of weights, and lines of sixteen rows of w at once.
template <int R> static void weigh(const bf16* w, i64 width, i64 pairs, const uint32_t* weights, i64 weight_stride, float* sum, Ahead next) {
    constexpr i64 SOME = 16;  // rows, while the next so many are asked for
    const __m512i upper = _mm512_set1_epi32(0xffff0000);
    Early early(w + SOME * width, w + 2 * pairs * width, next);
    memset(sum, 0, R * width * sizeof(float));
    for (i64 first = 0; first < 2 * pairs; first += SOME, w += SOME * width) {
        const i64 some = std::min(2 * pairs - first, SOME);
        float weight[R][SOME];
        for (int i = 0; i < R; i++) _mm512_storeu_ps(weight[i], wide16((const bf16*)(weights + i * weight_stride) + first, first16(some)));
        const auto meet = [&](i64 column, auto lines) {
            constexpr int LINES = decltype(lines)::value;
            __m512 even[R][LINES], odd[R][LINES];
            for (int i = 0; i < R; i++) for (int n = 0; n < LINES; n++) even[i][n] = odd[i][n] = _mm512_setzero_ps();
            for (i64 k = 0; k < some; k++) {
                early.ask<LINES>();
                for (int n = 0; n < LINES; n++) {
                    const __m512i both = (__m512i)load32(w + k * width + column + 32 * n);
                    const __m512 one = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), two = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
                    for (int i = 0; i < R; i++) {
                        even[i][n] = _mm512_fmadd_ps(one, _mm512_set1_ps(weight[i][k]), even[i][n]);
                        odd[i][n] = _mm512_fmadd_ps(two, _mm512_set1_ps(weight[i][k]), odd[i][n]);
                    }
                }
            }
            for (int i = 0; i < R; i++)
                for (int n = 0; n < LINES; n++) {
                    float* to = sum + i * width + column + 32 * n;
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), even[i][n]));
                    _mm512_storeu_ps(to + 16, _mm512_add_ps(_mm512_loadu_ps(to + 16), odd[i][n]));
                }
        };
        constexpr int MOST_LINES = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // whose sums registers hold
        i64 column = 0;
        for (; column + 32 * MOST_LINES <= width; column += 32 * MOST_LINES) meet(column, std::integral_constant<int, MOST_LINES>());
        for (; column < width; column += 32) meet(column, std::integral_constant<int, 1>());
    }
}
enum { WEIGHED = 8 };
// The same for up to `WEIGHED` rows of weights: the other `weigh`.
static void weigh(const bf16* w, i64 width, i64 pairs, const uint32_t* weights, i64 weight_stride, i64 rows, float* sum, Ahead next) {
    with_constant<WEIGHED>(rows, [&](auto count) { weigh<count>(w, width, pairs, weights, weight_stride, sum, next); });
}

// ---------------------------------------------------------------------------------------- many rows: panels of weights

// Weights are turned, a panel of outputs at a time, into lines of pairs of inputs with an output in each lane. INT4 words become the
// bfloat16 weights that they stand for on the way. A panel is two tiles wide, a stretch of inputs one tile long.
static inline i64 room_for(i64 rows) { return (rows + 15) / 16 * 16; }  // whole tiles are read and written
static inline i64 paired_size(i64 k) { return k / 2 + 16; }  // a line more: rows whose distance is a power of two would meet in few places of a cache
static inline void put_pairs(uint32_t* row, i64 k, i64 at, __m512i x, bool packed) { _mm512_storeu_si512(row + at / 2, as_pairs(x, packed)); }

static inline i64 panel_words(i64 k) { return k / 2 * PANEL; }

// What INT4 words of sixteen outputs stand for, (4, PANEL) pairs: see `unpacked`, which gives 136 + v.
static inline void put_weights(__m512i words, __m512 scale, uint32_t* to) {
    const __m512 less = _mm512_mul_ps(scale, _mm512_set1_ps(-136));
    for (int n = 0; n < 4; n++) {
        const __m512i both = (__m512i)unpacked(words, n);
        const __m512 one = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 two = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
        _mm512_storeu_si512(to + n * PANEL, paired(_mm512_fmadd_ps(one, scale, less), _mm512_fmadd_ps(two, scale, less)));
    }
}

// y[r] = outputs `from` on of a matrix, a panel of them, for all rows of pairs, which stand `row` words apart.
static void meet(Panel w, Matrix m, i64 from, i64 outputs, i64 group, const uint32_t* x, i64 rows, i64 row, i64 k, float* y) {
    fill(w, m, from, outputs, k, group, [&](i64 t, i64 half, __m512i words) {
        if (m.scales) put_weights(words, _mm512_loadu_ps(w.scales + t * 8 / group * PANEL + half), w.words + t * 4 * PANEL + half);
        else _mm512_storeu_si512(w.words + t * PANEL + half, words);
    });
    for (i64 r = 0; r < rows; r += 32, x += 32 * row, y += 32 * PANEL) {
        const bool two = rows - r > 16;
        clear_tile(0); clear_tile(1); clear_tile(2); clear_tile(3);
        for (i64 s = 0; s < k / STRETCH; s++) {
            const uint32_t* words = w.words + s * 16 * PANEL;
            load_tile(6, words, PANEL * 4);
            load_tile(7, words + LANES, PANEL * 4);
            load_tile(4, x + s * 16, row * 4);
            multiply_tiles(0, 4, 6);
            multiply_tiles(1, 4, 7);
            if (!two) continue;
            load_tile(5, x + 16 * row + s * 16, row * 4);
            multiply_tiles(2, 5, 6);
            multiply_tiles(3, 5, 7);
        }
        store_tile(0, y, PANEL * 4);
        store_tile(1, y + LANES, PANEL * 4);
        if (!two) continue;
        store_tile(2, y + 16 * PANEL, PANEL * 4);
        store_tile(3, y + 16 * PANEL + LANES, PANEL * 4);
    }
}
"""
