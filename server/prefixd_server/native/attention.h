// Attention over paged keys and values, in float32.
//
// Attention is computed in parts: a part is a range of one page list (a prefix, or a sequence's own
// tokens) against the queries that see it, so a prefix is read once for all its requests. Each part
// leaves, for each of its queries and heads, a maximum, a sum and a weighted value; `merge` joins
// the parts of a query by their log-sum-exp (as FlashInfer's cascade and flash-decoding do).
//
// `attend` is called by all members of a team, and is ATTEND_PHASES of its work.

namespace {

TARGET
void attend_part(const Step& step, const Layer& layer, const Part& part, int32_t kv_head,
                 float* results, float* scratch) {
    const int32_t rows = rows_of(part, layer);
    if (rows <= FEW_ROWS) {
        if (layer.dim == 64) few_rows<64>(step, layer, part, kv_head, results);
        else if (layer.dim == 128) few_rows<128>(step, layer, part, kv_head, results);
        else few_rows<0>(step, layer, part, kv_head, results);
        return;
    }
    for (int32_t first = 0; first < rows; first += MOST_ROWS) {
        const int32_t end = std::min(rows, first + MOST_ROWS);
        if (layer.dim == 64)
            many_rows<64>(step, layer, part, kv_head, first, end, results, scratch);
        else if (layer.dim == 128)
            many_rows<128>(step, layer, part, kv_head, first, end, results, scratch);
        else
            many_rows<0>(step, layer, part, kv_head, first, end, results, scratch);
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

constexpr int ATTEND_PHASES = 2;

INLINE void attend(prefixd::Member& member, const Step& step, const Layer& layer,
                   int32_t num_parts, const int32_t* token_first, const int32_t* token_rows,
                   int64_t tokens, float* results, float* output) {
    static thread_local std::vector<float> scratch;
    scratch.resize(size_t(2 * layer.dim) * MOST_ROWS + 64 / sizeof(float));
    float* aligned = (float*)((uintptr_t(scratch.data()) + 63) & ~uintptr_t(63));
    // First what takes long, a head at a time; then whole parts, whose heads lie beside each other,
    // where they are enough for all threads.
    int32_t apart = num_parts;
    if (num_parts >= 4 * member.threads)
        for (apart = 0; apart < num_parts && rows_of(step.parts[apart], layer) > FEW_ROWS;) apart++;
    const int64_t heads_apart = int64_t(apart) * layer.kv_heads;
    member.items(heads_apart + num_parts - apart, [&](int64_t item) {
        if (item < heads_apart) {
            const Part& part = step.parts[item / layer.kv_heads];
            attend_part(step, layer, part, int32_t(item % layer.kv_heads), results, aligned);
            return;
        }
        const Part& part = step.parts[apart + item - heads_apart];
        for (int32_t h = 0; h < layer.kv_heads; h++)
            attend_part(step, layer, part, h, results, aligned);
    });
    member.shares([&](int64_t share, int64_t shares) {
        const int64_t all = tokens * layer.heads;
        for (int64_t i = all * share / shares; i < all * (share + 1) / shares; i++) {
            const int64_t t = i / layer.heads, h = i % layer.heads;
            merge(token_rows + token_first[t], token_first[t + 1] - token_first[t], layer,
                  int32_t(h), results, output + i * layer.dim);
        }
    });
}

// New keys and values, [T, H_kv, D] with strides, at their slots: those of tokens `first` to `end`.
INLINE void store(const float* key, int64_t key_token, int64_t key_head, const float* value,
                  int64_t value_token, int64_t value_head, const int64_t* slots, int64_t first,
                  int64_t end, int32_t kv_heads, int32_t dim, float* keys, float* values) {
    for (int64_t t = first; t < end; t++)
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t to = (slots[t] * kv_heads + h) * dim;
            std::memcpy(keys + to, key + t * key_token + h * key_head, dim * sizeof(float));
            std::memcpy(values + to, value + t * value_token + h * value_head, dim * sizeof(float));
        }
}

}  // namespace
