// A forward pass as a list of operations, run by one team of threads without going back to Python.
//
// An operation reads and writes ranges of columns of row-major buffers, one row a token. The buffers
// lie in one arena; their places are given for one row and grow with the number of rows.

namespace {

enum Kind : int64_t {
    EMBED, LINEAR, RMS_NORM, LAYER_NORM, ROTATE, ATTEND, ADD, MULTIPLY, SCALE, ACTIVATE, TANH,
    KEEP
};

// Columns from `offset` of a buffer `stride` columns wide. `place`: where it begins, in floats a row;
// LOGITS and NONE stand for what is not in the arena.
struct Operand {
    int64_t place, offset, stride;
};
constexpr int64_t NONE = -1, LOGITS = -2;

struct Op {
    int64_t kind;
    int64_t kept;  // 1: over the rows that are kept for logits, not over all tokens
    Operand a, b, c, to;
    int64_t count, size;       // heads and their dimension, or 1 and the number of columns
    int64_t inner;             // LINEAR: columns of the input
    const float *weight, *bias;  // LINEAR: packed; ROTATE: cosines and sines [positions, D]
    int64_t int8;              // LINEAR: the weights, else float32
    int64_t flag;              // LINEAR: add to what is there; EMBED: of positions
    int64_t layer, kv_heads, window;
    double first, second;      // the kind's numbers
};

struct Run {
    float *arena, *logits;
    int64_t tokens, kept;
    const int64_t *token_ids, *positions, *keep;
    // attention
    const int64_t* slots;
    int64_t num_slots;
    float* const* keys;  // of each layer
    float* const* values;
    const Part* parts;
    const int32_t *pages, *rows, *query_index, *token_first, *token_rows;
    int64_t num_parts, page_size;
    float* results;
};

INLINE float* at(const Operand& operand, const Run& run) {
    if (operand.place == NONE) return nullptr;
    if (operand.place == LOGITS) return run.logits;
    return run.arena + operand.place * run.tokens + operand.offset;
}

TARGET
void add(const float* a, const float* b, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i++) to[i] = a[i] + b[i];
}

TARGET
void multiply(const float* a, const float* b, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i++) to[i] = a[i] * b[i];
}

TARGET
void scale(const float* a, float by, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i++) to[i] = a[i] * by;
}

INLINE void execute_attention(prefixd::Member& member, const Op& op, const Run& run) {
    member.shares([&](int64_t share, int64_t shares) {
        store(at(op.b, run), op.b.stride, op.size, at(op.c, run), op.c.stride, op.size, run.slots,
              run.num_slots * share / shares, run.num_slots * (share + 1) / shares, op.kv_heads,
              op.size, run.keys[op.layer], run.values[op.layer]);
    });
    const Step step{run.parts, run.pages, run.rows, run.query_index, int32_t(run.page_size)};
    const Layer layer{at(op.a, run), op.a.stride, op.size, run.keys[op.layer], run.values[op.layer],
                      int32_t(op.count), int32_t(op.kv_heads), int32_t(op.size), float(op.first),
                      float(op.second), int32_t(op.window)};
    attend(member, step, layer, run.num_parts, run.token_first, run.token_rows, run.tokens,
           run.results, at(op.to, run));
}

constexpr int64_t MOST_PHASES = 1 + ATTEND_PHASES;  // of an operation

INLINE void execute_row(const Op& op, const Run& run, int64_t row) {
    const float* a = at(op.a, run);
    const float* b = at(op.b, run);
    if (a) a += row * op.a.stride;
    if (b) b += row * op.b.stride;
    float* to = at(op.to, run) + row * op.to.stride;
    const int64_t columns = op.count * op.size;
    switch (op.kind) {
        case EMBED: {
            const int64_t index = (op.flag ? run.positions : run.token_ids)[row];
            std::memcpy(to, op.weight + index * columns, columns * sizeof(float));
            break;
        }
        case KEEP:
            a = at(op.a, run) + run.keep[row] * op.a.stride;
            std::memcpy(to, a, columns * sizeof(float));
            break;
        case RMS_NORM:
            for (int64_t i = 0; i < columns; i += op.size)
                normalise(a + i, op.weight, op.first, op.second, op.size, to + i);
            break;
        case LAYER_NORM:
            for (int64_t i = 0; i < columns; i += op.size)
                centre(a + i, op.weight, op.bias, op.second, op.size, to + i);
            break;
        case ROTATE: {
            const int64_t angles = run.positions[row] * op.size;
            for (int64_t i = 0; i < columns; i += op.size)
                rotate(a + i, op.weight + angles, op.bias + angles, op.size, to + i);
            break;
        }
        case ADD: add(a, b, columns, to); break;
        case MULTIPLY: multiply(a, b, columns, to); break;
        case SCALE: scale(a, op.first, columns, to); break;
        case ACTIVATE:
            activate(a, op.first, op.second, columns, to);
            if (b) multiply(to, b, columns, to);
            break;
        case TANH:
            for (int64_t i = 0; i < columns; i++) to[i] = std::tanh(a[i]);
            break;
    }
}

INLINE prefixd::Product product_of(const Op& op, const Run& run) {
    return {at(op.a, run), op.a.stride, op.weight, op.int8 != 0, op.bias,
            op.kept ? run.kept : run.tokens, op.size, op.inner, at(op.to, run), op.to.stride,
            op.flag != 0};
}

// `end` is behind the last operation: the next product's weights are prefetched.
INLINE void execute_linear(prefixd::Member& member, const Op& op, const Op* end, const Run& run,
                           prefixd::Wanted& wanted) {
    prefixd::Product product = product_of(op, run), following;
    product.wanted = &wanted;
    const Op* other = &op + 1;
    while (other < end && other->kind != LINEAR) other++;
    if (other < end) {
        following = product_of(*other, run);
        product.next = &following;
    }
    member.offer_core();
    member.shares([&](int share, int shares) { prefixd::gemm_in_team(product, share, shares); });
}

// From `op` on, the next attention's keys and values are what this thread wants.
INLINE void want_next(const Op* op, const Op* end, const Run& run, const Lookahead& lookahead,
                      prefixd::Wanted& wanted) {
    while (op < end && op->kind != ATTEND) op++;
    wanted = op < end ? lookahead.of(run.keys[op->layer], run.values[op->layer])
                      : prefixd::Wanted{};
}

// Called by all members of the team; done when it returns.
INLINE void execute(prefixd::Member& member, const Op& op, const Op* end, const Run& run,
                    prefixd::Wanted& wanted) {
    const int64_t rows = op.kept ? run.kept : run.tokens;
    switch (op.kind) {
        case LINEAR: execute_linear(member, op, end, run, wanted); break;
        case ATTEND: execute_attention(member, op, run); break;
        default:
            member.shares([&](int64_t share, int64_t shares) {
                for (int64_t row = rows * share / shares; row < rows * (share + 1) / shares; row++)
                    execute_row(op, run, row);
            });
    }
}

// All of it; called by all members of the team.
INLINE void execute_all(prefixd::Member& member, const Op* ops, int64_t num_ops, const Run& run) {
    static thread_local Lookahead lookahead;
    const Op *end = ops + num_ops, *attention = ops;
    while (attention < end && attention->kind != ATTEND) attention++;
    if (attention < end)
        lookahead.plan(run.parts, run.num_parts, run.pages, run.page_size,
                       attention->kv_heads * attention->size * sizeof(float));
    prefixd::Wanted wanted;
    want_next(ops, end, run, lookahead, wanted);
    for (const Op* op = ops; op < end; op++) {
        execute(member, *op, end, run, wanted);
        if (op->kind == ATTEND) want_next(op + 1, end, run, lookahead, wanted);
    }
}

}  // namespace
