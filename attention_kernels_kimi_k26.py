"""The CPU's kernels of attention: its sums, and where there are products of bfloat16 what all of it has in common."""

ATTENTION = r"""
// ---------------------------------------------------------------------------------------- attention

// Of each query: the largest score, the sum, the weighted values as whoever adds them up has them in order. Scores are powers of two.
struct Sums {
    float *best, *total, *read;
    i64 queries, read_size;
    void layout(i64 count, i64 columns) {
        queries = count; read_size = columns * count;
        best = arena.take<float>(queries); total = arena.take<float>(queries); read = arena.take<float>(read_size);
    }
    void clear() const {
        std::fill_n(best, queries, -INFINITY);
        std::fill_n(total, queries, 0.0f);
        std::fill_n(read, read_size, 0.0f);
    }
};

#ifdef BFLOAT16_PRODUCTS

// Queries that read the same keys, one to a lane: the heads of one token over the latents, or the tokens of one head over its
// expanded keys. A score has two parts, as queries and keys have: one that turns with the position, one that does not.
// Queries are packed (see `lanes`), sixteen to a group.
struct Part { const uint32_t* query; const bf16* key; i64 key_row, size; };
struct Reading {
    Part parts[2];
    const int32_t* limits;  // null, or how many keys each query may see
    const uint8_t* mask;    // null, or for each key 0 for padding
    float scale;
    float* scores; uint32_t* weights;  // memory of this thread for those of a block: (keys, queries), (keys / 2, queries)
    bf16* copies;                      // null, or such memory for rows of keys that cannot be read as they lie
};

// `score` writes what `keys` keys from `block` on and all queries have together, (keys, queries), before they are scaled. What will be
// read next is asked for meanwhile, in `attend` from its beginning to its end: memory is never idle.
#ifdef TILES

enum { TOGETHER = 32 };  // keys whose values are added at once
static inline i64 padded(i64 size) { return (size + 31) / 32 * 32; }  // of a part of a query, as tiles read it
static i64 copied(i64 rank, i64 rope) { return 64 * (padded(rank) + padded(rope)); }  // of `Reading::copies`

struct Rows { const bf16* at; i64 bytes; };  // the first, and how far apart they are

// Sixteen rows of keys from `k` on for a tile. Those that end within a tile are copied, with zeros behind them, and so are fewer than
// sixteen, of which the last stands for those that are missing.
static Rows key_rows(const Part& p, i64 k, i64 there, bf16* copies) {
    const bf16* at = p.key + k * p.key_row;
    if (!copies || (there >= LANES && p.size % 32 == 0)) return {at, p.key_row * (i64)sizeof(bf16)};
    const i64 row = padded(p.size);
    for (i64 i = 0; i < LANES; i++)
        for (i64 c = 0; c < row; c += 32) {
            const __m512bh some = load32(at + std::min(i, there - 1) * p.key_row + c, first32(p.size - c));
            _mm512_storeu_si512(copies + i * row + c, (__m512i)some);
        }
    return {copies, row * (i64)sizeof(bf16)};
}
template <int G> static void score(const Reading& a, i64 block, i64 keys, float* scores, Ahead& ahead) {
    constexpr int N = 4 / G;  // tiles of keys at a time
    for (i64 k = 0; k < keys; k += N * LANES) {
        const i64 tiles = std::min<i64>(N, (keys - k + LANES - 1) / LANES);
        i64 first[N];  // of a tile's keys: the last sixteen may have been in the tile before
        float* to[N];
        for (int n = 0; n < tiles; n++) {
            first[n] = std::clamp<i64>(keys - LANES, 0, k + n * LANES);
            to[n] = scores + first[n] * G * LANES;
        }
        bf16* copies = a.copies;
        clear_tile(0); clear_tile(1); clear_tile(2); clear_tile(3);
        for (const Part& p : a.parts) {
            Rows rows[N];
            for (i64 n = 0; n < tiles && p.size; n++) {
                rows[n] = key_rows(p, block + first[n], keys - first[n], copies);
                if (copies) copies += LANES * padded(p.size);
            }
            for (i64 c = 0; c < p.size; c += 32) {
                const uint32_t* query = p.query + c / 2 * G * LANES;
                ahead.ask(20);
                if constexpr (G == 1) {
                    load_tile(7, query, 64);
                    load_tile(4, rows[0].at + c, rows[0].bytes); multiply_tiles(0, 4, 7);
                    if (tiles > 1) { load_tile(5, rows[1].at + c, rows[1].bytes); multiply_tiles(1, 5, 7); }
                    if (tiles > 2) { load_tile(6, rows[2].at + c, rows[2].bytes); multiply_tiles(2, 6, 7); }
                    if (tiles > 3) { load_tile(4, rows[3].at + c, rows[3].bytes); multiply_tiles(3, 4, 7); }
                } else {
                    load_tile(6, query, 128);
                    load_tile(7, query + LANES, 128);
                    load_tile(4, rows[0].at + c, rows[0].bytes); multiply_tiles(0, 4, 6); multiply_tiles(1, 4, 7);
                    if (tiles > 1) { load_tile(5, rows[1].at + c, rows[1].bytes); multiply_tiles(2, 5, 6); multiply_tiles(3, 5, 7); }
                }
            }
        }
        if constexpr (G == 1) {
            store_tile(0, to[0], 64);
            if (tiles > 1) store_tile(1, to[1], 64);
            if (tiles > 2) store_tile(2, to[2], 64);
            if (tiles > 3) store_tile(3, to[3], 64);
        } else {
            store_tile(0, to[0], 128); store_tile(1, to[0] + LANES, 128);
            if (tiles > 1) { store_tile(2, to[1], 128); store_tile(3, to[1] + LANES, 128); }
        }
    }
}
#else

enum { TOGETHER = 2 };
static inline i64 padded(i64 size) { return size; }
static i64 copied(i64, i64) { return 0; }
template <int G> static void score(const Reading& a, i64 block, i64 keys, float* scores, Ahead&) {
    constexpr int N = REGISTERS / 2 / G;
    i64 k = 0;
    const auto some = [&](auto count) {
        __m512 sum[count][G];
        for (int n = 0; n < count; n++) for (int g = 0; g < G; g++) sum[n][g] = _mm512_setzero_ps();
        for (const Part& p : a.parts)
            lanes<G, count, (count > 1)>(p.query, (const uint32_t*)(p.key + (block + k) * p.key_row), p.key_row / 2, 1, p.size / 2, sum);
        for (int n = 0; n < count; n++) for (int g = 0; g < G; g++) _mm512_storeu_ps(scores + ((k + n) * G + g) * LANES, sum[n][g]);
        k += count;
    };
    while (k + N <= keys) some(std::integral_constant<int, N>());
    while (k < keys) some(std::integral_constant<int, 1>());
}
#endif

// To the sums of `G` groups of queries come the keys from `begin` to `end`, `some` at a time: what is read of them stays in the
// nearer caches. `add(first, keys, shrink, ahead)` adds the values of the keys from `first` on, weighted, to sums that shrink before;
// `after(k)` says what will be read once all before key `k` has been.
template <int G, class F, class A> static void attend(const Reading& a, i64 begin, i64 end, i64 some, const Sums& s, F add, A after) {
    const __m512 never = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(a.scale * LOG2_E);
    __m512i limit[G];
    i64 unlimited = end;  // keys before this one are seen by all queries
    for (int g = 0; g < G && a.limits; g++) {
        limit[g] = _mm512_loadu_si512(a.limits + g * LANES);
        unlimited = std::min<i64>(unlimited, _mm512_reduce_min_epi32(limit[g]));
    }
    for (i64 block = begin; block < end; block += some) {
        const i64 keys = std::min(end - block, some), whole = (keys + TOGETHER - 1) / TOGETHER * TOGETHER;
        const auto hide = [&](i64 k) { for (int g = 0; g < G; g++) _mm512_storeu_ps(a.scores + (k * G + g) * LANES, never); };
        Ahead ahead = after(block + keys);
        score<G>(a, block, keys, a.scores, ahead);
        i64 k;
        if (a.mask) for (k = 0; k < keys; k++) if (!a.mask[block + k]) hide(k);
        for (k = std::max<i64>(0, unlimited - block); k < keys; k++)
            for (int g = 0; g < G; g++) {
                const __mmask16 hidden = _mm512_cmple_epi32_mask(limit[g], _mm512_set1_epi32(block + k));
                _mm512_mask_storeu_ps(a.scores + (k * G + g) * LANES, hidden, never);
            }
        for (k = keys; k < whole; k++) hide(k);
        __m512 shrink[G];
        for (int g = 0; g < G; g++) {
            const float* score = a.scores + g * LANES;
            const __m512 before = _mm512_loadu_ps(s.best + g * LANES), top = _mm512_max_ps(before, _mm512_mul_ps(largest(score, keys, G * LANES), scale));
            // Where all is hidden so far any finite number serves: every weight becomes zero.
            const __m512 from = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, never, _CMP_EQ_OQ), _mm512_setzero_ps());
            shrink[g] = two_to(_mm512_sub_ps(before, from));
            __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(s.total + g * LANES), shrink[g]);
            const auto weight = [&](i64 k) { return two_to(_mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(score + k * G * LANES), scale), from)); };
            for (k = 0; k < whole; k += 2) {
                if (k % 16 == 0) ahead.ask(32);
                const __m512 one = weight(k), two = weight(k + 1);
                sum = _mm512_add_ps(sum, _mm512_add_ps(one, two));
                _mm512_storeu_si512(a.weights + (k / 2 * G + g) * LANES, paired(one, two));
            }
            _mm512_storeu_ps(s.best + g * LANES, top);
            _mm512_storeu_ps(s.total + g * LANES, sum);
        }
        add(block, keys, shrink, ahead);
    }
}

// read[h] = shrink[h] * read[h] (nothing where it is `fresh`) + the sum of weights[k][h] * value[k] for sixteen heads and some keys:
// values are read as they lie, so columns come in the order that `store_columns` undoes.
#ifdef TILES

// Up to `MOST_ADDED` keys. A line of a tile is 32 columns of a key as they lie, which count as pairs: weights with zeros behind them meet
// the even columns, with zeros before them the odd ones. So half of the products are in vain, but no value is moved, and memory takes longer.
enum { MOST_ADDED = 128 };
static void add_rows(const bf16* value, i64 row, i64 columns, const uint32_t* weights, i64 keys, bool fresh, __m512 shrink, float* read, Ahead& ahead) {
    alignas(64) bf16 lines[LANES][MOST_ADDED];  // a head's weights after one another
    for (i64 k = 0; k < keys; k += 32) {
        __m512i turned[LANES];
        for (int p = 0; p < LANES; p++) turned[p] = _mm512_loadu_si512(weights + (k / 2 + p) * LANES);
        transpose16(turned);
        for (int h = 0; h < LANES; h++) _mm512_store_si512(lines[h] + k, turned[h]);
    }
    alignas(64) uint32_t even[MOST_ADDED / 16][LANES][LANES], odd[MOST_ADDED / 16][LANES][LANES];
    alignas(64) bf16 last[LANES][64];  // keys that do not fill a tile: what is not there has a weight of zero
    alignas(64) float less[LANES];
    _mm512_store_ps(less, shrink);
    const bool shrinks = _mm512_cmp_ps_mask(shrink, _mm512_set1_ps(1), _CMP_NEQ_UQ);
    const i64 tiles = (keys + 15) / 16;
    for (i64 t = 0; t < tiles; t++)
        for (i64 i = 0; i < LANES; i++) {
            const __m512i some = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(keys - t * 16), lines[i] + t * 16));
            _mm512_store_si512(even[t][i], some);
            _mm512_store_si512(odd[t][i], _mm512_slli_epi32(some, 16));
        }
    for (i64 column = 0; column < columns; column += 64) {
        const bool two = column + 32 < columns;  // times 32 columns
        float* to = read + column;
        if (!fresh && shrinks)
            for (i64 i = 0; i < LANES; i++)
                for (i64 c = 0; c < (two ? 64 : 32); c += LANES)
                    _mm512_storeu_ps(to + i * columns + c, _mm512_mul_ps(_mm512_loadu_ps(to + i * columns + c), _mm512_set1_ps(less[i])));
        if (fresh) { clear_tile(0); clear_tile(1); clear_tile(2); clear_tile(3); }
        else {
            load_tile(0, to, columns * 4); load_tile(1, to + LANES, columns * 4);
            if (two) { load_tile(2, to + 2 * LANES, columns * 4); load_tile(3, to + 3 * LANES, columns * 4); }
        }
        for (i64 t = 0; t < tiles; t++) {
            const bf16* at = value + t * 16 * row + column;
            i64 apart = row;
            ahead.ask(32);
            if (t * 16 + 16 > keys) {
                for (i64 i = 0; i < LANES; i++)
                    for (i64 c = 0; c < (two ? 64 : 32); c += 32)
                        _mm512_store_si512(last[i] + c, (__m512i)load32(at + std::min(i, keys - 1 - t * 16) * row + c));
                at = last[0];
                apart = 64;
            }
            load_tile(6, even[t], 64);
            load_tile(7, odd[t], 64);
            load_tile(4, at, apart * sizeof(bf16));
            multiply_tiles(0, 6, 4);
            multiply_tiles(1, 7, 4);
            if (!two) continue;
            load_tile(5, at + 32, apart * sizeof(bf16));
            multiply_tiles(2, 6, 5);
            multiply_tiles(3, 7, 5);
        }
        store_tile(0, to, columns * 4); store_tile(1, to + LANES, columns * 4);
        if (two) { store_tile(2, to + 2 * LANES, columns * 4); store_tile(3, to + 3 * LANES, columns * 4); }
    }
}
#else
static void add_rows(const bf16* value, i64 row, i64 columns, const uint32_t* weights, i64 keys, bool fresh, __m512 shrink, float* read,
                     Ahead& ahead) {
    constexpr int HEADS = REGISTERS / 2;  // at a time
    alignas(64) float less[LANES];
    _mm512_store_ps(less, shrink);
    for (i64 column = 0; column < columns; column += 16)  // of two sixteens that lie together first the lower halves, then the upper
        for (int from = 0; from < LANES; from += HEADS) {
            __m512 sum[HEADS];
            for (int h = 0; h < HEADS; h++)
                sum[h] = fresh ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_loadu_ps(read + (from + h) * columns + column), _mm512_set1_ps(less[from + h]));
            const bf16* at = value + column / 32 * 32;
            for (i64 k = 0; k < keys; k += 2, at += 2 * row) {
                if (!from) ahead.ask(1);
                const __m512i one = (__m512i)load32(at), two = (__m512i)load32(k + 1 < keys ? at + row : at);  // or its weight is zero
                const __m512bh both = (__m512bh)(column % 32 ? _mm512_unpackhi_epi16(one, two) : _mm512_unpacklo_epi16(one, two));
                for (int h = 0; h < HEADS; h++)
                    sum[h] = _mm512_dpbf16_ps(sum[h], both, (__m512bh)_mm512_set1_epi32(weights[k / 2 * LANES + from + h]));
            }
            for (int h = 0; h < HEADS; h++) _mm512_storeu_ps(read + (from + h) * columns + column, sum[h]);
        }
}
#endif
#endif
"""
