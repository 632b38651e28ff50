"""A decode step as an operation of PyTorch's compiled graphs, without Python in between."""

VERSION = 2 << 56 | 13 << 48  # of PyTorch, whose ways with values these are

GRAPHS = f"static const uint64_t VERSION = {VERSION};" + r"""
// ---------------------------------------------------------------------------------------- steps in compiled graphs

typedef uint64_t Value;  // a number; the handle of a tensor or a list; an optional one: null, or the address of its value

// What PyTorch lets other libraries call (torch/csrc/stable/c/shim.h): the addresses are given, as nothing is linked with it.
static struct Torch {
    int32_t (*address)(Value tensor, void** at);
    int32_t (*sizes)(Value tensor, const i64** at);
    int32_t (*strides)(Value tensor, const i64** at);
    int32_t (*contiguous)(Value tensor, bool* is);
    int32_t (*empty)(i64 axes, const i64* sizes, const i64* strides, int32_t dtype, int32_t device, int32_t number, Value* tensor);
    int32_t (*drop)(Value tensor);
    int32_t (*count)(Value list, size_t* items);
    int32_t (*item)(Value list, size_t i, Value* item);  // lent
    int32_t (*drop_list)(Value list);                    // but not its items
    int32_t (*drop_value)(Value* at);
    int32_t (*threads)(uint32_t* count);
    int32_t (*call)(const char* operation, const char* overload, Value* stack, uint64_t version);
    const char* (*what)();  // went wrong last
} torch_;
enum { BFLOAT16 = 15, FLOAT32 = 6 };  // dtypes, as PyTorch numbers them

struct Seen {  // a tensor that somebody else holds
    char* at;
    const i64 *sizes, *strides;
    bool contiguous;
    explicit Seen(Value tensor) {
        torch_.address(tensor, (void**)&at); torch_.sizes(tensor, &sizes); torch_.strides(tensor, &strides); torch_.contiguous(tensor, &contiguous);
    }
};
struct Made {  // a contiguous tensor of three axes
    Value tensor;
    void* at;
    Made(i64 a, i64 b, i64 c, int32_t dtype) {
        const i64 sizes[] = {a, b, c}, strides[] = {b * c, c, 1};
        if (torch_.empty(3, sizes, strides, dtype, 0, 0, &tensor)) throw std::bad_alloc();
        torch_.address(tensor, &at);
    }
};

// A text model in graphs. `ready` says how its next steps may go without a look at its modules: so many, if one sequence goes on.
struct Ready {
    const Layer* layers; i64 count;
    const bf16* norm; float eps;
    i64 rows, hidden, routing, experts, top_k;  // routing: layers that do
    const void* where; i64 past;                // the first layer's latents, and how many there are
    i64 steps;
};
struct Graph {
    std::string slowly;  // the operation that looks at all, does the same and makes it ready
    Ready ready = {};
    std::vector<Layer> layers;
    std::vector<bf16> hidden;  // of a step, for itself
    std::vector<float> weights, turns;
    std::vector<i64> chosen;
    i64 used = 0;     // experts, by the steps since it was made ready
    std::mutex turn;  // of all threads
};
static std::mutex graphs_turn;
static std::map<i64, std::shared_ptr<Graph>> graphs;  // by the number of the model
static std::shared_ptr<Graph> graph_of(i64 model) {
    std::lock_guard<std::mutex> turn(graphs_turn);
    const auto found = graphs.find(model);
    return found == graphs.end() ? nullptr : found->second;
}

extern "C" void kimi_torch(const Torch* given) { torch_ = *given; }
extern "C" void kimi_graph(i64 model, const char* slowly) {
    std::lock_guard<std::mutex> turn(graphs_turn);
    graphs[model] = std::make_shared<Graph>();
    graphs[model]->slowly = slowly;
}
// Returns how many experts were used since the last time.
extern "C" i64 kimi_ready(i64 model, const Ready* ready) {
    Graph& g = *graph_of(model);  // the model is there as long as this
    std::lock_guard<std::mutex> turn(g.turn);
    g.ready = *ready;
    g.layers.assign(ready->layers, ready->layers + ready->count);
    g.hidden.resize(2 * ready->rows * ready->hidden);
    g.weights.resize(ready->routing * ready->rows * ready->top_k);
    g.chosen.resize(g.weights.size());
    return std::exchange(g.used, 0);
}
// A model, or all whose layers have this table of experts, are not ready any more. A step that is being done is done first: what it reads
// may go then.
extern "C" void kimi_unready(i64 model, const void* table) {
    std::vector<std::shared_ptr<Graph>> found;
    {
        std::lock_guard<std::mutex> turn(graphs_turn);
        for (auto& [number, graph] : graphs) if (table || number == model) found.push_back(graph);
    }
    for (auto& graph : found) {
        std::lock_guard<std::mutex> turn(graph->turn);
        const auto has_table = [&](const Layer& layer) { return layer.experts == table; };
        if (!table || std::any_of(graph->layers.begin(), graph->layers.end(), has_table)) graph->ready.steps = 0;
    }
}
// A model is no more.
extern "C" void kimi_no_graph(i64 model) {
    kimi_unready(model, nullptr);
    std::lock_guard<std::mutex> turn(graphs_turn);
    graphs.erase(model);
}

enum { X, COS, SIN, AT, PADDING, KEYS, VALUES, HEAD, MODEL };  // of the stack of arguments
enum { OUT, LOGITS, SCORES };                                  // and of results

static void drop_arguments(Value* stack) {
    for (int argument : {X, COS, SIN, AT}) torch_.drop(stack[argument]);
    for (int argument : {KEYS, VALUES}) {
        size_t items;
        torch_.count(stack[argument], &items);
        for (size_t i = 0; i < items; i++) { Value one; torch_.item(stack[argument], i, &one); torch_.drop(one); }
        torch_.drop_list(stack[argument]);
    }
    for (int argument : {PADDING, HEAD})
        if (Value* at = (Value*)stack[argument]) { torch_.drop(*at); torch_.drop_value(at); }
}

// Whether the step is done, and the results are in place of the arguments.
static bool step_of(Graph& g, Value* stack) {
    std::lock_guard<std::mutex> turn(g.turn);
    Ready& r = g.ready;
    if (r.steps <= 0) return false;
    const Seen x(stack[X]), cos(stack[COS]), sin(stack[SIN]);
    const i64 past = *(const i64*)Seen(stack[AT]).at;
    if (past != r.past || x.sizes[0] != r.rows || !x.contiguous || !cos.contiguous || !sin.contiguous) return false;
    const uint8_t* mask = nullptr;
    i64 mask_row = 0;
    if (stack[PADDING]) {
        const Seen padding(*(Value*)stack[PADDING]);
        if (padding.sizes[0] != r.rows || padding.sizes[1] <= past || !padding.contiguous) return false;
        mask = (const uint8_t*)padding.at; mask_row = padding.strides[0];
    }
    for (i64 l = 0; l < r.count; l++) {
        Value keys, values;
        torch_.item(stack[KEYS], l, &keys); torch_.item(stack[VALUES], l, &values);
        const Seen latent(keys), rotary(values);
        if (latent.sizes[0] != r.rows || latent.sizes[2] <= past) return false;
        g.layers[l].latents = {(bf16*)latent.at, (bf16*)rotary.at, latent.strides[0], latent.strides[2], rotary.strides[0], rotary.strides[2], past, 1, mask, mask_row};
    }
    if (g.layers[0].latents.latent != r.where) return false;

    Step step = {};
    step.norm = r.norm; step.eps = r.eps; step.rows = r.rows;
    step.middle = g.hidden.data(); step.normed = step.middle + r.rows * r.hidden;
    step.cos = (const float*)cos.at; step.sin = (const float*)sin.at;
    if (cos.sizes[0] < r.rows) {  // all rows turn alike
        const i64 half = g.layers[0].attention.rope / 2, all = r.rows * half;
        g.turns.resize(2 * all);
        for (i64 i = 0; i < all; i++) { g.turns[i] = step.cos[i % half]; g.turns[all + i] = step.sin[i % half]; }
        step.cos = g.turns.data(); step.sin = step.cos + all;
    }
    step.weights = g.weights.data(); step.chosen = g.chosen.data();
    if (stack[HEAD]) {
        const Seen head(*(Value*)stack[HEAD]);
        step.head = (const bf16*)head.at; step.outputs = head.sizes[0];
    }
    const Made out(r.rows, 1, r.hidden, BFLOAT16), logits(r.routing, r.rows, r.experts, FLOAT32), scores(r.rows, 1, step.outputs, BFLOAT16);
    memcpy(out.at, x.at, r.rows * r.hidden * sizeof(bf16));
    step.x = (bf16*)out.at; step.logits = (float*)logits.at; step.scores = (bf16*)scores.at;
    uint32_t threads;
    torch_.threads(&threads);
    if (kimi_decode(g.layers.data(), r.count, 0, 0, &step, threads) < r.count) {  // an expert is not known: all from the beginning
        for (Value tensor : {out.tensor, logits.tensor, scores.tensor}) torch_.drop(tensor);
        return false;
    }
    g.used += step.used;
    r.past++; r.steps--;

    drop_arguments(stack);
    stack[OUT] = out.tensor; stack[LOGITS] = logits.tensor; stack[SCORES] = scores.tensor;
    return true;
}
extern "C" void kimi_step(Value* stack, uint64_t, uint64_t) {
    const std::shared_ptr<Graph> g = graph_of(stack[MODEL]);
    if (!g) {
        drop_arguments(stack);
        throw std::runtime_error("the model that this graph was made of is no more");
    }
    if (step_of(*g, stack) || !torch_.call(g->slowly.c_str(), "", stack, VERSION)) return;
    std::string what = torch_.what();
    what = what.substr(0, what.find("\n\nAt:\n"));  // where in Python follows
    const auto is = [&](const char* kind) { return what.rfind(kind, 0) == 0; };
    if (is("ValueError: ")) throw std::invalid_argument(what.substr(strlen("ValueError: ")));  // which Python sees as what it was
    if (is("KeyboardInterrupt")) std::raise(SIGINT);  // once more, as it must not end here
    throw std::runtime_error(what);
}
"""
