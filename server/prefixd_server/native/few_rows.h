// A part of attention for a few rows, as a decode's: a vector holds a row's dimensions.

namespace {

constexpr int FEW_ROWS = 8;  // with more, a vector holds rows
constexpr int FEW_ROWS_KEYS = 256;  // of a block: only scores are kept, not vectors of them
constexpr int FETCH_AHEAD = 16;     // keys

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
        for (int i = 0; i < TILE; i++) {
            key[i] = layer.keys + at[j + i];
            fetch(layer.keys + at[std::min(j + i + FETCH_AHEAD, count - 1)], dim);
            fetch(layer.values + at[j + i], dim);
        }
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

}  // namespace
