// A part of attention for many rows, as a prompt's or those of a shared prefix: a vector holds a
// dimension of as many rows as it has lanes.

namespace {

constexpr int KEYS = 128;        // of a block, which stays in the cache while all tiles use it
constexpr int MOST_VECTORS = 2;  // of rows, in a tile
constexpr int MOST_TILES = 4;    // that take turns over a block
constexpr int MOST_ROWS = MOST_TILES * MOST_VECTORS * LANES;
constexpr int SUMS = LANES == 16 ? 8 : 4;  // of each vector, such that they stay in registers

// Up to MOST_VECTORS vectors of rows, and what they have found so far.
struct QueryTile {
    int32_t vectors, first, count;  // its rows
    float* query;                   // [D, vectors * LANES]
    float* value;                   // [D, vectors * LANES]
    Vec highest[MOST_VECTORS], sum[MOST_VECTORS];
    IntVec see_first[MOST_VECTORS], see_end[MOST_VECTORS];
    int32_t first_key, end_key;   // that any row sees
    int32_t all_from, all_until;  // that all of them see
};

// Keys that follow each other, for one head.
struct Block {
    int32_t first, keys;
    int64_t at[KEYS];
};

// Four vectors' rows become their columns.
INLINE void turn(Vec4* x) {
    typedef int32_t Int4 __attribute__((vector_size(16)));
    const Int4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    const Vec4 ab = __builtin_shuffle(x[0], x[1], low), ab_end = __builtin_shuffle(x[0], x[1], high);
    const Vec4 cd = __builtin_shuffle(x[2], x[3], low), cd_end = __builtin_shuffle(x[2], x[3], high);
    x[0] = __builtin_shuffle(ab, cd, first);
    x[1] = __builtin_shuffle(ab, cd, second);
    x[2] = __builtin_shuffle(ab_end, cd_end, first);
    x[3] = __builtin_shuffle(ab_end, cd_end, second);
}

// rows [4][size] into columns [size][4], which are `lanes` apart.
INLINE void into_columns(const float* const* rows, int32_t size, float* columns, int32_t lanes) {
    int32_t d = 0;
    for (; d + 4 <= size; d += 4) {
        Vec4 x[4];
        UNROLL for (int i = 0; i < 4; i++) x[i] = *(const Vec4*)(rows[i] + d);
        turn(x);
        UNROLL for (int i = 0; i < 4; i++) *(Vec4*)(columns + (d + i) * lanes) = x[i];
    }
    for (; d < size; d++)
        for (int i = 0; i < 4; i++) columns[d * lanes + i] = rows[i][d];
}

INLINE void into_rows(const float* columns, int32_t lanes, int32_t size, float* const* rows) {
    int32_t d = 0;
    for (; d + 4 <= size; d += 4) {
        Vec4 x[4];
        UNROLL for (int i = 0; i < 4; i++) x[i] = *(const Vec4*)(columns + (d + i) * lanes);
        turn(x);
        UNROLL for (int i = 0; i < 4; i++) *(Vec4*)(rows[i] + d) = x[i];
    }
    for (; d < size; d++)
        for (int i = 0; i < 4; i++) rows[i][d] = columns[d * lanes + i];
}

INLINE QueryTile make_tile(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                           int32_t first, int32_t end, float* scratch) {
    const int32_t group = layer.heads / layer.kv_heads;
    QueryTile tile{};
    tile.vectors = end - first <= LANES ? 1 : MOST_VECTORS;
    tile.first = first;
    tile.count = std::min(end - first, tile.vectors * LANES);
    const int32_t lanes = tile.vectors * LANES;
    tile.query = scratch;
    tile.value = scratch + layer.dim * lanes;
    std::fill(tile.value, tile.value + layer.dim * lanes, 0.f);
    for (Vec& highest : tile.highest) highest = splat(NEVER);
    tile.first_key = tile.all_until = part.end_key;
    tile.end_key = tile.all_from = part.first_key;
    for (int32_t lane = 0; lane < lanes; lane += 4) {
        const float* queries[4];
        for (int32_t i = 0; i < 4; i++) {
            // Lanes that are too many repeat the last row, and find the same.
            const int32_t row = first + std::min(lane + i, tile.count - 1);
            const int64_t token = step.rows[part.first_row + row / group];
            const int32_t head = kv_head * group + row % group;
            queries[i] = layer.query + token * layer.query_token + head * layer.query_head;
            const Range seen = seen_by(step.query_index[token], part, layer.window);
            ((int32_t*)tile.see_first)[lane + i] = seen.first;
            ((int32_t*)tile.see_end)[lane + i] = seen.end;
            tile.first_key = std::min(tile.first_key, seen.first);
            tile.end_key = std::max(tile.end_key, seen.end);
            tile.all_from = std::max(tile.all_from, seen.first);
            tile.all_until = std::min(tile.all_until, seen.end);
        }
        into_columns(queries, layer.dim, tile.query + lane, lanes);
    }
    return tile;
}

// What a tile fetches of the next block while it works on this one: all tiles together the whole
// block, evenly, so that neither memory nor arithmetic waits.
struct Ahead {
    const Block& next;
    int32_t turn, turns;  // which tile of how many
};

// The tile's share of the keys or values `done` to `until`, of KEYS.
INLINE void fetch(const Ahead& ahead, const float* from, int32_t dim, int32_t done, int32_t until) {
    const int32_t first = (ahead.turn * KEYS + done) / ahead.turns;
    const int32_t end = std::min(ahead.next.keys, (ahead.turn * KEYS + until) / ahead.turns);
    for (int32_t j = first; j < end; j++) fetch(from + ahead.next.at[j], dim);
}

// scores[j] = key j . query for all rows: a key's number is broadcast once for all vectors.
template <int DIM, int VECTORS>
INLINE void score(const Layer& layer, const QueryTile& tile, const Block& block, const Ahead& ahead,
                  Vec (*scores)[VECTORS]) {
    const int32_t dim = DIM ? DIM : layer.dim;
    const auto query = (const Vec(*)[VECTORS])tile.query;
    for (int32_t j = 0; j < block.keys; j += SUMS) {
        Vec sums[SUMS][VECTORS] = {};
        const float* key[SUMS];
        UNROLL for (int i = 0; i < SUMS; i++) key[i] = layer.keys + block.at[j + i];
        fetch(ahead, layer.keys, dim, j, j + SUMS);
        for (int32_t d = 0; d < dim; d++)
            UNROLL for (int i = 0; i < SUMS; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] += query[d][v] * key[i][d];
        UNROLL for (int i = 0; i < SUMS; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) scores[j + i][v] = sums[i][v] * layer.scaling;
    }
}

// Scores become weights; what the rows have found so far is to `shrink`.
template <int VECTORS, bool ALL_SEEN>
INLINE void weigh(const Layer& layer, QueryTile& tile, const Block& block, Vec (*scores)[VECTORS],
                  Vec* shrink) {
    if (layer.softcap > 0)
        for (int32_t i = 0; i < block.keys * VECTORS * LANES; i++) {
            float* score = (float*)scores + i;
            *score = layer.softcap * std::tanh(*score / layer.softcap);
        }
    for (int v = 0; v < VECTORS; v++) {
        Vec highest = tile.highest[v];
        for (int32_t j = 0; j < block.keys; j++) {
            if (!ALL_SEEN) {
                const IntVec key = (block.first + j) - IntVec{};
                const IntVec sees = (key >= tile.see_first[v]) & (key < tile.see_end[v]);
                scores[j][v] = sees ? scores[j][v] : splat(NEVER);
            }
            highest = scores[j][v] > highest ? scores[j][v] : highest;
        }
        // Rows that have seen nothing yet have no maximum: -inf - -inf is not a number.
        const Vec base = highest == splat(NEVER) ? splat(0.f) : highest;
        const Vec less = exp_negative(tile.highest[v] - base);
        shrink[v] = tile.highest[v] == splat(NEVER) ? splat(0.f) : less;
        Vec sum = tile.sum[v] * shrink[v];
        for (int32_t j = 0; j < block.keys; j++) {
            const Vec weight = exp_negative(scores[j][v] - base);
            sum += scores[j][v] =
                ALL_SEEN ? weight : (scores[j][v] == splat(NEVER) ? splat(0.f) : weight);
        }
        tile.sum[v] = sum;
        tile.highest[v] = highest;
    }
}

// value = value * shrink + weights . values for all rows.
template <int DIM, int VECTORS>
INLINE void add_values(const Layer& layer, const QueryTile& tile, const Block& block,
                       const Ahead& ahead, const Vec (*weights)[VECTORS], const Vec* shrink) {
    const int32_t dim = DIM ? DIM : layer.dim;
    const auto value = (Vec(*)[VECTORS])tile.value;
    int32_t d = 0;
    for (; d + SUMS <= dim; d += SUMS) {
        Vec sums[SUMS][VECTORS];
        fetch(ahead, layer.values, dim, d * KEYS / dim, (d + SUMS) * KEYS / dim);
        UNROLL for (int i = 0; i < SUMS; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] = value[d + i][v] * shrink[v];
        for (int32_t j = 0; j < block.keys; j++) {
            const float* from = layer.values + block.at[j] + d;
            UNROLL for (int i = 0; i < SUMS; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) sums[i][v] += weights[j][v] * from[i];
        }
        UNROLL for (int i = 0; i < SUMS; i++)
            UNROLL for (int v = 0; v < VECTORS; v++) value[d + i][v] = sums[i][v];
    }
    for (; d < dim; d++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            Vec one = value[d][v] * shrink[v];
            for (int32_t j = 0; j < block.keys; j++)
                one += weights[j][v] * layer.values[block.at[j] + d];
            value[d][v] = one;
        }
}

template <int DIM, int VECTORS>
INLINE void attend_block(const Layer& layer, QueryTile& tile, const Block& block,
                         const Ahead& ahead) {
    alignas(64) Vec scores[KEYS][VECTORS];
    Vec shrink[VECTORS];
    score<DIM, VECTORS>(layer, tile, block, ahead, scores);
    if (block.first >= tile.all_from && block.first + block.keys <= tile.all_until)
        weigh<VECTORS, true>(layer, tile, block, scores, shrink);
    else
        weigh<VECTORS, false>(layer, tile, block, scores, shrink);
    add_values<DIM, VECTORS>(layer, tile, block, ahead, scores, shrink);
}

// What a tile has found goes where `merge` reads it.
INLINE void leave(const QueryTile& tile, const Layer& layer, const Part& part, int32_t kv_head,
                  float* results) {
    const int32_t group = layer.heads / layer.kv_heads, lanes = tile.vectors * LANES;
    for (int32_t lane = 0; lane < tile.count; lane += 4) {
        float* values[4];
        for (int32_t i = 0; i < 4; i++) {
            const int32_t at = std::min(lane + i, tile.count - 1), row = tile.first + at;
            const int32_t head = kv_head * group + row % group;
            float* result = result_of(results, layer, part.first_row + row / group, head);
            result[0] = ((float*)tile.highest)[at];
            result[1] = ((float*)tile.sum)[at];
            values[i] = result + 2;
        }
        into_rows(tile.value + lane, lanes, layer.dim, values);
    }
}

// `scratch`: 2 * D * MOST_ROWS numbers, for the rows `first` to `end`, of which no more than those.
template <int DIM>
INLINE void many_rows(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                      int32_t first, int32_t end, float* results, float* scratch) {
    const int32_t group = layer.heads / layer.kv_heads;
    QueryTile tiles[MOST_TILES];
    int32_t num_tiles = 0, first_key = part.end_key, end_key = part.first_key;
    while (first < end) {
        const QueryTile& tile = tiles[num_tiles++] =
            make_tile(step, layer, part, kv_head, first, end, scratch);
        first_key = std::min(first_key, tile.first_key);
        end_key = std::max(end_key, tile.end_key);
        scratch += 2 * layer.dim * tile.vectors * LANES;
        first += tile.count;
    }
    const auto find = [&](Block& block, int32_t from) {
        block.first = from;
        block.keys = std::max(0, std::min(KEYS, end_key - from));
        if (block.keys) locate(step, layer, part, kv_head, from, block.keys, KEYS, block.at);
    };
    Block blocks[2], *block = blocks, *next = blocks + 1;
    for (find(*block, first_key); block->keys; std::swap(block, next)) {
        find(*next, block->first + KEYS);
        for (int32_t i = 0; i < num_tiles; i++) {
            const Ahead ahead{*next, i, num_tiles};
            if (tiles[i].vectors == 1)
                attend_block<DIM, 1>(layer, tiles[i], *block, ahead);
            else
                attend_block<DIM, MOST_VECTORS>(layer, tiles[i], *block, ahead);
        }
    }
    for (int32_t i = 0; i < num_tiles; i++) leave(tiles[i], layer, part, kv_head, results);
}

}  // namespace
