"""The CPU's kernel of attention of many tokens over expanded keys and values: in bfloat16, or in integers (see `INTEGERS`)."""

PREFILL = r"""
// ---------------------------------------------------------------------------------------- many tokens over expanded keys

struct Expanded {  // addresses, and strides in elements along (batch, token, head)
    const bf16 *query, *turned, *key, *rotary, *value;
    bf16* out;
    i64 query_at[3], turned_at[3], key_at[3], rotary_at[3], value_at[3], out_at[3];
    i64 batch, queries, keys, heads, nope, rope, v;
    i64 first;  // place of the first query among the keys; each sees all up to itself
    const uint8_t* mask; i64 mask_row;
    float scale;
};
static inline i64 place(const i64* strides, i64 b, i64 token, i64 h) { return b * strides[0] + token * strides[1] + h * strides[2]; }

// Queries of one head that read together; blocks of them that a thread takes at once; bytes of keys and values that are copied at once, and that
// these blocks meet one after the other, while the second cache holds them.
enum { QUERIES = 32, GROUPS = QUERIES / LANES, BLOCKS = 4, HELD = 1 << 24, NEAR = 1 << 18 };

// A head's queries from `q` on, of which there are `some`, and how many keys each sees; places without a query repeat the last one.
struct Asked {
    i64 n, b, h, q, some, keys;
    int32_t limits[QUERIES]; i64 tokens[QUERIES];
    Asked(const Expanded& e, i64 n, i64 b, i64 h, i64 q) : n(n), b(b), h(h), q(q), some(std::min<i64>(e.queries - q, QUERIES)) {
        for (i64 i = 0; i < QUERIES; i++) {
            tokens[i] = q + std::min(i, some - 1);
            limits[i] = e.first + tokens[i] + 1;
        }
        keys = std::min<i64>(limits[some - 1], e.keys);
    }
};

// Sixteen columns of the values of 32 keys from `k` on: of each column a row of keys. Keys that are not there are zeros.
static inline void turn_values(const Expanded& e, i64 b, i64 h, i64 k, i64 column, __m512i (&turned)[LANES]) {
    const auto load = [&](i64 k) {
        return k < e.keys ? _mm256_maskz_loadu_epi16(first16(e.v - column), e.value + place(e.value_at, b, k, h) + column) : _mm256_setzero_si256();
    };
    for (int p = 0; p < LANES; p++) turned[p] = paired16(load(k + 2 * p), load(k + 2 * p + 1));
    transpose16(turned);
}

// `Copied`: the keys and values of some heads as the products want them, and what reads them. `copy(b, h, n)` is called by all threads
// for each head; then by one for each of its blocks of queries `ask`, which gets them ready, and `answer` for its keys, some at a time. `which` block it
// is of those that the thread has says where its sums are.
#ifdef BFLOAT16_PRODUCTS

#ifdef TILES

// Values as tiles read them: blocks of keys, of each a row for every column.
struct Values {
    enum { KEYS = 96 };
    const Expanded& e;
    const i64 columns, row = columns, blocks = (e.keys + KEYS - 1) / KEYS;  // row: numbers that a key's values take
    i64 size() const { return blocks * columns * KEYS; }  // of a head
    void copy(i64 b, i64 h, bf16* to) const {
        for (Share s(blocks * KEYS, 32); s.begin < s.end; s.begin += 32)
            for (i64 column = 0; column < columns; column += LANES) {
                __m512i turned[LANES];
                turn_values(e, b, h, s.begin, column, turned);
                bf16* at = to + (s.begin / KEYS * columns + column) * KEYS + s.begin % KEYS;
                for (int c = 0; c < LANES; c++) _mm512_storeu_si512(at + c * KEYS, turned[c]);
            }
    }
    void add(const bf16* values, i64 first, i64 keys, const uint32_t* weights, const __m512 (&shrink)[GROUPS], float* read) const {
        const bf16* at = values + first * columns;
        for (i64 column = 0; column < columns; column += 2 * LANES, at += 2 * LANES * KEYS, read += 2 * LANES * QUERIES) {
            const bool two = columns - column > LANES;
            for (i64 i = 0; i < std::min<i64>(2 * LANES, columns - column); i++)
                for (int g = 0; g < GROUPS; g++) {
                    float* to = read + (i * GROUPS + g) * LANES;
                    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), shrink[g]));
                }
            load_tile(0, read, QUERIES * 4); load_tile(1, read + LANES, QUERIES * 4);
            if (two) { load_tile(2, read + 16 * QUERIES, QUERIES * 4); load_tile(3, read + 16 * QUERIES + LANES, QUERIES * 4); }
            for (i64 k = 0; k < keys; k += 32) {
                load_tile(6, weights + k / 2 * QUERIES, QUERIES * 4);
                load_tile(7, weights + k / 2 * QUERIES + LANES, QUERIES * 4);
                load_tile(4, at + k, KEYS * 2); multiply_tiles(0, 4, 6); multiply_tiles(1, 4, 7);
                if (two) { load_tile(5, at + 16 * KEYS + k, KEYS * 2); multiply_tiles(2, 5, 6); multiply_tiles(3, 5, 7); }
            }
            store_tile(0, read, QUERIES * 4); store_tile(1, read + LANES, QUERIES * 4);
            if (two) { store_tile(2, read + 16 * QUERIES, QUERIES * 4); store_tile(3, read + 16 * QUERIES + LANES, QUERIES * 4); }
        }
    }
};
#else

// Values in pairs of keys, side by side.
// Words (one[c], two[c]) of two rows, in order of the columns; a missing second row is zero.
static inline void interleave(const bf16* one, const bf16* two, i64 size, uint32_t* to) {
    alignas(64) static const uint16_t low[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (i64 c = 0; c < size; c += 32) {
        const __m512i a = (__m512i)load32(one + c, first32(size - c)), b = two ? (__m512i)load32(two + c, first32(size - c)) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(a, first, b));
        if (c + 16 < size) _mm512_storeu_si512(to + c + 16, _mm512_permutex2var_epi16(a, second, b));
    }
}

struct Values {
    enum { KEYS = 64, N = REGISTERS / 2 / GROUPS };
    const Expanded& e;
    const i64 columns, pairs = (e.keys + 1) / 2;
    const i64 row = columns + LANES;  // a line more: rows whose distance is a power of two would meet in few places of a cache
    i64 size() const { return 2 * pairs * row; }  // of a head
    void copy(i64 b, i64 h, bf16* to) const {
        for (Share s(pairs); s.begin < s.end; s.begin++) {
            const i64 k = s.begin * 2;
            const bf16* value = e.value + place(e.value_at, b, k, h);
            interleave(value, k + 1 < e.keys ? value + e.value_at[1] : nullptr, e.v, (uint32_t*)to + s.begin * row);
        }
    }
    void add(const bf16* values, i64 first, i64 keys, const uint32_t* weights, const __m512 (&shrink)[GROUPS], float* read) const {
        const uint32_t* at = (const uint32_t*)values + first / 2 * row;
        for (i64 column = 0; column < columns; column += N, read += N * QUERIES) {
            __m512 sum[N][GROUPS];
            for (int i = 0; i < N; i++)
                for (int g = 0; g < GROUPS; g++) sum[i][g] = _mm512_mul_ps(_mm512_loadu_ps(read + (i * GROUPS + g) * LANES), shrink[g]);
            lanes<GROUPS, N>(weights, at + column, 1, row, (keys + 1) / 2, sum);
            for (int i = 0; i < N; i++)
                for (int g = 0; g < GROUPS; g++) _mm512_storeu_ps(read + (i * GROUPS + g) * LANES, sum[i][g]);
        }
    }
};
#endif

// Each key with its rotary part, and the values.
struct Copied {
    enum { KEYS = Values::KEYS };  // at a time
    const Expanded& e;
    const i64 size = padded(e.nope + e.rope);
    const Values held = {e, (e.v + LANES - 1) / LANES * LANES};
    bf16 *keys, *values;
    struct Mine { uint32_t* queries[BLOCKS]; float* scores; uint32_t* weights; Sums sums[BLOCKS]; };
    std::vector<Mine> benches;  // of each thread

    i64 bytes() const { return (room_for(e.keys) * size + held.size()) * sizeof(bf16); }  // of a head
    i64 key_bytes() const { return (size + held.row) * sizeof(bf16); }  // and of its values
    void layout(i64 heads, i64 threads) {
        keys = arena.take<bf16>(heads * room_for(e.keys) * size);
        values = arena.take<bf16>(heads * held.size());
        benches.resize(threads);
        for (Mine& mine : benches) {
            mine.scores = arena.take<float>(KEYS * QUERIES);
            mine.weights = arena.take<uint32_t>(KEYS / 2 * QUERIES);
            for (auto& queries : mine.queries) queries = arena.take<uint32_t>(QUERIES * size / 2);
            for (Sums& sums : mine.sums) sums.layout(QUERIES, held.columns);
        }
    }
    void copy(i64 b, i64 h, i64 n) {
        for (Share s(e.keys); s.begin < s.end; s.begin++) {
            bf16* to = keys + (n * room_for(e.keys) + s.begin) * size;
            memcpy(to, e.key + place(e.key_at, b, s.begin, h), e.nope * sizeof(bf16));
            memcpy(to + e.nope, e.rotary + place(e.rotary_at, b, s.begin, 0), e.rope * sizeof(bf16));
            std::fill(to + e.nope + e.rope, to + size, 0);
        }
        held.copy(b, h, values + n * held.size());
    }
    void ask(const Asked& a, i64 which) {
        uint32_t* to = benches[omp_get_thread_num()].queries[which];
        const bf16 *still[QUERIES], *turning[QUERIES];
        for (i64 i = 0; i < QUERIES; i++) {
            still[i] = e.query + place(e.query_at, a.b, a.tokens[i], a.h);
            turning[i] = e.turned + place(e.turned_at, a.b, a.tokens[i], a.h);
        }
        std::fill(to + (e.nope + e.rope) / 2 * QUERIES, to + size / 2 * QUERIES, 0);
        for (int g = 0; g < GROUPS; g++) {
            pack(still + g * LANES, LANES, e.nope / 2, to + g * LANES, QUERIES);
            pack(turning + g * LANES, LANES, e.rope / 2, to + e.nope / 2 * QUERIES + g * LANES, QUERIES);
        }
    }
    void answer(const Asked& a, i64 which, i64 begin, i64 end) {
        const Mine& mine = benches[omp_get_thread_num()];
        const bf16 *key = keys + a.n * room_for(e.keys) * size, *value = values + a.n * held.size();
        const Reading reading = {{{mine.queries[which], key, size, size}, {}}, a.limits, e.mask ? e.mask + a.b * e.mask_row : nullptr, e.scale,
                                 mine.scores, mine.weights};
        attend<GROUPS>(reading, begin, end, KEYS, mine.sums[which],
                       [&](i64 first, i64 count, const __m512 (&shrink)[GROUPS], Ahead&) { held.add(value, first, count, mine.weights, shrink, mine.sums[which].read); },
                       [&](i64 k) {  // the first of the blocks brings keys and values nearer
                           const i64 some = std::clamp<i64>(a.keys - k, 0, which ? 0 : KEYS);
                           return Ahead(key + k * size, some * size * sizeof *key, value + k * held.row, some * held.row * sizeof *value);
                       });
    }
};
#else

// Both products are those of rows with a panel that has queries for outputs. In the first, rows are keys; in the second they are
// columns of values, with the keys for inputs: each stretch of keys has weights of a scale of its own, so small ones are not lost.
struct Copied {
    enum { KEYS = 96 };  // a multiple of stretches, and of the rows that registers hold
    const Expanded& e;
    const i64 size = (e.nope + e.rope + STRETCH - 1) / STRETCH * STRETCH, keys_there = (e.keys + STRETCH - 1) / STRETCH * STRETCH;
    const i64 columns = (e.v + LANES - 1) / LANES * LANES, key_row = paired_size(size);
    const i64 value_row = paired_size(KEYS), value_block = columns * value_row, blocks = (e.keys + KEYS - 1) / KEYS;
    uint32_t *keys, *values;  // rows of pairs: (heads, keys) and (heads, blocks of keys, columns), as they will be read
    struct Mine { bf16* rows; float* scores; Panel queries[BLOCKS], weights; Sums sums[BLOCKS]; };
    std::vector<Mine> benches;  // of each thread

    i64 bytes() const { return (e.keys * key_row + blocks * value_block) * sizeof(uint32_t); }  // of a head
    i64 key_bytes() const { return (key_row + value_block / KEYS) * sizeof(uint32_t); }         // and of its values
    void layout(i64 heads, i64 threads) {
        keys = arena.take<uint32_t>(heads * e.keys * key_row);
        values = arena.take<uint32_t>(heads * blocks * value_block);
        benches.resize(threads);
        for (Mine& mine : benches) {
            mine.rows = arena.take<bf16>(QUERIES * size);
            mine.scores = arena.take<float>(KEYS * QUERIES);
            mine.weights = {arena.take<uint32_t>(KEYS / 2 * PANEL), arena.take<float>(KEYS / STRETCH * PANEL)};
            for (Panel& queries : mine.queries) queries = {arena.take<uint32_t>(size / 2 * PANEL), arena.take<float>(size / STRETCH * PANEL)};
            for (Sums& sums : mine.sums) sums.layout(QUERIES, columns);
        }
    }
    void copy(i64 b, i64 h, i64 n) {
        bf16* row = benches[omp_get_thread_num()].rows;
        for (Share s(e.keys); s.begin < s.end; s.begin++) {
            join(row, size, e.key + place(e.key_at, b, s.begin, h), e.nope, e.rotary + place(e.rotary_at, b, s.begin, 0), e.rope);
            uint32_t* to = keys + (n * e.keys + s.begin) * key_row;
            for (i64 i = 0; i < size; i += STRETCH) put_pairs(to, size, i, _mm512_loadu_si512(row + i), false);
        }
        for (Share s(keys_there, STRETCH); s.begin < s.end; s.begin += STRETCH) {
            uint32_t* to = values + (n * blocks + s.begin / KEYS) * value_block;
            for (i64 column = 0; column < columns; column += LANES) {
                __m512i turned[LANES];
                turn_values(e, b, h, s.begin, column, turned);
                for (int c = 0; c < LANES; c++) put_pairs(to + (column + c) * value_row, KEYS, s.begin % KEYS, turned[c], false);
            }
        }
    }
    void ask(const Asked& a, i64 which) {
        const Mine& mine = benches[omp_get_thread_num()];
        const Panel& to = mine.queries[which];
        for (i64 i = 0; i < QUERIES; i++)
            join(mine.rows + i * size, size, e.query + place(e.query_at, a.b, a.tokens[i], a.h), e.nope,
                 e.turned + place(e.turned_at, a.b, a.tokens[i], a.h), e.rope);
        fill(to, {mine.rows, nullptr}, 0, QUERIES, 0, size, size, 0);
        for (i64 i = 0; i < size / STRETCH * PANEL; i++) to.scales[i] *= e.scale * LOG2_E;
    }
    void answer(const Asked& a, i64 which, i64 begin, i64 end) {
        const Mine& mine = benches[omp_get_thread_num()];
        const Sums& s = mine.sums[which];
        const uint32_t *key = keys + (a.n * e.keys + begin) * key_row, *value = values + (a.n * blocks + begin / KEYS) * value_block;
        for (i64 block = begin; block < end; block += KEYS, key += KEYS * key_row, value += value_block) {
            const i64 there = std::min<i64>(end - block, KEYS), stretches = (there + STRETCH - 1) / STRETCH;
            // The first of the blocks brings keys and values nearer.
            if (block + KEYS < a.keys && !which) coming = {key + KEYS * key_row, KEYS * key_row * (i64)sizeof *key, value + value_block, value_block * (i64)sizeof *value};
            meet(mine.queries[which], 1, key, (const float*)key + size / 2, there, key_row, size / STRETCH, mine.scores, true, PANEL, KEYS * key_row / 16);
            hide(a, block, there, stretches * STRETCH, mine.scores);
            for (int at = 0; at < QUERIES; at += LANES) {
                __m512 factor[KEYS / STRETCH];
                const __m512 most = _mm512_set1_ps(MOST_WEIGHT), shrink = soften(mine.scores + at, stretches, s.best + at, s.total + at, factor);
                for (i64 p = 0; p < stretches * STRETCH / 2; p++) {
                    const float* score = mine.scores + 2 * p * QUERIES + at;
                    const __m512 one = _mm512_mul_ps(_mm512_loadu_ps(score), most), two = _mm512_mul_ps(_mm512_loadu_ps(score + QUERIES), most);
                    _mm512_storeu_si512(mine.weights.words + p * PANEL + at, pairs_of(one, two));
                }
                for (i64 n = 0; n < stretches; n++) _mm512_storeu_ps(mine.weights.scales + n * PANEL + at, _mm512_div_ps(factor[n], most));
                for (i64 c = 0; c < columns; c++) {
                    float* read = s.read + c * QUERIES + at;
                    _mm512_storeu_ps(read, _mm512_mul_ps(_mm512_loadu_ps(read), shrink));
                }
            }
            meet(mine.weights, 1, value, (const float*)value + KEYS / 2, columns, value_row, stretches, s.read, false, PANEL, value_block / 16);
        }
    }
    // Scores of keys that are not there, or that a query must not see, to the lowest there is.
    void hide(const Asked& a, i64 block, i64 there, i64 end, float* scores) const {
        const __m512 never = _mm512_set1_ps(-INFINITY);
        for (i64 k = 0; k < end; k++) {
            const bool seen = k < there && !(e.mask && !e.mask[a.b * e.mask_row + block + k]);
            if (seen && block + k < a.limits[0]) continue;  // the first query sees the fewest
            for (int at = 0; at < QUERIES; at += LANES) {
                const __mmask16 hidden = _mm512_cmple_epi32_mask(_mm512_loadu_si512(a.limits + at), _mm512_set1_epi32(block + k));
                _mm512_mask_storeu_ps(scores + k * QUERIES + at, seen ? hidden : 0xffff, never);
            }
        }
    }
};
#endif

// Attention of many tokens over the expanded keys and values of some heads. They are copied first, a few heads at a time.
extern "C" void kimi_prefill(const Expanded* given, i64 threads) {
    const Expanded& e = *given;
    Copied copied = {e};
    const i64 heads = e.batch * e.heads, some_heads = std::clamp<i64>(HELD / copied.bytes(), 1, heads);
    arena.layout([&] { copied.layout(some_heads, threads); });
    const i64 blocks = (e.queries + QUERIES - 1) / QUERIES, together = std::clamp<i64>(blocks * some_heads / (4 * threads), 1, BLOCKS);
    const i64 units = (blocks + together - 1) / together, near = std::max<i64>(NEAR / copied.key_bytes() / Copied::KEYS, 1) * Copied::KEYS;
    const auto write = [&](const Asked& a, const Sums& s) {
        for (i64 d = 0; d < e.v; d += LANES) {
            const __mmask16 there = first16(e.v - d);
            for (int g = 0; g < GROUPS; g++) {
                const __m512 sum = _mm512_loadu_ps(s.total + g * LANES);
                const __m512 factor = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NLE_UQ), _mm512_set1_ps(1), sum);
                __m512 column[LANES], row[LANES];
                for (int c = 0; c < LANES; c++)
                    column[c] = _mm512_mul_ps(_mm512_loadu_ps(s.read + (d + c) * QUERIES + g * LANES), factor);
                rows_of(column, 1, row);
                for (i64 i = g * LANES; i < std::min<i64>(a.some, (g + 1) * LANES); i++)
                    _mm256_mask_storeu_epi16(e.out + place(e.out_at, a.b, a.q + i, a.h) + d, there, narrow16(row[i - g * LANES]));
            }
        }
    };
    #pragma omp parallel num_threads(threads)
    for (i64 start = 0; start < heads; start += some_heads) {
        const Tiles tiles;
        const i64 held = std::min(some_heads, heads - start);
        const Sums* sums = copied.benches[omp_get_thread_num()].sums;
        for (i64 n = 0; n < held; n++) copied.copy((start + n) / e.heads, (start + n) % e.heads, n);
        #pragma omp barrier
        #pragma omp for schedule(dynamic, 1)
        for (i64 unit = 0; unit < units * held; unit++) {
            const i64 n = unit / units, end = blocks - unit % units * together;  // of a head the longest first: the last queries see the most keys
            std::vector<Asked> asked;
            for (i64 block = end; block-- > std::max<i64>(end - together, 0);) asked.emplace_back(e, n, (start + n) / e.heads, (start + n) % e.heads, block * QUERIES);
            const i64 count = asked.size();
            for (i64 i = 0; i < count; i++) {
                copied.ask(asked[i], i);
                sums[i].clear();
            }
            for (i64 k = 0; k < asked[0].keys; k += near)
                for (i64 i = 0; i < count; i++)
                    if (k < asked[i].keys) copied.answer(asked[i], i, k, std::min(k + near, asked[i].keys));
            for (i64 i = 0; i < count; i++) write(asked[i], sums[i]);
        }
    }
}
"""
