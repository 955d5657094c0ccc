// A part of attention for many rows, as a prompt's or those of a shared prefix: a vector holds rows.

namespace {

constexpr int KEYS = 128;  // of a block
constexpr int MOST_VECTORS = 2;  // of rows

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

}  // namespace
