"""The CPU's kernels of everything after attention: routing, experts, dense networks, the output layer; and whole layers."""

EXPERTS = r"""
// ---------------------------------------------------------------------------------------- feed-forward

struct FeedForward {
    const bf16 *norm, *gate, *up, *down;  // the dense network or the shared expert; null: none
    const bf16* router; const float* bias;
    i64 hidden, width, experts, top_k, groups, top_groups, normalize, expert_width, group_size;
    float eps, scaling;
};

struct Expert { Matrix gate, up, down; };

enum { RUN = 16, PARTS = 4 };  // blocks of outputs that a thread takes in one go; pieces of the outputs for each thread

// From 16 sums each: bf16(bf16(silu(gate)) * up).
static inline void swish(const float* gate, const float* up, bf16* out, i64 count) {
    __m512 g = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(_mm512_loadu_ps(gate))), 16));
    __m512 u = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(_mm512_loadu_ps(up))), 16));
    __m512 s = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
    s = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(s)), 16));
    _mm256_mask_storeu_epi16(out, count >= 16 ? 0xffff : (1 << count) - 1, narrow16(_mm512_mul_ps(s, u)));
}

// inner[r][from … to] = silu(gate) * up of one network, for a block of outputs.
static void gate_up(const Expert& e, i64 from, i64 to, const bf16* const* x, i64 rows, i64 k, i64 group, bf16* const* inner,
                    bf16* scratch, float* gate, float* up) {  // gate, up: (rows, BLOCK)
    products(e.gate, from, to, x, rows, k, group, scratch, [&](i64 o, i64 r, float y) { gate[r * BLOCK + o - from] = y; });
    products(e.up, from, to, x, rows, k, group, scratch, [&](i64 o, i64 r, float y) { up[r * BLOCK + o - from] = y; });
    for (i64 r = 0; r < rows; r++) swish(gate + r * BLOCK, up + r * BLOCK, inner[r] + from, to - from);
}

// Each thread's own memory for the products of up to `rows` rows.
struct Bench {
    const bf16** x; bf16** inner; float** sum; float* factor; bf16* scratch; float *gate, *up;
    static void layout(Bench* benches, i64 threads, i64 rows, i64 k) {
        for (i64 t = 0; t < threads; t++)
            benches[t] = {arena.take<const bf16*>(rows), arena.take<bf16*>(rows), arena.take<float*>(rows),
                          arena.take<float>(rows), arena.take<bf16>(BLOCK * k),
                          arena.take<float>(rows * BLOCK), arena.take<float>(rows * BLOCK)};
    }
};
// normed = norm(x); the router's logits, and the chosen experts of each row with their weights.
extern "C" void kimi_route(const FeedForward* given, i64 rows, const bf16* x, bf16* normed, float* logits, float* weights, i64* chosen,
                           i64 threads) {
    const FeedForward& f = *given;
    #pragma omp parallel num_threads(threads)
    {
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * f.hidden, f.norm, normed + s.begin * f.hidden, f.hidden, f.eps);
        #pragma omp barrier
        linear(f.router, f.experts, f.hidden, normed, rows, Share(f.experts, BLOCK), [&](i64 o, i64 r, float y) {
            logits[r * f.experts + o] = y;
        });
        #pragma omp barrier
        std::vector<float> score(f.experts), choice(f.experts), merit(f.groups);
        for (Share s(rows); s.begin < s.end; s.begin++) {
            const i64 r = s.begin, per = f.experts / f.groups;
            for (i64 e = 0; e < f.experts; e++) {
                score[e] = 1.0f / (1.0f + expf(-logits[r * f.experts + e]));
                choice[e] = score[e] + f.bias[e];
            }
            if (f.groups > 1) {  // only the groups with the largest sum of their two best take part
                for (i64 g = 0; g < f.groups; g++) {
                    float one = -INFINITY, two = -INFINITY;
                    for (i64 e = g * per; e < (g + 1) * per; e++) {
                        if (choice[e] > one) { two = one; one = choice[e]; } else if (choice[e] > two) two = choice[e];
                    }
                    merit[g] = one + two;
                }
                std::vector<char> stays(f.groups, 0);
                for (i64 n = 0; n < f.top_groups; n++) {
                    i64 top = -1;
                    for (i64 g = 0; g < f.groups; g++) if (!stays[g] && (top < 0 || merit[g] > merit[top])) top = g;
                    stays[top] = 1;
                }
                for (i64 e = 0; e < f.experts; e++) if (!stays[e / per]) choice[e] = -INFINITY;
            }
            float sum = 0;
            for (i64 n = 0; n < f.top_k; n++) {
                i64 top = -1;
                for (i64 e = 0; e < f.experts; e++) if (!std::isnan(choice[e]) && (top < 0 || choice[e] > choice[top])) top = e;
                if (top < 0) top = n;  // all are NaN: some expert must be named
                chosen[r * f.top_k + n] = top;
                weights[r * f.top_k + n] = score[top];
                sum += score[top];
                choice[top] = NAN;
            }
            for (i64 n = 0; n < f.top_k; n++) {
                float& w = weights[r * f.top_k + n];
                w = (f.normalize ? w / (sum + 1e-20f) : w) * f.scaling;
            }
        }
    }
}

// The (row, choice) pairs by expert, so that a row's sum has one order in any company.
struct Team { const Expert* expert; i64 first, rows; };  // an expert, and its pairs' places in `order`
static void sort_pairs(const i64* chosen, const Expert* const* table, i64 pairs, std::vector<Team>& teams, std::vector<i64>& order) {
    teams.clear(); order.clear();
    for (i64 p = 0; p < pairs; p++) if (table[p]) order.push_back(p);
    std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return chosen[a] < chosen[b]; });
    for (i64 n = 0; n < (i64)order.size(); n++) {
        if (n == 0 || chosen[order[n]] != chosen[order[n - 1]]) teams.push_back({table[order[n]], n, 0});
        teams.back().rows++;
    }
}
static thread_local std::vector<Team> teams;
static thread_local std::vector<i64> order;

// out = x + the weighted sum of each row's experts + the shared one; without x, and without a shared one, only the sum.
// `table`: the expert of each (row, choice), null where it is computed elsewhere. For few rows: each weight is read once
// and as it lies, in long runs.
extern "C" void kimi_experts(const FeedForward* given, i64 rows, const bf16* x, const bf16* normed, const float* weights,
                             const i64* chosen, const Expert* const* table, bf16* out, i64 threads) {
    const FeedForward& f = *given;
    const i64 pairs = rows * f.top_k, width = f.expert_width;
    sort_pairs(chosen, table, pairs, teams, order);
    bf16 *inner, *shared;
    float* sums;  // (rows, hidden)
    Bench benches[MAX_THREADS];
    arena.layout([&] {
        inner = arena.take<bf16>(pairs * width + 32);
        shared = arena.take<bf16>(rows * (f.gate ? f.width : 1) + 32);
        sums = arena.take<float>(rows * f.hidden);
        Bench::layout(benches, threads, rows, std::max(f.hidden, std::max(width, f.width)));
    });
    const Team* team = teams.data();
    const i64* pair = order.data();
    const i64 count = teams.size(), blocks = (width + BLOCK - 1) / BLOCK, common_blocks = f.gate ? (f.width + BLOCK - 1) / BLOCK : 0;
    const Expert common = {{f.gate, nullptr}, {f.up, nullptr}, {f.down, nullptr}};
    #pragma omp parallel num_threads(threads)
    {
        const Bench& mine = benches[omp_get_thread_num()];
        #pragma omp for schedule(dynamic, RUN)
        for (i64 unit = 0; unit < count * blocks + common_blocks; unit++) {
            const bool is_common = unit >= count * blocks;
            const Team t = is_common ? Team{&common, 0, rows} : team[unit / blocks];
            const i64 size = is_common ? f.width : width, from = (is_common ? unit - count * blocks : unit % blocks) * BLOCK;
            for (i64 r = 0; r < t.rows; r++) {
                mine.x[r] = normed + (is_common ? r : pair[t.first + r] / f.top_k) * f.hidden;
                mine.inner[r] = is_common ? shared + r * f.width : inner + pair[t.first + r] * width;
            }
            gate_up(*t.expert, from, std::min(from + BLOCK, size), mine.x, t.rows, f.hidden, is_common ? 0 : f.group_size,
                    mine.inner, mine.scratch, mine.gate, mine.up);
        }
        // Each thread has some of the outputs, of every expert in turn.
        const i64 parts = std::min((i64)omp_get_num_threads() * PARTS, (f.hidden + BLOCK - 1) / BLOCK);
        #pragma omp for schedule(dynamic, 1)
        for (i64 part = 0; part < parts; part++) {
            const i64 all = (f.hidden + BLOCK - 1) / BLOCK;
            const i64 begin = all * part / parts * BLOCK, end = std::min(all * (part + 1) / parts * BLOCK, f.hidden);
            for (i64 r = 0; r < rows; r++) memset(sums + r * f.hidden + begin, 0, (end - begin) * sizeof(float));
            for (i64 n = 0; n < count; n++) {
                const Team& t = team[n];
                for (i64 r = 0; r < t.rows; r++) {
                    const i64 p = pair[t.first + r];
                    mine.x[r] = inner + p * width; mine.sum[r] = sums + p / f.top_k * f.hidden; mine.factor[r] = weights[p];
                }
                for (i64 from = begin; from < end; from += BLOCK)
                    products(t.expert->down, from, std::min(from + BLOCK, end), mine.x, t.rows, width, f.group_size, mine.scratch,
                             [&](i64 o, i64 r, float y) { mine.sum[r][o] += mine.factor[r] * rounded(y); });
            }
            for (i64 r = 0; r < rows; r++)
                for (i64 o = begin; o < end; o++) sums[r * f.hidden + o] = rounded(sums[r * f.hidden + o]);
            if (f.gate) {
                for (i64 r = 0; r < rows; r++) mine.x[r] = shared + r * f.width;
                for (i64 from = begin; from < end; from += BLOCK)
                    products(common.down, from, std::min(from + BLOCK, end), mine.x, rows, f.width, 0, mine.scratch,
                             [&](i64 o, i64 r, float y) {
                        float& sum = sums[r * f.hidden + o];
                        sum = rounded(sum + rounded(y));
                    });
            }
            for (i64 r = 0; r < rows; r++)
                for (i64 o = begin; o < end; o++) {
                    const i64 at = r * f.hidden + o;
                    out[at] = narrow((x ? wide(x[at]) : 0) + sums[at]);
                }
        }
    }
}

// Rows multiplied at once, a tile; pairs of inputs of a tile that stay in the first cache; outputs of one piece of work.
enum { TILE = 32, CHUNK = 192, PANEL = 64 };

// Some weights of a matrix, as they are or unpacked into `scratch`, with the distance between rows: one that is no power
// of two where we have the choice, as the first cache would keep few rows of the others.
struct Panel { const bf16* weights; i64 row; };
static Panel panel(Matrix m, i64 from, i64 to, i64 k, i64 group, bf16* scratch) {
    if (!m.scales) return {(const bf16*)m.values + from * k, k};
    const i64 row = k + LANES * 2;
    for (i64 o = from; o < to; o++)
        dequantize((const uint8_t*)m.values + o * k / 2, m.scales + o * (k / group), k, group, scratch + (o - from) * row);
    return {scratch, row};
}

// Let the words of some outputs come nearer while others are being multiplied.
static void ask_for(Matrix m, i64 from, i64 to, i64 k) {
    if (!m.scales) return;
    const char* begin = (const char*)m.values + from * k / 2;
    for (const char* at = begin; at < begin + (to - from) * k / 2; at += 64) _mm_prefetch(at, _MM_HINT_T1);
}

// y[o][lane] = w[o] . x for a panel and a tile of packed rows: (outputs, G * LANES).
template <int G> static void multiply(const uint32_t* x, Panel w, i64 outputs, i64 k, float* y) {
    constexpr int N = G == 1 ? 16 : 8;
    for (i64 begin = 0; begin < k / 2; begin += CHUNK) {
        const i64 pairs = std::min<i64>(CHUNK, k / 2 - begin);
        auto some = [&](i64 o, auto& sum) {
            constexpr int count = sizeof(sum) / sizeof(sum[0]);
            for (int n = 0; n < count; n++)
                for (int g = 0; g < G; g++) sum[n][g] = begin ? _mm512_loadu_ps(y + ((o + n) * G + g) * LANES) : _mm512_setzero_ps();
            lanes<G, count>(x + begin * G * LANES, (const uint32_t*)(w.weights + o * w.row) + begin, w.row / 2, 1, pairs, sum);
            for (int n = 0; n < count; n++)
                for (int g = 0; g < G; g++) _mm512_storeu_ps(y + ((o + n) * G + g) * LANES, sum[n][g]);
        };
        i64 o = 0;
        for (; o + N <= outputs; o += N) { __m512 sum[N][G]; some(o, sum); }
        for (; o < outputs; o++) { __m512 sum[1][G]; some(o, sum); }
    }
}

static inline __m512 rounded16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(x)), 16));
}
static inline __m512 swish(const float* gate, const float* up) {  // bf16(silu(gate)) * up
    const __m512 g = rounded16(_mm512_loadu_ps(gate)), s = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
    return _mm512_mul_ps(rounded16(s), rounded16(_mm512_loadu_ps(up)));
}

// The weighted sum of each row's experts, for many rows: an expert's weights are unpacked once, a panel of outputs at a
// time, and meet its rows, one to a lane. All threads work on one expert, each on outputs of its own.
struct Many {
    const FeedForward& f;
    const float* weights;
    const i64* pair;          // of the expert at hand: (row, choice) of each of its rows
    uint32_t *packed, *inner;  // (tiles, pairs of inputs, lanes)
    float* sums;              // (rows, hidden)

    template <int G> void gate_up(i64 tile, Panel gate, Panel up, i64 o, i64 outputs, float* y) const {
        const uint32_t* x = packed + tile * TILE * (f.hidden / 2);
        float* z = y + PANEL * TILE;
        multiply<G>(x, gate, outputs, f.hidden, y);
        multiply<G>(x, up, outputs, f.hidden, z);
        uint32_t* to = inner + tile * TILE * (f.expert_width / 2) + o / 2 * G * LANES;
        for (i64 at = 0; at < outputs * G; at += 2 * G)
            for (int g = 0; g < G; g++) {
                const i64 one = (at + g) * LANES, two = one + G * LANES;
                _mm512_storeu_si512(to + (at / 2 + g) * LANES, paired(swish(y + one, z + one), swish(y + two, z + two)));
            }
    }
    template <int G> void down(i64 tile, i64 rows, Panel w, i64 o, i64 outputs, float* y) const {
        multiply<G>(inner + tile * TILE * (f.expert_width / 2), w, outputs, f.expert_width, y);
        for (i64 first = 0; first < rows; first += LANES)
            for (i64 at = 0; at < outputs; at += LANES) {
                __m512 column[LANES], row[LANES];
                for (int c = 0; c < LANES; c++) column[c] = _mm512_loadu_ps(y + (at + c) * G * LANES + first);
                rows_of(column, 1, row);
                for (i64 i = 0; i < std::min<i64>(LANES, rows - first); i++) {
                    const i64 p = pair[tile * TILE + first + i];
                    float* to = sums + p / f.top_k * f.hidden + o + at;
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(weights[p]), rounded16(row[i]), _mm512_loadu_ps(to)));
                }
            }
    }
};
extern "C" void kimi_many_experts(const FeedForward* given, i64 rows, const bf16* x, const float* weights, const i64* chosen,
                                  const Expert* const* table, bf16* out, i64 threads) {
    const FeedForward& f = *given;
    const i64 width = f.expert_width, hidden = f.hidden, group = f.group_size, widest = std::max(hidden, width) + LANES * 2;
    sort_pairs(chosen, table, rows * f.top_k, teams, order);
    i64 most = 0;
    for (const Team& t : teams) most = std::max(most, (t.rows + TILE - 1) / TILE);
    Many all = {f, weights};
    struct Mine { bf16* scratch; float* y; } benches[MAX_THREADS];
    arena.layout([&] {
        all.packed = arena.take<uint32_t>(most * TILE * hidden / 2);
        all.inner = arena.take<uint32_t>(most * TILE * width / 2);
        all.sums = arena.take<float>(rows * hidden);
        for (i64 t = 0; t < threads; t++) benches[t] = {arena.take<bf16>(2 * PANEL * widest), arena.take<float>(2 * PANEL * TILE)};
    });
    const i64* pair = order.data();
    const Team* team = teams.data();  // of this thread, which all read
    const i64 count = teams.size();
    #pragma omp parallel num_threads(threads)
    {
        const Mine mine = benches[omp_get_thread_num()];
        Many work = all;
        for (Share s(rows); s.begin < s.end; s.begin++) memset(work.sums + s.begin * hidden, 0, hidden * sizeof(float));
        for (i64 e = 0; e < count; e++) {
            const Team& t = team[e];
            const i64 tiles = (t.rows + TILE - 1) / TILE;
            work.pair = pair + t.first;
            // Half a tile is enough for the last few rows.
            auto left = [&](i64 tile) { return std::min<i64>(TILE, t.rows - tile * TILE); };
            for (Share s((t.rows + LANES - 1) / LANES); s.begin < s.end; s.begin++) {
                const i64 first = s.begin * LANES, tile = first / TILE;
                const bf16* from[LANES];
                for (i64 i = 0; i < LANES && first + i < t.rows; i++) from[i] = x + work.pair[first + i] / f.top_k * hidden;
                pack(from, t.rows - first, hidden / 2, work.packed + tile * TILE * (hidden / 2) + first % TILE,
                     left(tile) > LANES ? TILE : LANES);
            }
            #pragma omp barrier
            #pragma omp for schedule(dynamic, 1)
            for (i64 o = 0; o < width; o += PANEL) {
                const i64 some = std::min<i64>(PANEL, width - o);
                const Panel gate = panel(t.expert->gate, o, o + some, hidden, group, mine.scratch);
                const Panel up = panel(t.expert->up, o, o + some, hidden, group, mine.scratch + PANEL * widest);
                if (e + 1 < count) { ask_for(team[e + 1].expert->gate, o, o + some, hidden); ask_for(team[e + 1].expert->up, o, o + some, hidden); }
                for (i64 n = 0; n < tiles; n++)
                    left(n) > LANES ? work.gate_up<2>(n, gate, up, o, some, mine.y) : work.gate_up<1>(n, gate, up, o, some, mine.y);
            }
            #pragma omp for schedule(dynamic, 1)
            for (i64 o = 0; o < hidden; o += PANEL) {
                const i64 some = std::min<i64>(PANEL, hidden - o);
                const Panel down = panel(t.expert->down, o, o + some, width, group, mine.scratch);
                if (e + 1 < count) ask_for(team[e + 1].expert->down, o, o + some, width);
                for (i64 n = 0; n < tiles; n++)
                    left(n) > LANES ? work.down<2>(n, left(n), down, o, some, mine.y) : work.down<1>(n, left(n), down, o, some, mine.y);
            }
        }
        for (Share s(rows * hidden, LANES); s.begin < s.end; s.begin += LANES)
            _mm256_storeu_si256((__m256i*)(out + s.begin), narrow16(_mm512_loadu_ps(work.sums + s.begin)));
    }
}

// out = x + down(silu(gate) * up) of norm(x): a dense layer.
extern "C" void kimi_dense(const FeedForward* given, i64 rows, const bf16* x, bf16* out, i64 threads) {
    const FeedForward& f = *given;
    bf16 *normed, *inner;
    Bench benches[MAX_THREADS];
    arena.layout([&] {
        normed = arena.take<bf16>(rows * f.hidden);
        inner = arena.take<bf16>(rows * f.width + 32);
        Bench::layout(benches, threads, rows, f.hidden);
    });
    const Expert network = {{f.gate, nullptr}, {f.up, nullptr}, {f.down, nullptr}};
    #pragma omp parallel num_threads(threads)
    {
        const Bench& mine = benches[omp_get_thread_num()];
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * f.hidden, f.norm, normed + s.begin * f.hidden, f.hidden, f.eps);
        #pragma omp barrier
        for (i64 r = 0; r < rows; r++) { mine.x[r] = normed + r * f.hidden; mine.inner[r] = inner + r * f.width; }
        for (Share s(f.width, BLOCK); s.begin < s.end; s.begin += BLOCK)
            gate_up(network, s.begin, std::min(s.begin + BLOCK, s.end), mine.x, rows, f.hidden, 0, mine.inner, mine.scratch,
                    mine.gate, mine.up);
        #pragma omp barrier
        linear(f.down, f.hidden, f.width, inner, rows, Share(f.hidden, BLOCK), [&](i64 o, i64 r, float y) {
            const i64 at = r * f.hidden + o;
            out[at] = narrow(wide(x[at]) + rounded(y));
        });
    }
}

// One new token for each row through layers, as far as the experts are known.
struct Layer {
    Attention attention;
    Latents latents;
    FeedForward feed_forward;
    const Expert* const* experts;  // by number, null where not yet known; null: a dense layer
};
struct Step {  // (rows, …): the hidden state, two places for it; of each layer the router's logits, weights and choices
    bf16 *x, *middle, *normed;
    const float *cos, *sin;
    float *logits, *weights; i64* chosen;
    i64 rows, used;  // used: experts of all layers, each once however many rows it has
};

// Computes layers `from` to `count`. Where an expert is not known it ends before that layer's experts and gives its number,
// from which it goes on, `routed`, when called again; else it gives `count`.
extern "C" i64 kimi_decode(const Layer* layers, i64 count, i64 from, i64 routed, Step* step, i64 threads) {
    Step& s = *step;
    static thread_local std::vector<const Expert*> table;
    float *logits = s.logits, *weights = s.weights;
    i64* chosen = s.chosen;
    for (i64 l = 0; l < count; l++) {
        const Layer& layer = layers[l];
        const FeedForward& f = layer.feed_forward;
        if (l >= from && !routed) kimi_attention(&layer.attention, &layer.latents, s.rows, s.x, s.cos, s.sin, s.middle, threads);
        if (!layer.experts) {
            if (l >= from) kimi_dense(&f, s.rows, s.middle, s.x, threads);
            continue;
        }
        if (l >= from) {
            if (!routed) kimi_route(&f, s.rows, s.middle, s.normed, logits, weights, chosen, threads);
            routed = 0;
            table.clear();
            for (i64 p = 0; p < s.rows * f.top_k; p++) {
                table.push_back(layer.experts[chosen[p]]);
                if (!table.back()) return l;
            }
            kimi_experts(&f, s.rows, s.middle, s.normed, weights, chosen, table.data(), s.x, threads);
            s.used += teams.size();
        }
        logits += s.rows * f.experts; weights += s.rows * f.top_k; chosen += s.rows * f.top_k;
    }
    return count;
}

// out = x . w transposed, for the output layer.
extern "C" void kimi_linear(const bf16* w, i64 outputs, i64 inputs, i64 rows, const bf16* x, bf16* out,
                            i64 threads) {
    #pragma omp parallel num_threads(threads)
    linear(w, outputs, inputs, x, rows, Share(outputs, BLOCK), [&](i64 o, i64 r, float y) { out[r * outputs + o] = narrow(y); });
}

// INT4 words → the bfloat16 weights they stand for.
extern "C" void kimi_dequantize(const uint8_t* words, const bf16* scales, i64 outputs, i64 inputs, i64 group, bf16* out,
                                i64 threads) {
    #pragma omp parallel num_threads(threads)
    for (Share s(outputs); s.begin < s.end; s.begin++)
        dequantize(words + s.begin * inputs / 2, scales + s.begin * (inputs / group), inputs, group, out + s.begin * inputs);
}
"""
