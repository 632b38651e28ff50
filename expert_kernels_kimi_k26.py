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
    const bf16** x; bf16** inner; bf16* scratch; float *gate, *up;
    static void layout(Bench* benches, i64 threads, i64 rows, i64 k) {
        for (i64 t = 0; t < threads; t++)
            benches[t] = {arena.take<const bf16*>(rows), arena.take<bf16*>(rows), arena.take<bf16>(BLOCK * k),
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
                for (i64 r = 0; r < t.rows; r++) mine.x[r] = inner + pair[t.first + r] * width;
                for (i64 from = begin; from < end; from += BLOCK)
                    products(t.expert->down, from, std::min(from + BLOCK, end), mine.x, t.rows, width, f.group_size, mine.scratch,
                             [&](i64 o, i64 r, float y) {
                        const i64 p = pair[t.first + r];
                        sums[p / f.top_k * f.hidden + o] += weights[p] * rounded(y);
                    });
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

enum { TILE = 32, OUTPUTS = 8 };  // rows and outputs multiplied at once, many rows

// Some weights of a matrix as they are or unpacked into `scratch`: (outputs, k).
static const bf16* unpacked(Matrix m, i64 from, i64 to, i64 k, i64 group, bf16* scratch) {
    if (!m.scales) return (const bf16*)m.values + from * k;
    for (i64 o = from; o < to; o++)
        dequantize((const uint8_t*)m.values + o * k / 2, m.scales + o * (k / group), k, group, scratch + (o - from) * k);
    return scratch;
}

// sum[o][g] = w[o] . x for up to `OUTPUTS` outputs, a tile of packed rows.
static void tile(const uint32_t* x, const bf16* w, i64 outputs, i64 k, __m512 (&sum)[OUTPUTS][TILE / LANES]) {
    for (auto& one : sum) for (auto& part : one) part = _mm512_setzero_ps();
    if (outputs == OUTPUTS) return lanes<TILE / LANES, OUTPUTS>(x, (const uint32_t*)w, k / 2, 1, k / 2, sum);
    for (i64 o = 0; o < outputs; o++)
        lanes<TILE / LANES, 1>(x, (const uint32_t*)(w + o * k), 0, 1, k / 2, *(__m512(*)[1][TILE / LANES])&sum[o]);
}

static inline __m512 rounded16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(x)), 16));
}
static inline __m512 swish(__m512 gate, __m512 up) {  // bf16(silu(gate)) * up
    const __m512 g = rounded16(gate), s = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
    return _mm512_mul_ps(rounded16(s), rounded16(up));
}

// The weighted sum of each row's experts, for many rows: an expert's weights are unpacked once, a block of outputs at a
// time, and meet its rows, one to a lane. All threads work on one expert, each on outputs of its own.
extern "C" void kimi_many_experts(const FeedForward* given, i64 rows, const bf16* x, const float* weights, const i64* chosen,
                                  const Expert* const* table, bf16* out, i64 threads) {
    const FeedForward& f = *given;
    const i64 width = f.expert_width, hidden = f.hidden, group = f.group_size;
    sort_pairs(chosen, table, rows * f.top_k, teams, order);
    i64 most = 0;
    for (const Team& t : teams) most = std::max(most, (t.rows + TILE - 1) / TILE);
    uint32_t *packed, *inner;  // (tiles, pairs of inputs, TILE)
    float* sums;               // (rows, hidden)
    bf16* scratch[MAX_THREADS];
    arena.layout([&] {
        packed = arena.take<uint32_t>(most * TILE * hidden / 2);
        inner = arena.take<uint32_t>(most * TILE * width / 2);
        sums = arena.take<float>(rows * hidden);
        for (i64 t = 0; t < threads; t++) scratch[t] = arena.take<bf16>(2 * LANES * std::max(hidden, width));
    });
    const i64* pair = order.data();
    const Team* team = teams.data();  // of this thread, which all read
    const i64 count = teams.size();
    #pragma omp parallel num_threads(threads)
    {
        bf16* const mine = scratch[omp_get_thread_num()];
        for (Share s(rows); s.begin < s.end; s.begin++) memset(sums + s.begin * hidden, 0, hidden * sizeof(float));
        for (i64 e = 0; e < count; e++) {
            const Team& t = team[e];
            const i64 tiles = (t.rows + TILE - 1) / TILE;
            for (Share s(tiles * (TILE / LANES)); s.begin < s.end; s.begin++) {
                const i64 first = s.begin * LANES;
                const bf16* from[LANES];
                for (i64 i = 0; i < LANES && first + i < t.rows; i++) from[i] = x + pair[t.first + first + i] / f.top_k * hidden;
                pack(from, t.rows - first, hidden / 2, packed + first / TILE * TILE * (hidden / 2) + first % TILE, TILE);
            }
            #pragma omp barrier
            #pragma omp for schedule(dynamic, 1)
            for (i64 o = 0; o < width; o += OUTPUTS) {
                const i64 some = std::min<i64>(OUTPUTS, width - o);
                const bf16* gate = unpacked(t.expert->gate, o, o + some, hidden, group, mine);
                const bf16* up = unpacked(t.expert->up, o, o + some, hidden, group, mine + OUTPUTS * hidden);
                for (i64 n = 0; n < tiles; n++) {
                    __m512 g[OUTPUTS][TILE / LANES], u[OUTPUTS][TILE / LANES];
                    tile(packed + n * TILE * (hidden / 2), gate, some, hidden, g);
                    tile(packed + n * TILE * (hidden / 2), up, some, hidden, u);
                    for (i64 i = 0; i < some; i += 2)
                        for (int l = 0; l < TILE / LANES; l++)
                            _mm512_storeu_si512(inner + (n * (width / 2) + (o + i) / 2) * TILE + l * LANES,
                                                paired(swish(g[i][l], u[i][l]), swish(g[i + 1][l], u[i + 1][l])));
                }
            }
            #pragma omp for schedule(dynamic, 1)
            for (i64 o = 0; o < hidden; o += LANES) {
                const bf16* down = unpacked(t.expert->down, o, o + LANES, width, group, mine);
                for (i64 n = 0; n < tiles; n++) {
                    __m512 y[LANES / OUTPUTS][OUTPUTS][TILE / LANES];
                    for (int half = 0; half < LANES / OUTPUTS; half++)
                        tile(inner + n * TILE * (width / 2), down + half * OUTPUTS * width, OUTPUTS, width, y[half]);
                    for (int l = 0; l < TILE / LANES; l++) {
                        const i64 first = n * TILE + l * LANES;
                        if (first >= t.rows) break;
                        __m512 row[LANES];
                        rows_of(&y[0][0][l], TILE / LANES, row);
                        for (i64 i = 0; i < LANES && first + i < t.rows; i++) {
                            const i64 p = pair[t.first + first + i];
                            float* to = sums + p / f.top_k * hidden + o;
                            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(weights[p]), rounded16(row[i]), _mm512_loadu_ps(to)));
                        }
                    }
                }
            }
        }
        for (Share s(rows * hidden, LANES); s.begin < s.end; s.begin += LANES)
            _mm256_storeu_si256((__m256i*)(out + s.begin), narrow16(_mm512_loadu_ps(sums + s.begin)));
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
