#pragma once
#include <cstdint>
namespace {
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
void gemm_in_team(const float* x, int64_t xs, const float* packed, const float* bias, int64_t m,
                  int64_t n, int64_t k, float* y, int64_t ys, int add, int thread, int threads) {
    for (int64_t j = n * thread / threads; j < n * (thread + 1) / threads; j++)
        for (int64_t i = 0; i < m; i++) {
            const float* a = x + i * xs; const float* b = packed + j * k;
            float s[16] = {};
            int64_t l = 0;
            for (; l + 16 <= k; l += 16) for (int q = 0; q < 16; q++) s[q] += a[l + q] * b[l + q];
            float t = bias ? bias[j] : 0;
            for (; l < k; l++) t += a[l] * b[l];
            for (int q = 0; q < 16; q++) t += s[q];
            y[i * ys + j] = add ? y[i * ys + j] + t : t;
        }
}
}
