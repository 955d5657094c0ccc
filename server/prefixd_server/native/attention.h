// Attention over paged keys and values, in float32.
//
// Attention is computed in parts: a part is a range of one page list (a prefix, or a sequence's own
// tokens) against the queries that see it, so a prefix is read once for all its requests. Each part
// leaves, for each of its queries and heads, a maximum, a sum and a weighted value; `merge` joins
// the parts of a query by their log-sum-exp (as FlashInfer's cascade and flash-decoding do).
//
// `attend` and `store` are called by all threads of a team; each ends with a barrier.

namespace {

constexpr int KEYS = 128;  // of a block
constexpr int MOST_VECTORS = 2;  // of rows
constexpr int FEW_ROWS = 8;  // up to here, a vector holds a row's dimensions instead of rows
constexpr int FEW_ROWS_KEYS = 256;  // of a block then: only scores are kept, not vectors of them

// Keys by their index in the joint sequence: the prefix's pages, then the sequence's own.
struct Part {
    int32_t first_row, end_row;       // its queries, in `rows`
    int32_t prefix_page, prefix_len;  // where its prefix's page list begins, in `pages`
    int32_t own_page;
    int32_t first_key, end_key;
};

struct Step {
    const Part* parts;
    const int32_t* pages;
    const int32_t* rows;         // packed token of each row
    const int32_t* query_index;  // [T] index in the joint sequence
    int32_t page_size;
};

struct Layer {
    const float* query;  // [T, H, D], with strides
    int64_t query_token, query_head;
    const float* keys;  // [num_slots, H_kv, D]
    const float* values;
    int32_t heads, kv_heads, dim;
    float scaling, softcap;
    int32_t window;  // 0: none
};

struct Range {
    int32_t first, end;
};

// Which of the part's keys a query sees.
INLINE Range seen_by(int32_t query_index, const Part& part, int32_t window) {
    int32_t end = std::min(part.end_key, query_index + 1);
    int32_t first = part.first_key;
    if (window > 0) first = std::max(first, query_index + 1 - window);
    if (first >= end) return {part.end_key, part.first_key};  // none, and no bound for other rows
    return {first, end};
}

// Where the keys of a block start in the pool, for one head; the last one again up to `room`.
INLINE void locate(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                   int32_t first, int32_t count, int32_t room, int64_t* at) {
    const int64_t slot_size = int64_t(layer.kv_heads) * layer.dim;
    const bool in_prefix = first < part.prefix_len;
    int32_t before_own = in_prefix ? part.prefix_len - first : 0;
    const int32_t from = in_prefix ? first : first - part.prefix_len;
    const int32_t* page =
        step.pages + (in_prefix ? part.prefix_page : part.own_page) + from / step.page_size;
    int32_t offset = from % step.page_size;
    for (int32_t j = 0; j < count; j++) {
        at[j] = (int64_t(*page) * step.page_size + offset) * slot_size + kv_head * layer.dim;
        if (++offset == step.page_size) offset = 0, page++;
        if (--before_own == 0) offset = 0, page = step.pages + part.own_page;
    }
    for (int32_t j = count; j < room; j++) at[j] = at[count - 1];
}

// What one row leaves of one part: [maximum, sum, value of D].
INLINE float* result_of(float* results, const Layer& layer, int64_t row, int32_t head) {
    return results + (row * layer.heads + head) * (layer.dim + 2);
}

typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias));

// The sums of four vectors.
INLINE Vec4 sums_of(Vec a, Vec b, Vec c, Vec d) {
#if LANES == 16
    const IntVec low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    const IntVec first = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
#elif LANES == 8
    const IntVec low = {0, 8, 1, 9, 4, 12, 5, 13}, first = {0, 1, 8, 9, 4, 5, 12, 13};
#else
    const IntVec low = {0, 4, 1, 5}, first = {0, 1, 4, 5};
#endif
    const Vec ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 2);
    const Vec cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, low + 2);
    const Vec all = __builtin_shuffle(ab, cd, first) + __builtin_shuffle(ab, cd, first + 2);
    Vec4 quarters[LANES / 4];
    std::memcpy(quarters, &all, sizeof quarters);
    Vec4 sum = quarters[0];
    for (int i = 1; i < LANES / 4; i++) sum += quarters[i];
    return sum;
}

// value = value * shrink + weights . values[at] of each head, VECTORS vectors of it.
template <int HEADS, int VECTORS>
INLINE void add_values(const float* values, const int64_t* at, int32_t count,
                       const float (*weights)[FEW_ROWS_KEYS], const float* shrink, int32_t size,
                       float* value) {
    Vec sum[HEADS][VECTORS];
    for (int g = 0; g < HEADS; g++)
        for (int i = 0; i < VECTORS; i++)
            sum[g][i] = *(const Vec*)(value + g * size + i * LANES) * shrink[g];
    for (int32_t j = 0; j < count; j++)
        for (int i = 0; i < VECTORS; i++) {
            const Vec part = *(const Vec*)(values + at[j] + i * LANES);
            for (int g = 0; g < HEADS; g++) sum[g][i] += weights[g][j] * part;
        }
    for (int g = 0; g < HEADS; g++)
        for (int i = 0; i < VECTORS; i++) *(Vec*)(value + g * size + i * LANES) = sum[g][i];
}

// Up to four heads of one query against `count` keys at `at`, of which no more than FEW_ROWS_KEYS: a
// key or value is loaded once for all of them. A vector holds a row's dimensions.
template <int HEADS, int DIM>
INLINE void few_heads(const Layer& layer, const float* query, const int64_t* at, int32_t count,
                      float* result) {
    constexpr int TILE = 4;  // keys, or vectors of values
    const int32_t dim = DIM ? DIM : layer.dim, size = dim + 2;
    alignas(64) float scores[HEADS][FEW_ROWS_KEYS];
    for (int32_t j = 0; j < count; j += TILE) {
        const float* key[TILE];
        for (int i = 0; i < TILE; i++) key[i] = layer.keys + at[j + i];
        Vec sum[HEADS][TILE] = {};
        int32_t d = 0;
        for (; d + LANES <= dim; d += LANES)
            for (int i = 0; i < TILE; i++) {
                const Vec part = *(const Vec*)(key[i] + d);
                for (int g = 0; g < HEADS; g++)
                    sum[g][i] += *(const Vec*)(query + g * layer.query_head + d) * part;
            }
        for (int g = 0; g < HEADS; g++) {
            Vec4 four = sums_of(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
            for (int32_t rest = d; rest < dim; rest++)
                for (int i = 0; i < TILE; i++)
                    four[i] += query[g * layer.query_head + rest] * key[i][rest];
            *(Vec4*)(scores[g] + j) = four * layer.scaling;
        }
    }
    float shrink[HEADS];
    for (int g = 0; g < HEADS; g++) {
        float* mine = result + g * size;
        if (layer.softcap > 0)
            for (int32_t j = 0; j < count; j++)
                scores[g][j] = layer.softcap * std::tanh(scores[g][j] / layer.softcap);
        const int32_t whole = (count + LANES - 1) / LANES * LANES;
        std::fill(scores[g] + count, scores[g] + whole, NEVER);
        Vec most = splat(mine[0]);
        for (int32_t j = 0; j < whole; j += LANES) {
            const Vec x = *(Vec*)(scores[g] + j);
            most = x > most ? x : most;
        }
        const float highest = most_of(most);
        Vec sum{};
        for (int32_t j = 0; j < whole; j += LANES) {
            const Vec score = *(Vec*)(scores[g] + j);
            const Vec weight = exp_negative(score - highest);
            sum += *(Vec*)(scores[g] + j) = score == splat(NEVER) ? splat(0.f) : weight;
        }
        shrink[g] = std::exp(mine[0] - highest);
        mine[0] = highest;
        mine[1] = mine[1] * shrink[g] + sum_of(sum);
    }
    float* value = result + 2;
    int32_t d = 0;
    for (; d + TILE * LANES <= dim; d += TILE * LANES)
        add_values<HEADS, TILE>(layer.values + d, at, count, scores, shrink, size, value + d);
    for (; d + LANES <= dim; d += LANES)
        add_values<HEADS, 1>(layer.values + d, at, count, scores, shrink, size, value + d);
    for (; d < dim; d++)
        for (int g = 0; g < HEADS; g++) {
            float sum = value[g * size + d] * shrink[g];
            for (int32_t j = 0; j < count; j++) sum += scores[g][j] * layer.values[at[j] + d];
            value[g * size + d] = sum;
        }
}

// A few rows, one after another.
template <int DIM>
INLINE void few_rows(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                     float* results) {
    const int32_t dim = DIM ? DIM : layer.dim, size = dim + 2;
    const int32_t group = layer.heads / layer.kv_heads, head = kv_head * group;
    for (int32_t row = part.first_row; row < part.end_row; row++) {
        const int64_t token = step.rows[row];
        const Range seen = seen_by(step.query_index[token], part, layer.window);
        const float* query = layer.query + token * layer.query_token + head * layer.query_head;
        float* result = result_of(results, layer, row, head);
        for (int32_t g = 0; g < group; g++) {
            result[g * size] = NEVER;
            std::fill(result + g * size + 1, result + (g + 1) * size, 0.f);
        }
        for (int32_t block = seen.first; block < seen.end; block += FEW_ROWS_KEYS) {
            const int32_t count = std::min(FEW_ROWS_KEYS, seen.end - block);
            int64_t at[FEW_ROWS_KEYS];
            locate(step, layer, part, kv_head, block, count, (count + 3) / 4 * 4, at);
            for (int32_t g = 0; g < group;) {
                const float* from = query + g * layer.query_head;
                float* to = result + g * size;
                const int32_t heads = std::min(4, group - g);
                if (heads == 4) few_heads<4, DIM>(layer, from, at, count, to);
                else if (heads == 3) few_heads<3, DIM>(layer, from, at, count, to);
                else if (heads == 2) few_heads<2, DIM>(layer, from, at, count, to);
                else few_heads<1, DIM>(layer, from, at, count, to);
                g += heads;
            }
        }
    }
}

// Many rows, up to VECTORS times LANES: a vector holds one number of as many rows, and a key's
// dimensions are broadcast, once for all of them.
template <int DIM, int VECTORS>
INLINE void many_rows(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                      int32_t first, int32_t end, float* results, float* scratch) {
    const int32_t dim = DIM ? DIM : layer.dim, group = layer.heads / layer.kv_heads;
    constexpr int TILE = LANES == 16 ? 8 : 4;  // such that its sums stay in registers
    constexpr int ROWS = VECTORS * LANES;
    typedef Vec Rows[VECTORS];
    Rows* query = (Rows*)scratch;  // [D]
    Rows* value = query + dim;     // [D]
    alignas(64) Rows scores[KEYS];
    alignas(64) int32_t see_first[ROWS] = {}, see_end[ROWS] = {};
    int32_t first_key = part.end_key, end_key = part.first_key;  // that any row sees
    int32_t all_from = part.first_key, all_until = part.end_key;  // that all of them see
    const int32_t count = end - first;
    std::fill((float*)query, (float*)(value + dim), 0.f);
    for (int32_t lane = 0; lane < count; lane++) {
        const int64_t token = step.rows[part.first_row + (first + lane) / group];
        const int32_t head = kv_head * group + (first + lane) % group;
        const float* from = layer.query + token * layer.query_token + head * layer.query_head;
        for (int32_t d = 0; d < dim; d++) ((float*)(query + d))[lane] = from[d];
        const Range seen = seen_by(step.query_index[token], part, layer.window);
        see_first[lane] = seen.first;
        see_end[lane] = seen.end;
        first_key = std::min(first_key, seen.first);
        end_key = std::max(end_key, seen.end);
        all_from = std::max(all_from, seen.first);
        all_until = std::min(all_until, seen.end);
    }
    IntVec lows[VECTORS], ends[VECTORS];
    std::memcpy(lows, see_first, sizeof lows);
    std::memcpy(ends, see_end, sizeof ends);
    Rows highest, sum = {};
    UNROLL for (int v = 0; v < VECTORS; v++) highest[v] = splat(NEVER);
    for (int32_t block = first_key; block < end_key; block += KEYS) {
        const int32_t keys = std::min(KEYS, end_key - block);
        int64_t at[KEYS];
        locate(step, layer, part, kv_head, block, keys, KEYS, at);
        for (int32_t j = 0; j < keys; j += TILE) {
            Rows tile[TILE] = {};
            const float* from[TILE];
            UNROLL for (int i = 0; i < TILE; i++) from[i] = layer.keys + at[j + i];
            for (int32_t d = 0; d < dim; d++)
                UNROLL for (int i = 0; i < TILE; i++)
                    UNROLL for (int v = 0; v < VECTORS; v++) tile[i][v] += query[d][v] * from[i][d];
            UNROLL for (int i = 0; i < TILE; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) scores[j + i][v] = tile[i][v] * layer.scaling;
        }
        if (layer.softcap > 0)
            for (int32_t i = 0; i < keys * ROWS; i++) {
                float* score = (float*)scores + i;
                *score = layer.softcap * std::tanh(*score / layer.softcap);
            }
        const bool all_seen = block >= all_from && block + keys <= all_until;
        Rows shrink;
        for (int v = 0; v < VECTORS; v++) {
            Vec now = highest[v];
            for (int32_t j = 0; j < keys; j++) {
                const IntVec key = (block + j) - IntVec{};
                if (!all_seen)
                    scores[j][v] = (key >= lows[v]) & (key < ends[v]) ? scores[j][v] : splat(NEVER);
                now = scores[j][v] > now ? scores[j][v] : now;
            }
            // Rows that have seen nothing yet have no maximum: -inf - -inf is not a number.
            const Vec base = now == splat(NEVER) ? splat(0.f) : now;
            shrink[v] = highest[v] == splat(NEVER) ? splat(0.f) : exp_negative(highest[v] - base);
            sum[v] *= shrink[v];
            for (int32_t j = 0; j < keys; j++) {
                const Vec weight = exp_negative(scores[j][v] - base);
                scores[j][v] = scores[j][v] == splat(NEVER) ? splat(0.f) : weight;
                sum[v] += scores[j][v];
            }
            highest[v] = now;
        }
        int32_t d = 0;
        for (; d + TILE <= dim; d += TILE) {
            Rows tile[TILE];
            UNROLL for (int i = 0; i < TILE; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) tile[i][v] = value[d + i][v] * shrink[v];
            for (int32_t j = 0; j < keys; j++) {
                const float* from = layer.values + at[j] + d;
                UNROLL for (int i = 0; i < TILE; i++)
                    UNROLL for (int v = 0; v < VECTORS; v++) tile[i][v] += scores[j][v] * from[i];
            }
            UNROLL for (int i = 0; i < TILE; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) value[d + i][v] = tile[i][v];
        }
        for (; d < dim; d++)
            UNROLL for (int v = 0; v < VECTORS; v++) {
                Vec one = value[d][v] * shrink[v];
                for (int32_t j = 0; j < keys; j++) one += scores[j][v] * layer.values[at[j] + d];
                value[d][v] = one;
            }
    }
    for (int32_t lane = 0; lane < count; lane++) {
        const int64_t row = part.first_row + (first + lane) / group;
        float* result = result_of(results, layer, row, kv_head * group + (first + lane) % group);
        result[0] = ((float*)highest)[lane];
        result[1] = ((float*)sum)[lane];
        for (int32_t d = 0; d < dim; d++) result[2 + d] = ((float*)(value + d))[lane];
    }
}

template <int VECTORS>
INLINE void many_rows(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                      int32_t first, int32_t end, float* results, float* scratch) {
    if (layer.dim == 64)
        many_rows<64, VECTORS>(step, layer, part, kv_head, first, end, results, scratch);
    else if (layer.dim == 128)
        many_rows<128, VECTORS>(step, layer, part, kv_head, first, end, results, scratch);
    else
        many_rows<0, VECTORS>(step, layer, part, kv_head, first, end, results, scratch);
}

TARGET
void attend_part(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                 float* results, float* scratch) {
    const int32_t group = layer.heads / layer.kv_heads;
    const int32_t rows = (part.end_row - part.first_row) * group;
    if (rows <= FEW_ROWS) {
        if (layer.dim == 64) few_rows<64>(step, layer, part, kv_head, results);
        else if (layer.dim == 128) few_rows<128>(step, layer, part, kv_head, results);
        else few_rows<0>(step, layer, part, kv_head, results);
        return;
    }
    for (int32_t first = 0; first < rows;) {
        const bool one = rows - first <= LANES;
        const int32_t end = std::min(rows, first + (one ? 1 : MOST_VECTORS) * LANES);
        if (one)
            many_rows<1>(step, layer, part, kv_head, first, end, results, scratch);
        else
            many_rows<MOST_VECTORS>(step, layer, part, kv_head, first, end, results, scratch);
        first = end;
    }
}

TARGET
void merge(const int32_t* parts, int32_t num_parts, const Layer& layer, int32_t head,
           const float* results, float* output) {
    const int64_t size = layer.dim + 2;
    float highest = NEVER, sum = 0;
    for (int32_t i = 0; i < num_parts; i++)
        highest = std::max(highest, results[(parts[i] * int64_t(layer.heads) + head) * size]);
    std::fill(output, output + layer.dim, 0.f);
    for (int32_t i = 0; i < num_parts; i++) {
        const float* result = results + (parts[i] * int64_t(layer.heads) + head) * size;
        if (result[1] == 0) continue;  // its window has left this part
        const float weight = std::exp(result[0] - highest);
        sum += weight * result[1];
        for (int32_t d = 0; d < layer.dim; d++) output[d] += weight * result[2 + d];
    }
    for (int32_t d = 0; d < layer.dim; d++) output[d] /= sum;
}

INLINE void attend(const Step& step, const Layer& layer, int32_t num_parts,
                   const int32_t* token_first, const int32_t* token_rows, int64_t tokens,
                   float* results, float* output) {
    static thread_local std::vector<float> scratch;
    scratch.resize(size_t(2 * layer.dim + 1) * MOST_VECTORS * LANES);
    float* aligned = (float*)((uintptr_t(scratch.data()) + 63) & ~uintptr_t(63));
    if (num_parts >= 4 * omp_get_num_threads()) {
        // A part's heads lie beside each other: one thread reads them.
#pragma omp for schedule(dynamic, 1)
        for (int32_t i = 0; i < num_parts; i++)
            for (int32_t h = 0; h < layer.kv_heads; h++)
                attend_part(step, layer, step.parts[i], h, results, aligned);
    } else {
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int32_t i = 0; i < num_parts; i++)
            for (int32_t h = 0; h < layer.kv_heads; h++)
                attend_part(step, layer, step.parts[i], h, results, aligned);
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int32_t h = 0; h < layer.heads; h++)
            merge(token_rows + token_first[t], token_first[t + 1] - token_first[t], layer, h,
                  results, output + (t * layer.heads + h) * layer.dim);
}

// New keys and values, [T, H_kv, D] with strides, at their slots.
INLINE void store(const float* key, int64_t key_token, int64_t key_head, const float* value,
                  int64_t value_token, int64_t value_head, const int64_t* slots, int64_t tokens,
                  int32_t kv_heads, int32_t dim, float* keys, float* values) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t to = (slots[t] * kv_heads + h) * dim;
            std::memcpy(keys + to, key + t * key_token + h * key_head, dim * sizeof(float));
            std::memcpy(values + to, value + t * value_token + h * value_head, dim * sizeof(float));
        }
}

}  // namespace
