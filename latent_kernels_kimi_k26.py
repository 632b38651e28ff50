"""The CPU's kernels of attention over cached latents: a few new tokens of each sequence, and any number of queries."""

LATENTS = r"""
// ---------------------------------------------------------------------------------------- attention over latents

struct Attention {
    const bf16 *norm, *q_a, *q_a_bias, *q_a_norm, *q_b, *kv_a, *kv_a_bias, *kv_a_norm, *kv_b, *o, *o_bias;
    i64 hidden, q_lora, heads, nope, rope, v, rank;  // q_lora 0: q_b is applied to the hidden state itself
    float eps, latent_eps, scale;
};

struct Latents {  // what a cache holds of one layer: addresses, and strides in elements
    bf16 *latent, *rotary;
    i64 latent_row, latent_key, rotary_row, rotary_key;
    i64 past, tokens;     // keys before the new ones; how many those are. The first sequence's are the first rows of what is computed, and so on
    const uint8_t* mask;  // null, or (sequences, keys): 0 for padding
    i64 mask_row;
    i64 sequence(i64 row) const { return row / tokens; }
    i64 seen(i64 row) const { return past + row % tokens + 1; }  // keys, the token's own the last
};

struct Keys { i64 row, begin, end; };  // of a sequence

// The memory of the first of some keys.
static Ahead block_of(const Latents& c, const Keys& k, i64 most) {
    const i64 bytes = std::min(k.end - k.begin, most) * (i64)sizeof(bf16);
    return {c.latent + k.row * c.latent_row + k.begin * c.latent_key, bytes * c.latent_key,
            c.rotary + k.row * c.rotary_row + k.begin * c.rotary_key, bytes * c.rotary_key};
}

// The sums of neighbouring groups of heads over the same keys.
struct TeamSums {
    const Sums* sums; i64 groups, apart;
    const Sums& operator[](i64 g) const { return sums[g * apart]; }
};

// What reads the latents for some heads of one token, `TEAM` groups of sixteen: `Heads` packs their queries, `read` adds up over some keys
// into sums of each group, `columns` gives 32 columns of what head `i` of a group has read, and `store32` stores them in order.
#ifdef BFLOAT16_PRODUCTS
struct Heads {
    enum { TEAM = 1, KEYS = 128, PIECE = 256 };  // keys at a time, at most; at the least for a thread, where more than one can have them
    static i64 words(const Attention& a) { return LANES * (padded(a.rank) + padded(a.rope)) / 2; }  // of their queries
    struct Bench {
        float* scores; uint32_t* weights; bf16* copies;
        explicit Bench(uint32_t* at) : scores((float*)at), weights(at + KEYS * LANES), copies((bf16*)(weights + KEYS / 2 * LANES)) {}
    };
    static i64 bench(const Attention& a) { return (uint32_t*)Bench(nullptr).copies - (uint32_t*)nullptr + copied(a.rank, a.rope) / 2; }  // words that a thread needs besides
    static void pack(const Attention& a, const bf16* const* still, const bf16* const* turning, i64 some, uint32_t* to, uint32_t*) {
        for (auto [part, size] : {std::pair(still, a.rank), std::pair(turning, a.rope)}) {
            kimi::pack(part, some, size / 2, to, LANES);
            std::fill(to + LANES * size / 2, to + LANES * padded(size) / 2, 0);
            to += LANES * padded(size) / 2;
        }
    }
    static void read(const Attention& a, const Latents& c, const Keys& keys, Ahead next, const uint32_t* queries, TeamSums team, uint32_t* memory) {
        const i64 row = keys.row;
        const Sums& s = team[0];
        const Bench b(memory);
        const bf16* latent = c.latent + row * c.latent_row;
        const Reading reading = {{{queries, latent, c.latent_key, a.rank},
                                  {queries + LANES * padded(a.rank) / 2, c.rotary + row * c.rotary_row, c.rotary_key, a.rope}},
                                 nullptr, c.mask ? c.mask + row * c.mask_row : nullptr, a.scale, b.scores, b.weights, b.copies};
        const i64 all = keys.end - keys.begin, unit = std::max<i64>((all + KEYS - 1) / KEYS, 1) * TOGETHER;
        const i64 some = (all + unit - 1) / unit * TOGETHER;  // blocks of about as many keys each
        s.clear();
        attend<1>(reading, keys.begin, keys.end, some, s,
                  [&](i64 first, i64 count, const __m512 (&shrink)[1], Ahead& ahead) {
                      add_rows(latent + first * c.latent_key, c.latent_key, a.rank, b.weights, count, first == keys.begin, shrink[0], s.read, ahead);
                  },
                  [&](i64 k) { return k < keys.end ? block_of(c, {row, k, std::min(keys.end, k + some)}, KEYS) : next; });
    }
    static const float* columns(const Sums& s, const Attention& a, i64 i, i64 column) { return s.read + i * a.rank + column; }
    static void store32(__m512 low, __m512 high, bf16* to) { store_columns(low, high, to); }
};
#else

// Keys become integers as they are read: those of a latent have one scale, as they are values too, whose scales are taken into the
// weights. Both products are those of rows with panels: keys meet the queries, and the heads' weights meet the latents, 32 columns at a time.
struct Heads {
    enum { TEAM = PANEL / LANES, KEYS = 96, PIECE = 256, SOON = 16, MOST_KEY = 8191 };  // SOON: keys after which one is needed that is asked for now
    static i64 size(const Attention& a) { return a.rank + (a.rope + STRETCH - 1) / STRETCH * STRETCH; }
    static i64 words(const Attention& a) { return size(a) / 2 * PANEL + size(a) / STRETCH * PANEL; }
    struct Bench {
        uint32_t *keys, *values, *weights;
        float *scores, *ones;
        bf16* rows;
        Bench(const Attention& a, uint32_t* at) {
            const auto take = [&](i64 words) { at += words; return at - words; };
            keys = take(KEYS * paired_size(size(a)));
            values = take(KEYS / 2 * a.rank);
            weights = take(PANEL * paired_size(KEYS));
            scores = (float*)take(KEYS * PANEL);
            ones = (float*)take(PANEL);
            rows = (bf16*)take(PANEL * size(a) / 2);
        }
    };
    static i64 bench(const Attention& a) { return (uint32_t*)Bench(a, nullptr).rows - (uint32_t*)nullptr + PANEL * size(a) / 2; }

    static void pack(const Attention& a, const bf16* const* still, const bf16* const* turning, i64 some, uint32_t* to, uint32_t* memory) {
        bf16* rows = Bench(a, memory).rows;
        for (i64 i = 0; i < some; i++) join(rows + i * size(a), size(a), still[i], a.rank, turning[i], a.rope);
        float* scales = (float*)to + size(a) / 2 * PANEL;
        fill({to, scales}, {rows, nullptr}, 0, some, 0, size(a), size(a), 0);
        for (i64 i = 0; i < size(a) / STRETCH * PANEL; i++) scales[i] *= a.scale * LOG2_E;
    }
    // Two keys: each as a row of pairs, and their latents, which have one scale each, as values: pairs of keys, a panel of columns after the
    // other, in an order that `store32` undoes.
    static void take(const Attention& a, const Bench& b, i64 pair, const bf16* const (&latent)[2], const bf16* const (&rotary)[2], float* scale) {
        const i64 all = size(a), row = paired_size(all);
        uint32_t* const to[2] = {b.keys + 2 * pair * row, b.keys + (2 * pair + 1) * row};
        __m256 factor[2];
        for (int n = 0; n < 2; n++) {
            float one;
            scale[n] = scale_of(latent[n], a.rank, MOST_KEY, one);
            factor[n] = _mm256_set1_ps(one);
            for (i64 i = 0; i < a.rank; i += STRETCH) ((float*)to[n])[all / 2 + i / STRETCH] = scale[n];
            for (i64 i = 0; i < a.rope; i += STRETCH)
                put_pairs(to[n], all, a.rank + i, _mm512_maskz_loadu_epi16(first32(a.rope - i), rotary[n] + i), false);
        }
        for (i64 i = 0; i < a.rank; i += 16) {
            __m256i values[2];
            for (int n = 0; n < 2; n++) {
                values[n] = sixteen_integers(_mm256_loadu_si256((const __m256i*)(latent[n] + i)), factor[n]);
                _mm256_storeu_si256((__m256i*)(to[n] + i / 2), values[n]);
            }
            _mm512_storeu_si512(b.values + (i / PANEL * KEYS / 2 + pair) * PANEL + i % PANEL,
                                {_mm256_unpacklo_epi16(values[0], values[1]), _mm256_unpackhi_epi16(values[0], values[1])});
        }
    }
    // What `soften` left in a group's scores of stretch `n`, times its factor and the keys' scales: of each head a row of pairs.
    static void put_weights(const float* scores, i64 n, const float* scale, __m512 factor, uint32_t* weights) {
        __m512 most = _mm512_set1_ps(LEAST), weight[STRETCH];
        for (int k = 0; k < STRETCH; k++) {
            weight[k] = _mm512_mul_ps(_mm512_loadu_ps(scores + (n * STRETCH + k) * PANEL), _mm512_set1_ps(scale[n * STRETCH + k]));
            most = _mm512_max_ps(most, weight[k]);
        }
        const __m512 by = _mm512_div_ps(_mm512_set1_ps(MOST_KEY), most);
        __m512i turned[LANES];
        for (int p = 0; p < LANES; p++) turned[p] = pairs_of(_mm512_mul_ps(weight[2 * p], by), _mm512_mul_ps(weight[2 * p + 1], by));
        transpose16(turned);
        alignas(32) float one[LANES];
        _mm512_storeu_ps(one, _mm512_mul_ps(factor, _mm512_mul_ps(most, _mm512_set1_ps(1.0f / MOST_KEY))));
        for (int h = 0; h < LANES; h++) {
            uint32_t* to = weights + h * paired_size(KEYS);
            _mm512_storeu_si512(to + n * STRETCH / 2, turned[h]);
            ((float*)to)[KEYS / 2 + n] = one[h];
        }
    }
    static void read(const Attention& a, const Latents& c, const Keys& keys, Ahead next, const uint32_t* queries, TeamSums team, uint32_t* memory) {
        const auto [row, begin, end] = keys;
        const Bench b(a, memory);
        const bf16 *latents = c.latent + row * c.latent_row, *rotaries = c.rotary + row * c.rotary_row;
        const i64 all = size(a), key_row = paired_size(all), weight_row = paired_size(KEYS);
        const uint8_t* mask = c.mask ? c.mask + row * c.mask_row : nullptr;
        const __m512 never = _mm512_set1_ps(-INFINITY);
        for (i64 g = 0; g < team.groups; g++) team[g].clear();
        std::fill_n(b.ones, PANEL, 1.0f);
        for (i64 block = begin; block < end; block += KEYS) {
            const i64 there = std::min<i64>(end - block, KEYS), stretches = (there + STRETCH - 1) / STRETCH;
            float scale[KEYS] = {};
            for (i64 k = 0; k < there; k += 2) {  // where there is no second key the first is taken twice, and weighs nothing
                const i64 two[2] = {block + k, block + std::min(k + 1, there - 1)};
                const bf16* const latent[2] = {latents + two[0] * c.latent_key, latents + two[1] * c.latent_key};
                const bf16* const rotary[2] = {rotaries + two[0] * c.rotary_key, rotaries + two[1] * c.rotary_key};
                for (int n = 0; n < 2; n++) {
                    nearer(latent[n] + SOON * c.latent_key, a.rank * sizeof **latent);
                    nearer(rotary[n] + SOON * c.rotary_key, a.rope * sizeof **rotary);
                }
                take(a, b, k / 2, latent, rotary, scale + k);
            }
            const auto hidden = [&](i64 k) { return k >= there || (mask && !mask[block + k]); };
            for (i64 k = 0; k < KEYS; k++) if (hidden(k)) scale[k] = 0;  // whatever such a key is, it weighs nothing
            coming = block + KEYS < end ? block_of(c, {row, block + KEYS, end}, KEYS) : next;
            const i64 lines = KEYS * (a.rank + a.rope) / 32 / 2;  // of the next block: half of them with the scores, half with the values
            meet({(uint32_t*)queries, (float*)queries + all / 2 * PANEL}, 1, b.keys, (const float*)b.keys + all / 2, there, key_row, all / STRETCH,
                 b.scores, true, team.groups * LANES, lines);
            for (i64 g = 0; g < team.groups; g++) {
                const Sums& s = team[g];
                float* scores = b.scores + g * LANES;
                uint32_t* weights = b.weights + g * LANES * weight_row;
                for (i64 k = 0; k < stretches * STRETCH; k++)
                    if (hidden(k)) _mm512_storeu_ps(scores + k * PANEL, never);
                __m512 factor[KEYS / STRETCH];
                const __m512 shrink = soften(scores, stretches, s.best, s.total, factor);
                alignas(32) float less[LANES];
                _mm512_storeu_ps(less, shrink);
                for (i64 at = 0; at < s.read_size; at += PANEL) {
                    const __m512 one = _mm512_set1_ps(less[at / PANEL % LANES]);
                    for (int half = 0; half < PANEL; half += LANES) _mm512_storeu_ps(s.read + at + half, _mm512_mul_ps(_mm512_loadu_ps(s.read + at + half), one));
                }
                for (i64 n = 0; n < stretches; n++) put_weights(scores, n, scale, factor[n], weights);
                for (i64 column = 0; column < a.rank; column += PANEL)
                    meet({b.values + column * KEYS / 2, b.ones}, KEYS, weights, (const float*)weights + KEYS / 2, LANES, weight_row, stretches,
                         s.read + column * LANES, false, PANEL, lines * PANEL / (a.rank * team.groups));
            }
        }
    }
    static const float* columns(const Sums& s, const Attention&, i64 i, i64 column) { return s.read + (column * LANES + i * PANEL); }
    static void store32(__m512 low, __m512 high, bf16* to) {
        const auto sixteen = [](__m512 x) { return _mm256_packus_epi32(narrow8(x.low), narrow8(x.high)); };
        _mm512_storeu_si512(to, {sixteen(low), sixteen(high)});
    }
};
#endif

struct Queries {  // of tokens: their parts that do not turn and those that have been turned; strides in elements
    const bf16 *still, *turned;
    i64 still_row, still_head, turned_row, turned_head;
};

static const bf16* expansion(const Attention& a, i64 h) { return a.kv_b + h * (a.nope + a.v) * a.rank; }  // of a head's keys; its values' is behind

// What the heads of some tokens read of the latents, as values: the work of one team of threads.
struct Reader {
    const Attention& a;
    const Latents& c;
    const i64 first, rows, threads;  // of all rows these
    const i64 groups = (a.heads + LANES - 1) / LANES, teams = (groups + Heads::TEAM - 1) / Heads::TEAM;  // of heads, one to a lane; of groups
    const i64 most = pieces(c.tokens - 1);  // of a row's keys
    bf16 *absorbed, *read16;
    uint32_t *packed, *benches;  // (rows, teams) and (threads), see `Heads`
    float *weighed, *counts;     // (threads, WEIGHED, rank), (threads, most, LANES)
    std::vector<Sums> sums = std::vector<Sums>(rows * groups * most);
    std::vector<Taken> dealt = std::vector<Taken>(3 * threads);  // by each phase

    // A row's keys are cut into as many pieces, however many rows there are: its sums are then the same to the last bit in
    // any company. Some more than few threads, as one of these may be slower; but not too small.
    i64 pieces(i64 row) const { return std::clamp<i64>(c.seen(row) / Heads::PIECE, threads, std::max<i64>(threads, 8)); }
    Keys keys_of(i64 unit) const {
        const i64 row = first + unit / most / teams, n = pieces(row), p = std::min(unit % most, n);
        return {c.sequence(row), c.seen(row) * p / n, c.seen(row) * std::min(p + 1, n) / n};
    }
    void layout() {
        weighed = arena.take<float>(threads * WEIGHED * a.rank);
        counts = arena.take<float>(threads * most * LANES);
        absorbed = arena.take<bf16>(rows * a.heads * a.rank);
        packed = arena.take<uint32_t>(rows * teams * Heads::words(a));
        benches = arena.take<uint32_t>(threads * Heads::bench(a));
        read16 = arena.take<bf16>(rows * a.heads * a.rank);
        for (Sums& one : sums) one.layout(LANES, a.rank);
    }
    // value (rows, heads, v). `then` is what this thread reads afterwards. Turned parts are read after the first barrier.
    void run(const Queries& q, bf16* value, Ahead then) {
        const i64 me = omp_get_thread_num(), units = rows * teams * most;  // a row's pieces for a team
        uint32_t* bench = benches + me * Heads::bench(a);
        // The expansion of keys moves into the query: (rows, nope) by (nope, rank) for each head.
        float* sum = weighed + me * WEIGHED * a.rank;
        Dealt heads(&dealt[0], a.heads, 1);
        for (Range one; !(one = heads.next()).none();) {
            const Ahead ahead = heads.follows(one) ? rows_of(expansion(a, one.end), a.rank, {0, a.nope}) : block_of(c, keys_of(std::min(Share(units).begin, units - 1)), Heads::KEYS);
            for (i64 from = 0; from < rows; from += WEIGHED) {
                const i64 some = std::min<i64>(rows - from, WEIGHED), at = from * a.heads + one.begin;
                const uint32_t* pairs = (const uint32_t*)(q.still + from * q.still_row + one.begin * q.still_head);  // two neighbours: a pair
                weigh(expansion(a, one.begin), a.rank, a.nope / 2, pairs, q.still_row / 2, some, sum, ahead);
                for (i64 i = 0; i < some; i++)
                    for (i64 column = 0; column < a.rank; column += 32)
                        store_columns(_mm512_loadu_ps(sum + i * a.rank + column), _mm512_loadu_ps(sum + i * a.rank + column + 16),
                                      absorbed + (at + i * a.heads) * a.rank + column);
            }
        }
        #pragma omp barrier
        for (Share s(rows * teams); s.begin < s.end; s.begin++) {
            constexpr i64 HEADS = Heads::TEAM * LANES;
            const i64 r = s.begin / teams, from = s.begin % teams * HEADS, some = std::min(HEADS, a.heads - from);
            const bf16 *still[HEADS], *turning[HEADS];
            for (i64 i = 0; i < some; i++) {
                still[i] = absorbed + (r * a.heads + from + i) * a.rank;
                turning[i] = q.turned + r * q.turned_row + (from + i) * q.turned_head;
            }
            Heads::pack(a, still, turning, some, packed + s.begin * Heads::words(a), bench);
        }
        #pragma omp barrier
        const i64 parts = (a.v + PART - 1) / PART;  // of the values of a head
        const auto values_of = [&](i64 part) { return rows_of(expansion(a, part / parts) + a.nope * a.rank, a.rank, part_of(part % parts, a.v)); };
        Dealt dealt_units(&dealt[threads], units, 1);
        for (Range one; !(one = dealt_units.next()).none();) {
            const Ahead ahead = dealt_units.follows(one) ? block_of(c, keys_of(one.end), Heads::KEYS) : values_of(std::min(Share(a.heads * parts).begin, a.heads * parts - 1));
            const i64 piece = one.begin % most, r = one.begin / most / teams, group = one.begin / most % teams * Heads::TEAM;
            const TeamSums team = {&sums[(r * groups + group) * most + piece], std::min<i64>(Heads::TEAM, groups - group), most};
            if (piece < pieces(first + r)) Heads::read(a, c, keys_of(one.begin), ahead, packed + one.begin / most * Heads::words(a), team, bench);
        }
        #pragma omp barrier
        // The pieces become one; then the expansion of values, rank → v for each head.
        float* count = counts + me * most * LANES;
        for (Share s(rows * a.heads); s.begin < s.end;) {
            const i64 r = s.begin / a.heads, group = s.begin % a.heads / LANES, end = std::min(s.end, r * a.heads + std::min((group + 1) * LANES, a.heads));
            const i64 n = pieces(first + r);
            const Sums* mine = sums.data() + (r * groups + group) * most;
            const __m512 never = _mm512_set1_ps(-INFINITY);
            __m512 top = never, sum = _mm512_setzero_ps();
            for (i64 p = 0; p < n; p++) top = _mm512_max_ps(top, _mm512_loadu_ps(mine[p].best));
            top = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, never, _CMP_EQ_OQ), _mm512_setzero_ps());
            const auto weight = [&](i64 p) { return two_to(_mm512_sub_ps(_mm512_loadu_ps(mine[p].best), top)); };
            for (i64 p = 0; p < n; p++) sum = _mm512_fmadd_ps(weight(p), _mm512_loadu_ps(mine[p].total), sum);
            for (i64 p = 0; p < n; p++)  // what each piece counts for
                _mm512_storeu_ps(count + p * LANES, _mm512_div_ps(weight(p), _mm512_max_ps(_mm512_set1_ps(1e-30f), sum)));  // in this order NaN stays
            for (; s.begin < end; s.begin++) {
                const i64 i = s.begin % a.heads % LANES;
                for (i64 column = 0; column < a.rank; column += 32) {
                    __m512 low = _mm512_setzero_ps(), high = low;
                    for (i64 p = 0; p < n; p++) {
                        const __m512 factor = _mm512_set1_ps(count[p * LANES + i]);
                        const float* read = Heads::columns(mine[p], a, i, column);
                        low = _mm512_fmadd_ps(_mm512_loadu_ps(read), factor, low);
                        high = _mm512_fmadd_ps(_mm512_loadu_ps(read + 16), factor, high);
                    }
                    Heads::store32(low, high, read16 + s.begin * a.rank + column);
                }
            }
        }
        #pragma omp barrier
        Dealt dealt_values(&dealt[2 * threads], a.heads * parts, 1);
        for (Range one; !(one = dealt_values.next()).none();) {
            const i64 h = one.begin / parts;
            linear(expansion(a, h) + a.nope * a.rank, a.rank, read16 + h * a.rank, a.heads * a.rank, rows, part_of(one.begin % parts, a.v),
                   [&](i64 o, i64 r, __m512 y, __mmask16 there) { narrow16(value + (r * a.heads + h) * a.v + o, y, there); },
                   dealt_values.follows(one) ? values_of(one.end) : then);
        }
        #pragma omp barrier
    }
};

// What queries read of a cache that holds their own keys already: value (rows, heads, v).
extern "C" void kimi_read(const Attention* given, const Latents* cache, i64 rows, const Queries* queries, bf16* value, i64 threads) {
    constexpr i64 AT_ONCE = 32;  // rows: what is held of them is little
    for (i64 first = 0; first < rows; first += AT_ONCE) {
        const Queries& q = *queries;
        Reader reader{*given, *cache, first, std::min(rows - first, AT_ONCE), threads};
        arena.layout([&] { reader.layout(); });
        #pragma omp parallel num_threads(threads)
        {
            const Tiles tiles;
            reader.run({q.still + first * q.still_row, q.turned + first * q.turned_row, q.still_row, q.still_head, q.turned_row, q.turned_head},
                       value + first * given->heads * given->v, {});
        }
    }
}

// out = x + attention(norm(x)): new tokens, whose latents and rotary keys are written into the cache.
extern "C" void kimi_attention(const Attention* given, const Latents* cache, i64 rows, const bf16* x, const float* cos,
                               const float* sin, bf16* out, i64 threads) {
    const Attention& a = *given;
    const Latents& c = *cache;
    const i64 head = a.nope + a.rope;
    bf16 *normed, *query_a, *key_value, *query, *turned, *value;
    Reader reader{a, c, 0, rows, threads};
    arena.layout([&] {
        normed = arena.take<bf16>(rows * a.hidden);
        query_a = arena.take<bf16>(rows * (a.q_lora ? a.q_lora : 1));
        key_value = arena.take<bf16>(rows * (a.rank + a.rope));
        query = arena.take<bf16>(rows * a.heads * head);
        turned = arena.take<bf16>(rows * a.heads * a.rope);
        value = arena.take<bf16>(rows * a.heads * a.v);
        reader.layout();
    });
    std::vector<Taken> dealt(4 * threads);  // by each phase
    #pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * a.hidden, a.norm, normed + s.begin * a.hidden, a.hidden, a.eps);
        #pragma omp barrier
        const i64 narrow_size = a.rank + a.rope, inputs = a.q_lora ? a.q_lora : a.hidden;
        // What each phase reads first is asked for at the end of the one before.
        if (a.q_lora)
            linear(a.q_a, a.hidden, normed, a.hidden, rows, Outputs(&dealt[0], a.q_lora), [&](i64 o, i64 r, __m512 y, __mmask16 there) {
                narrow16(query_a + r * a.q_lora + o, a.q_a_bias ? _mm512_add_ps(y, wide16(a.q_a_bias + o, there)) : y, there);
            }, rows_of(a.kv_a, a.hidden, Share(narrow_size, BLOCK)));
        linear(a.kv_a, a.hidden, normed, a.hidden, rows, Outputs(&dealt[threads], narrow_size), [&](i64 o, i64 r, __m512 y, __mmask16 there) {
            narrow16(key_value + r * narrow_size + o, a.kv_a_bias ? _mm512_add_ps(y, wide16(a.kv_a_bias + o, there)) : y, there);
        }, rows_of(a.q_b, inputs, Share(a.heads * head, BLOCK)));
        #pragma omp barrier
        for (Share s(rows); s.begin < s.end; s.begin++) {
            const i64 r = s.begin, sequence = c.sequence(r), at = c.seen(r) - 1;
            if (a.q_lora) rms_norm(query_a + r * a.q_lora, a.q_a_norm, query_a + r * a.q_lora, a.q_lora, a.latent_eps);
            const bf16* mine = key_value + r * narrow_size;
            rms_norm(mine, a.kv_a_norm, c.latent + sequence * c.latent_row + at * c.latent_key, a.rank, a.latent_eps);
            rotate(mine + a.rank, cos + r * a.rope / 2, sin + r * a.rope / 2, c.rotary + sequence * c.rotary_row + at * c.rotary_key, a.rope);
        }
        #pragma omp barrier
        linear(a.q_b, inputs, a.q_lora ? query_a : normed, inputs, rows, Outputs(&dealt[2 * threads], a.heads * head),
               [&](i64 o, i64 r, __m512 y, __mmask16 there) { narrow16(query + r * a.heads * head + o, y, there); },
               rows_of(expansion(a, std::min(Share(a.heads).begin, a.heads - 1)), a.rank, {0, a.nope}));
        #pragma omp barrier
        for (Share s(rows * a.heads); s.begin < s.end; s.begin++) {
            const i64 r = s.begin / a.heads;
            rotate(query + s.begin * head + a.nope, cos + r * a.rope / 2, sin + r * a.rope / 2, turned + s.begin * a.rope, a.rope);
        }
        reader.run({query, turned, a.heads * head, head, a.heads * a.rope, a.rope}, value, rows_of(a.o, a.heads * a.v, Share(a.hidden, BLOCK)));
        linear(a.o, a.heads * a.v, value, a.heads * a.v, rows, Outputs(&dealt[3 * threads], a.hidden), [&](i64 o, i64 r, __m512 y, __mmask16 there) {
            const i64 at = r * a.hidden + o;
            y = rounded16(a.o_bias ? _mm512_add_ps(y, wide16(a.o_bias + o, there)) : y);
            narrow16(out + at, _mm512_add_ps(wide16(x + at, there), y), there);
        });
    }
}
"""
