// What Python calls, by ctypes. Each function runs in a team of OpenMP threads of its own.

extern "C" {

// As `store`, on the caller's thread.
void NAME(store)(const float* key, int64_t key_token, int64_t key_head, const float* value,
                   int64_t value_token, int64_t value_head, const int64_t* slots, int64_t tokens,
                   int32_t kv_heads, int32_t dim, float* keys, float* values) {
    store(key, key_token, key_head, value, value_token, value_head, slots, 0, tokens, kv_heads, dim,
          keys, values);
}

// results: workspace [rows, H, D + 2]; output: [T, H, D]; token_parts: for token t, the rows
// token_rows[token_first[t] : token_first[t + 1]].
void NAME(attend)(const float* query, int64_t query_token, int64_t query_head, const float* keys,
                    const float* values, int32_t heads, int32_t kv_heads, int32_t dim,
                    float scaling, float softcap, int32_t window, const int32_t* parts,
                    int32_t num_parts, const int32_t* pages, const int32_t* rows,
                    const int32_t* query_index, int32_t page_size, const int32_t* token_first,
                    const int32_t* token_rows, int64_t tokens, float* results, float* output) {
    const Step step{(const Part*)parts, pages, rows, query_index, page_size};
    const Layer layer{query, query_token, query_head, keys,    values, heads,
                      kv_heads, dim,      scaling,    softcap, window};
    std::vector<prefixd::Phase> phases(ATTEND_PHASES);
#pragma omp parallel num_threads(prefixd::team_size())
    {
        prefixd::Member member(phases);
        attend(member, step, layer, num_parts, token_first, token_rows, tokens, results, output);
    }
}

// x * sigmoid(slope * (x + cubic * x^3)) of [rows, size], whose rows are `stride` apart: SiLU with
// slope 1 and cubic 0, GELU by tanh with sqrt(8 / pi) and 0.044715. `to` is contiguous.
void NAME(activate)(const float* from, int64_t stride, float slope, float cubic, int64_t rows,
                      int64_t size, float* to) {
#pragma omp parallel for schedule(static) if (rows * size > 16384)
    for (int64_t r = 0; r < rows; r++)
        activate(from + r * stride, slope, cubic, size, to + r * size);
}

// Rotate [T, H, D] with strides by cosine and sine [T, D]; `to` is contiguous.
void NAME(rotate)(const float* from, int64_t from_token, int64_t from_head, const float* cosine,
                    const float* sine, int64_t tokens, int64_t heads, int64_t dim, float* to) {
#pragma omp parallel for schedule(static) if (tokens * heads * dim > 131072)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            rotate(from + t * from_token + h * from_head, cosine + t * dim, sine + t * dim, dim,
                   to + (t * heads + h) * dim);
}

// For each row of logits [rows, size]: where the largest is, the largest, and log(sum(e^x)).
void NAME(peaks)(const float* logits, int64_t rows, int64_t size, int64_t* at, float* largest,
                   float* log_sums) {
#pragma omp parallel for schedule(static) if (rows * size > 65536)
    for (int64_t r = 0; r < rows; r++) peak(logits + r * size, size, at + r, largest + r, log_sums + r);
}

// Root-mean-square normalisation of [rows, size]; `plus` is 1 where the weight is stored less one.
void NAME(rms_norm)(const float* from, const float* weight, float plus, float epsilon,
                      int64_t rows, int64_t size, float* to) {
#pragma omp parallel for schedule(static) if (rows * size > 65536)
    for (int64_t r = 0; r < rows; r++)
        normalise(from + r * size, weight, plus, epsilon, size, to + r * size);
}

// A whole forward pass, see program.h.
void NAME(run)(const Op* ops, int64_t num_ops, const Run* run) {
    std::vector<prefixd::Phase> phases(num_ops * MOST_PHASES);
#pragma omp parallel num_threads(prefixd::team_size())
    {
        prefixd::Member member(phases);
        execute_all(member, ops, num_ops, *run);
    }
}

}  // extern "C"
