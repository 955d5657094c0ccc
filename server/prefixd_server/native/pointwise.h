// What stands between the matrix products, one row at a time.

namespace {

// Where the first largest of a row of logits is, the largest, and log(sum(e^x)). NaN and +inf give
// a sum of NaN.
TARGET
void peak(const float* logits, int64_t size, int64_t* at, float* largest, float* log_sum) {
    constexpr int64_t CHUNK = 1024;  // stays in L1 between the two passes
    float highest = NEVER, sum = 0;
    int64_t where = 0;
    for (int64_t start = 0; start < size; start += CHUNK) {
        const float* chunk = logits + start;
        const int64_t count = std::min(CHUNK, size - start), whole = count / LANES * LANES;
        Vec most = splat(NEVER);
        for (int64_t i = 0; i < whole; i += LANES) {
            const Vec x = *(const Vec*)(chunk + i);
            most = x > most ? x : most;
        }
        float top = NEVER;
        for (int i = 0; i < LANES; i++) top = std::max(top, ((float*)&most)[i]);
        for (int64_t i = whole; i < count; i++) top = std::max(top, chunk[i]);
        if (top > highest) {
            for (int64_t i = 0; i < count; i++)
                if (chunk[i] == top) {
                    where = start + i;
                    break;
                }
            sum *= std::exp(highest - top);
            highest = top;
        }
        Vec sums{};
        for (int64_t i = 0; i < whole; i += LANES)
            sums += exp_negative(*(const Vec*)(chunk + i) - highest);
        sum += sum_of(sums);
        for (int64_t i = whole; i < count; i++) sum += std::exp(chunk[i] - highest);
    }
    *at = where;
    *largest = highest;
    *log_sum = highest + std::log(sum);
}

// Turn one head by rotary angles, halves as Llama has them; cosine and sine [D].
TARGET
void rotate(const float* from, const float* cosine, const float* sine, int64_t dim, float* to) {
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; d++) {
        const float first = from[d], second = from[d + half];
        to[d] = first * cosine[d] - second * sine[d];
        to[d + half] = second * cosine[d + half] + first * sine[d + half];
    }
}

INLINE Vec gated(Vec x, float slope, float cubic) {
    const Vec z = slope * (x + cubic * x * x * x);
    const Vec small = exp_negative(z < 0 ? z : -z);  // of -|z|
    const Vec share = 1.f / (1.f + small);
    return x * (z < 0 ? small * share : share);
}

TARGET
void activate(const float* from, float slope, float cubic, int64_t size, float* to) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        *(Vec*)(to + i) = gated(*(const Vec*)(from + i), slope, cubic);
    if (i == size) return;
    Vec rest{};
    std::memcpy(&rest, from + i, (size - i) * sizeof(float));
    rest = gated(rest, slope, cubic);
    std::memcpy(to + i, &rest, (size - i) * sizeof(float));
}

TARGET
void normalise(const float* from, const float* weight, float plus, float epsilon, int64_t size,
               float* to) {
    Vec squares{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += *(const Vec*)(from + i) * *(const Vec*)(from + i);
    float sum = sum_of(squares);
    for (; i < size; i++) sum += from[i] * from[i];
    const float scale = 1.f / std::sqrt(sum / size + epsilon);
    for (i = 0; i < size; i++) to[i] = from[i] * scale * (weight[i] + plus);
}

TARGET
void centre(const float* from, const float* weight, const float* bias, float epsilon, int64_t size,
            float* to) {
    Vec sums{}, squares{};
    const int64_t whole = size / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) sums += *(const Vec*)(from + i);
    float sum = sum_of(sums);
    for (int64_t i = whole; i < size; i++) sum += from[i];
    const float mean = sum / size;
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vec x = *(const Vec*)(from + i) - mean;
        squares += x * x;
    }
    sum = sum_of(squares);
    for (int64_t i = whole; i < size; i++) sum += (from[i] - mean) * (from[i] - mean);
    const float scale = 1.f / std::sqrt(sum / size + epsilon);
    for (int64_t i = 0; i < size; i++)
        to[i] = (from[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.f);
}

}  // namespace
