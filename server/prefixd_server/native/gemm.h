// Products with frozen weights, y = x W^T, in float32. Weights may be kept in int8 with a
// scale for each group of them. The layout of packed weights depends on the
// CPU: they are packed and used in one process.
#pragma once

#include <cstdint>

namespace prefixd {

constexpr int64_t LINE = 64;  // bytes

// Cache lines of two arrays that are read soon, the same of each. Products fetch them on the side.
struct Wanted {
    const int32_t *lines = nullptr, *end = nullptr;  // numbers of lines, from where an array begins
    const char* array = nullptr;  // of which `at` is the next to fetch
    const char* other = nullptr;  // whose turn is next, or null
    const int32_t* at = nullptr;
};

struct Product {
    const float* x;  // [m, k], rows `x_stride` apart
    int64_t x_stride;
    const void* packed;
    bool int8;  // the weights, else float32
    const float* bias;  // [n], or null
    int64_t m, n, k;
    float* y;  // [m, n], rows `y_stride` apart
    int64_t y_stride;
    bool add;  // to what y holds
    const Product* next = nullptr;  // what the team multiplies after this, or null
    Wanted* wanted = nullptr;  // this thread's, or null
};

// One thread's share; each thread of a team calls it. None waits for another: x must be whole before
// the first begins, and y is whole when the last has returned.
void gemm_in_team(const Product& product, int thread, int threads);

}  // namespace prefixd
