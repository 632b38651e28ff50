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

enum { RUN = 16 };  // blocks of outputs that a thread takes in one go

static inline __m512 swish(__m512 gate, __m512 up) {  // bf16(silu(gate)) * up
    const __m512 g = rounded16(gate), s = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1), two_to(_mm512_mul_ps(g, _mm512_set1_ps(-LOG2_E)))));
    return _mm512_mul_ps(rounded16(s), rounded16(up));
}

// inner = silu(gate) * up of the dense network or the shared expert, for this thread's share of the outputs; gates: (rows, width).
static void gate_up(const FeedForward& f, const bf16* x, i64 rows, float* gates, bf16* inner) {
    const Share share(f.width, BLOCK);
    linear(f.gate, f.hidden, x, f.hidden, rows, share, [&](i64 o, i64 r, __m512 y, __mmask16 there) {
        _mm512_mask_storeu_ps(gates + r * f.width + o, there, y);
    });
    linear(f.up, f.hidden, x, f.hidden, rows, share, [&](i64 o, i64 r, __m512 y, __mmask16 there) {
        const i64 at = r * f.width + o;
        narrow16(inner + at, swish(_mm512_maskz_loadu_ps(there, gates + at), y), there);
    });
}
// inner[r][from … to] = silu(gate) * up of an expert, for a block of outputs; where it is one of INT4 words, x is spread.
static void gate_up(const Expert& e, i64 from, i64 to, const bf16* const* x, i64 rows, i64 k, i64 group, bf16* const* inner,
                    float* gate) {  // (rows, BLOCK)
    products(e.gate, from, to, x, rows, k, group, [&](i64, i64 r, __m512 y, __mmask16) { _mm512_storeu_ps(gate + r * BLOCK, y); });
    products(e.up, from, to, x, rows, k, group, [&](i64 o, i64 r, __m512 y, __mmask16 there) {
        const __m512 values = swish(_mm512_loadu_ps(gate + r * BLOCK), y);
        narrow16(inner[r] + o, values, there);
    });
}

// Each thread's own memory for the products of up to `rows` rows.
struct Bench {
    const bf16** x; bf16** inner; float** sum; float *factor, *gate;
    static void layout(std::vector<Bench>& benches, i64 threads, i64 rows) {
        for (i64 t = 0; t < threads; t++)
            benches[t] = {arena.take<const bf16*>(rows), arena.take<bf16*>(rows), arena.take<float*>(rows),
                          arena.take<float>(rows), arena.take<float>(rows * BLOCK)};
    }
};
// normed = norm(x); the router's logits, and the chosen experts of each row with their weights.
extern "C" void kimi_route(const FeedForward* given, i64 rows, const bf16* x, bf16* normed, float* logits, float* weights, i64* chosen,
                           i64 threads) {
    const FeedForward& f = *given;
    #pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * f.hidden, f.norm, normed + s.begin * f.hidden, f.hidden, f.eps);
        #pragma omp barrier
        linear(f.router, f.hidden, normed, f.hidden, rows, Share(f.experts, BLOCK), [&](i64 o, i64 r, __m512 y, __mmask16 there) {
            _mm512_mask_storeu_ps(logits + r * f.experts + o, there, y);
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
                if (top < 0) {  // all others are NaN: some expert must be named, none twice
                    const i64* named = chosen + r * f.top_k;
                    for (top = 0; std::find(named, named + n, top) != named + n;) top++;
                }
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
struct Team { const Expert* expert; i64 first, rows, place; };  // an expert, its pairs in `order`, and where many rows keep what they are turned to
static void sort_pairs(const i64* chosen, const Expert* const* table, i64 pairs, std::vector<Team>& teams, std::vector<i64>& order) {
    teams.clear(); order.clear();
    for (i64 p = 0; p < pairs; p++) if (table[p]) order.push_back(p);
    std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return chosen[a] < chosen[b]; });
    for (i64 n = 0; n < (i64)order.size(); n++) {
        if (n == 0 || chosen[order[n]] != chosen[order[n - 1]]) teams.push_back({table[order[n]], n, 0, 0});
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
    // INT4 words want rows spread: see `complete`.
    const i64 outer_row = f.group_size ? spread_size(f.hidden) : 0, inner_row = f.group_size ? spread_size(width) : width;
    sort_pairs(chosen, table, pairs, teams, order);
    bf16 *outer, *inner, *shared;
    float *sums, *gates;  // (rows, hidden), (rows, width)
    std::vector<Bench> benches(threads);
    arena.layout([&] {
        outer = arena.take<bf16>(rows * outer_row);
        inner = arena.take<bf16>(pairs * inner_row + 32);
        shared = arena.take<bf16>(rows * (f.gate ? f.width : 1) + 32);
        gates = arena.take<float>(rows * (f.gate ? f.width : 1));
        sums = arena.take<float>(rows * f.hidden);
        Bench::layout(benches, threads, rows);
    });
    const Team* team = teams.data();
    const i64* pair = order.data();
    const i64 count = teams.size(), blocks = (width + BLOCK - 1) / BLOCK;
    #pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Bench& mine = benches[omp_get_thread_num()];
        if (f.gate) gate_up(f, normed, rows, gates, shared);
        if (f.group_size) {
            for (Share s(rows); s.begin < s.end; s.begin++) {
                memcpy(outer + s.begin * outer_row, normed + s.begin * f.hidden, f.hidden * sizeof(bf16));
                complete(outer + s.begin * outer_row, f.hidden);
            }
            #pragma omp barrier
        }
        #pragma omp for schedule(dynamic, RUN)
        for (i64 unit = 0; unit < count * blocks; unit++) {
            const Team t = team[unit / blocks];
            const i64 from = unit % blocks * BLOCK;
            for (i64 r = 0; r < t.rows; r++) {
                const i64 row = pair[t.first + r] / f.top_k;
                mine.x[r] = f.group_size ? outer + row * outer_row : normed + row * f.hidden;
                mine.inner[r] = inner + pair[t.first + r] * inner_row;
            }
            gate_up(*t.expert, from, std::min(from + BLOCK, width), mine.x, t.rows, f.hidden, f.group_size, mine.inner, mine.gate);
        }
        if (f.group_size) {
            for (Share s(pairs); s.begin < s.end; s.begin++) complete(inner + s.begin * inner_row, width);
            #pragma omp barrier
        }
        // Each thread has some of the outputs, of every expert in turn: the longest runs of memory there are.
        const Share outputs(f.hidden, BLOCK);
        const i64 begin = outputs.begin, end = outputs.end;
        for (i64 r = 0; r < rows; r++) memset(sums + r * f.hidden + begin, 0, (end - begin) * sizeof(float));
        for (i64 n = 0; n < count; n++) {
            const Team& t = team[n];
            for (i64 r = 0; r < t.rows; r++) {
                const i64 p = pair[t.first + r];
                mine.x[r] = inner + p * inner_row; mine.sum[r] = sums + p / f.top_k * f.hidden; mine.factor[r] = weights[p];
            }
            products(t.expert->down, begin, end, mine.x, t.rows, width, f.group_size, [&](i64 o, i64 r, __m512 y, __mmask16 there) {
                float* sum = mine.sum[r] + o;
                y = _mm512_fmadd_ps(_mm512_set1_ps(mine.factor[r]), rounded16(y), _mm512_maskz_loadu_ps(there, sum));
                _mm512_mask_storeu_ps(sum, there, y);
            });
        }
        const auto finish = [&](i64 o, i64 r, __m512 y, __mmask16 there) {  // y: of the shared expert
            const i64 at = r * f.hidden + o;
            __m512 sum = rounded16(_mm512_maskz_loadu_ps(there, sums + at));
            if (f.gate) sum = rounded16(_mm512_add_ps(sum, rounded16(y)));
            narrow16(out + at, x ? _mm512_add_ps(wide16(x + at, there), sum) : sum, there);
        };
        if (f.gate) linear(f.down, f.width, shared, f.width, rows, outputs, finish);
        else for (i64 o = begin; o < end; o += BLOCK) for (i64 r = 0; r < rows; r++) finish(o, r, _mm512_setzero_ps(), first16(end - o));
    }
}

// The weights of a panel of outputs, of one matrix or of two that are alike.
static Ahead panel_of(i64 from, i64 k, Matrix a, Matrix b = {}) {
    const i64 row = row_bytes(a, k);
    if (!b.values) return {(const char*)a.values + from * row, PANEL * row};
    return {(const char*)a.values + from * row, PANEL * row, (const char*)b.values + from * row, PANEL * row};
}

// The weighted sum of each row's experts, for many rows. All threads work on one expert, each on outputs of its own; where experts have
// few rows, some of them are computed together, as threads that wait for each other lose time.
extern "C" void kimi_many_experts(const FeedForward* given, i64 rows, const bf16* x, const float* weights, const i64* chosen,
                                  const Expert* const* table, bf16* out, i64 threads) {
    constexpr i64 TOGETHER_AT_MOST = 256;  // pairs, whose inner values the second cache holds; but at least one expert's
    const FeedForward& f = *given;
    const i64 width = f.expert_width, hidden = f.hidden, group = f.group_size, widest = std::max(hidden, width);
    const i64 outer_row = paired_size(hidden), inner_row = paired_size(width), panels = (width + PANEL - 1) / PANEL;
    sort_pairs(chosen, table, rows * f.top_k, teams, order);
    std::vector<i64> ends;  // of those teams that are computed together
    i64 most = 0, place = 0, places = 0;
    for (Team& t : teams) {
        const i64 room = room_for(t.rows);
        if (place && place + room > TOGETHER_AT_MOST) {
            ends.push_back(&t - teams.data());
            place = 0;
        }
        t.place = place;
        place += room;
        most = std::max(most, room);
        places = std::max(places, place);
    }
    ends.push_back(teams.size());
    uint32_t *outer, *inner;  // (places, words)
    float* sums;              // (rows, hidden)
    struct Mine { Panel panel; float *y, *z; };
    std::vector<Mine> benches(threads);
    arena.layout([&] {
        outer = arena.take<uint32_t>(places * outer_row);
        inner = arena.take<uint32_t>(places * inner_row);
        sums = arena.take<float>(rows * hidden);
        for (i64 t = 0; t < threads; t++)
            benches[t] = {{arena.take<uint32_t>(panel_words(widest)), arena.take<float>(widest / STRETCH * PANEL)},
                          arena.take<float>(most * PANEL), arena.take<float>(most * PANEL)};
    });
    const i64* pair = order.data();  // (row, choice) of each row of a team
    const Team* team = teams.data();  // of this thread, which all read
    const i64 count = teams.size();
    #pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        const Mine mine = benches[omp_get_thread_num()];
        for (Share s(rows); s.begin < s.end; s.begin++) memset(sums + s.begin * hidden, 0, hidden * sizeof(float));
        i64 begin = 0;
        for (const i64 end : ends) {
            for (i64 e = begin; e < end; e++)
                for (Share s(team[e].rows); s.begin < s.end; s.begin++) {
                    const bf16* from = x + pair[team[e].first + s.begin] / f.top_k * hidden;
                    for (i64 i = 0; i < hidden; i += 32)
                        put_pairs(outer + (team[e].place + s.begin) * outer_row, hidden, i, _mm512_loadu_si512(from + i), group);
                }
            #pragma omp barrier
            #pragma omp for schedule(dynamic, 1)
            for (i64 unit = 0; unit < (end - begin) * panels; unit++) {
                const i64 e = begin + unit / panels, o = unit % panels * PANEL;
                const Team& t = team[e];
                const uint32_t* given = outer + t.place * outer_row;
                if (e + 1 < count) ask_for(panel_of(o, hidden, team[e + 1].expert->gate, team[e + 1].expert->up));
                meet(mine.panel, t.expert->gate, o, width, group, given, t.rows, outer_row, hidden, mine.y);
                meet(mine.panel, t.expert->up, o, width, group, given, t.rows, outer_row, hidden, mine.z);
                for (i64 r = 0; r < t.rows; r++) {
                    __m512 values[2];
                    for (int v = 0; v < 2; v++)
                        values[v] = swish(_mm512_loadu_ps(mine.y + r * PANEL + v * LANES), _mm512_loadu_ps(mine.z + r * PANEL + v * LANES));
                    put_pairs(inner + (t.place + r) * inner_row, width, o, (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]), group);
                }
            }
            #pragma omp for schedule(dynamic, 1)
            for (i64 o = 0; o < hidden; o += PANEL)
                for (i64 e = begin; e < end; e++) {
                    const Team& t = team[e];
                    if (e + 1 < count) ask_for(panel_of(o, width, team[e + 1].expert->down));
                    meet(mine.panel, t.expert->down, o, hidden, group, inner + t.place * inner_row, t.rows, inner_row, width, mine.y);
                    const auto sum_of = [&](i64 r, int v) { return sums + pair[t.first + r] / f.top_k * hidden + o + v * LANES; };
                    for (i64 r = 0; r < t.rows; r++)
                        for (int v = 0; v < 2; v++) {
                            _mm_prefetch((const char*)sum_of(std::min(r + 8, t.rows - 1), v), _MM_HINT_T0);  // rows lie anywhere
                            float* to = sum_of(r, v);
                            const __m512 y = rounded16(_mm512_loadu_ps(mine.y + r * PANEL + v * LANES));
                            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(weights[pair[t.first + r]]), y, _mm512_loadu_ps(to)));
                        }
                }
            begin = end;
        }
        for (Share s(rows * hidden, LANES); s.begin < s.end; s.begin += LANES)
            _mm256_storeu_si256((__m256i*)(out + s.begin), narrow16(_mm512_loadu_ps(sums + s.begin)));
    }
}

// out = x + down(silu(gate) * up) of norm(x): a dense layer.
extern "C" void kimi_dense(const FeedForward* given, i64 rows, const bf16* x, bf16* out, i64 threads) {
    const FeedForward& f = *given;
    bf16 *normed, *inner;
    float* gates;
    arena.layout([&] {
        normed = arena.take<bf16>(rows * f.hidden);
        inner = arena.take<bf16>(rows * f.width + 32);
        gates = arena.take<float>(rows * f.width);
    });
    std::vector<Taken> dealt(threads);
    #pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        for (Share s(rows); s.begin < s.end; s.begin++)
            rms_norm(x + s.begin * f.hidden, f.norm, normed + s.begin * f.hidden, f.hidden, f.eps);
        #pragma omp barrier
        gate_up(f, normed, rows, gates, inner);
        #pragma omp barrier
        linear(f.down, f.width, inner, f.width, rows, Outputs(dealt.data(), f.hidden), [&](i64 o, i64 r, __m512 y, __mmask16 there) {
            const i64 at = r * f.hidden + o;
            narrow16(out + at, _mm512_add_ps(wide16(x + at, there), rounded16(y)), there);
        });
    }
}

// out = x . w transposed, for the output layer.
extern "C" void kimi_linear(const bf16* w, i64 outputs, i64 inputs, i64 rows, const bf16* x, bf16* out,
                            i64 threads) {
    std::vector<Taken> dealt(threads);
    #pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        linear(w, inputs, x, inputs, rows, Outputs(dealt.data(), outputs), [&](i64 o, i64 r, __m512 y, __mmask16 there) {
            narrow16(out + r * outputs + o, y, there);
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
    const bf16* norm; float eps;  // what is after the last layer, null: nothing; its result takes the place of `x`
    i64 rows, used;  // used: experts of all layers, each once however many rows it has
    const bf16* head; bf16* scores; i64 outputs;  // the output layer, null: none; what it makes of that result, (rows, outputs)
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
    const i64 hidden = layers[0].feed_forward.hidden;
    if (s.norm) for (i64 r = 0; r < s.rows; r++) rms_norm(s.x + r * hidden, s.norm, s.x + r * hidden, hidden, s.eps);
    if (s.head) kimi_linear(s.head, s.outputs, hidden, s.rows, s.x, s.scores, threads);
    return count;
}

// out = x . w transposed (+ bias), for many rows.
extern "C" void kimi_many_rows(const bf16* w, const bf16* bias, i64 outputs, i64 inputs, i64 rows, const bf16* x, bf16* out, i64 threads) {
    constexpr i64 AT_ONCE = 512;  // rows that meet the same panel: what is held of them is little, and panels are filled seldom
    const i64 most = room_for(std::min(rows, AT_ONCE)), row = paired_size(inputs);
    uint32_t* given;
    struct Mine { Panel panel; float* y; };
    std::vector<Mine> benches(threads);
    arena.layout([&] {
        given = arena.take<uint32_t>(most * row);
        for (i64 t = 0; t < threads; t++)
            benches[t] = {{arena.take<uint32_t>(panel_words(inputs)), arena.take<float>(inputs / STRETCH * PANEL)}, arena.take<float>(most * PANEL)};
    });
    #pragma omp parallel num_threads(threads)
    for (i64 first = 0; first < rows; first += AT_ONCE) {
        const Tiles tiles;
        const Mine mine = benches[omp_get_thread_num()];
        const i64 some = std::min(rows - first, AT_ONCE);
        for (Share s(some); s.begin < s.end; s.begin++)
            for (i64 i = 0; i < inputs; i += 32)
                put_pairs(given + s.begin * row, inputs, i, _mm512_loadu_si512(x + (first + s.begin) * inputs + i), false);
        #pragma omp barrier
        #pragma omp for schedule(dynamic, 1)
        for (i64 o = 0; o < outputs; o += PANEL) {
            meet(mine.panel, {w, nullptr}, o, outputs, 0, given, some, row, inputs, mine.y);
            for (i64 r = 0; r < some; r++)
                for (i64 at = o; at < std::min(o + PANEL, outputs); at += LANES) {
                    const __mmask16 there = first16(outputs - at);
                    __m512 y = _mm512_loadu_ps(mine.y + r * PANEL + at - o);
                    if (bias) y = _mm512_add_ps(y, wide16(bias + at, there));
                    narrow16(out + (first + r) * outputs + at, y, there);
                }
        }
    }
}

// In place of x what a linear layer's products become: x + bias, or the GELU of that, as the hyperbolic tangent approximates it, and the
// residual added. Rounded once. y (1 + tanh(u)) / 2 = y / (1 + e^(-2u)), u = sqrt(2 / pi) (y + 0.044715 y^3).
extern "C" void kimi_finish(bf16* x, const bf16* bias, i64 gelu, const bf16* residual, i64 rows, i64 size, i64 threads) {
    const __m512 one = _mm512_set1_ps(1), factor = _mm512_set1_ps(-2 * 0.79788456f * LOG2_E), cubic = _mm512_set1_ps(0.044715f);
    #pragma omp parallel num_threads(threads)
    for (Share s(rows); s.begin < s.end; s.begin++)
        for (i64 i = 0; i < size; i += LANES) {
            const __mmask16 there = first16(size - i);
            bf16* at = x + s.begin * size + i;
            __m512 y = wide16(at, there);
            if (bias) y = _mm512_add_ps(y, wide16(bias + i, there));
            if (gelu) {
                const __m512 u = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(y, y), y), cubic, y);
                y = _mm512_div_ps(y, _mm512_add_ps(one, two_to(_mm512_mul_ps(u, factor))));
            }
            if (residual) y = _mm512_add_ps(y, wide16(residual + s.begin * size + i, there));
            narrow16(at, y, there);
        }
}

extern "C" void kimi_norm(const bf16* x, const bf16* weight, bf16* out, i64 rows, i64 size, float eps, i64 threads) {
    #pragma omp parallel num_threads(threads)
    for (Share s(rows); s.begin < s.end; s.begin++) rms_norm(x + s.begin * size, weight, out + s.begin * size, size, eps);
}

// `size` values of each of `heads` heads of each row, turned by the row's angles; out (rows, heads, size).
extern "C" void kimi_rotate(const bf16* x, i64 row, i64 head, const float* cos, const float* sin, bf16* out, i64 rows, i64 heads,
                            i64 size, i64 threads) {
    #pragma omp parallel num_threads(threads)
    for (Share s(rows); s.begin < s.end; s.begin++)
        for (i64 h = 0; h < heads; h++)
            rotate(x + s.begin * row + h * head, cos + s.begin * size / 2, sin + s.begin * size / 2, out + (s.begin * heads + h) * size, size);
}

// INT4 words → the bfloat16 weights they stand for.
extern "C" void kimi_dequantize(const uint8_t* words, const bf16* scales, i64 outputs, i64 inputs, i64 group, bf16* out,
                                i64 threads) {
    #pragma omp parallel num_threads(threads)
    for (Share s(outputs); s.begin < s.end; s.begin++)
        dequantize(words + s.begin * inputs / 2, scales + s.begin * (inputs / group), inputs, group, out + s.begin * inputs);
}
"""
