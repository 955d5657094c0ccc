// What attention is made of: ranges of page lists, each against the queries that see it.

namespace {

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

// Of one KV head.
INLINE int32_t rows_of(const Part& part, const Layer& layer) {
    return (part.end_row - part.first_row) * (layer.heads / layer.kv_heads);
}

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

// Ask for a key or value before it is needed: the memory's own guesses end with its few lines.
INLINE void fetch(const float* from, int32_t dim) {
    constexpr int LINE = 64 / sizeof(float);
    for (int32_t d = 0; d < dim; d += LINE) __builtin_prefetch(from + d);
}

// What one row leaves of one part: [maximum, sum, value of D].
INLINE float* result_of(float* results, const Layer& layer, int64_t row, int32_t head) {
    return results + (row * layer.heads + head) * (layer.dim + 2);
}

}  // namespace
