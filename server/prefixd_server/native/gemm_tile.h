// Some rows of x times a panel of packed weights, see gemm.cpp: for each instruction set, the best of
// which is chosen where it runs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "gemm.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__)
// In use up to here, or GCC may sum in its register and move that back in each turn of the loop.
#define KEEP(vector) asm volatile("" : : "v"(vector))
#else
#define KEEP(vector)
#endif
#define UNROLL _Pragma("GCC unroll 8")

namespace prefixd {
namespace {

constexpr int VECTORS = 3;  // of columns in a panel
constexpr int MOST_ROWS = 8;  // of a tile
constexpr int64_t WORD = 4;  // bytes
constexpr int NO_CACHE = 0, SECOND_CACHE = 2;  // for __builtin_prefetch
constexpr int64_t GROUP = 64;  // of a column's weights in int8, which share a scale

struct Tile {
    const float* x;
    int64_t x_stride;
    const void* panel;
    int64_t depth;
    const float* bias;  // of the columns, or null
    float* y;
    int64_t y_stride;
    int64_t columns;  // of the panel that are not padding
    bool add;
    const char* ahead;  // what to prefetch, and in the end what is next,
    int64_t lines, every;  // so many lines for every so many rows of words
    bool once;  // no other tile of this thread reads it: the caches are to keep what they hold
    const char* array;  // and of this
    const int32_t *wanted, *wanted_end;  // these lines, one for each row of words
};

template <int LANES>
struct Vector {
    typedef float Type __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
    typedef int32_t Words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
};

template <int LANES, int ROWS>
INLINE void store(const Tile& tile, typename Vector<LANES>::Type sums[ROWS][VECTORS]) {
    typedef typename Vector<LANES>::Type Vec;
    UNROLL for (int r = 0; r < ROWS; r++) {
        float* y = tile.y + r * tile.y_stride;
        UNROLL for (int v = 0; v < VECTORS; v++) {
            Vec sum = sums[r][v];
            if (tile.bias) sum += *(const Vec*)(tile.bias + v * LANES);
            if (tile.add) sum += *(const Vec*)(y + v * LANES);
            *(Vec*)(y + v * LANES) = sum;
        }
    }
}

template <int LANES, int ROWS>
INLINE void store_edge(const Tile& tile, typename Vector<LANES>::Type sums[ROWS][VECTORS]) {
    for (int r = 0; r < ROWS; r++) {
        float row[VECTORS * LANES];
        std::memcpy(row, sums[r], sizeof row);
        float* y = tile.y + r * tile.y_stride;
        for (int64_t c = 0; c < tile.columns; c++) {
            float sum = row[c];
            if (tile.bias) sum += tile.bias[c];
            if (tile.add) sum += y[c];
            y[c] = sum;
        }
    }
}

// Weight `part` of each of a vector of words that hold WEIGHTS each.
template <int LANES, int WEIGHTS>
INLINE typename Vector<LANES>::Type weights_of(const float* words, const float* scales, int part) {
    typedef typename Vector<LANES>::Type Vec;
    typedef typename Vector<LANES>::Words Words;
    if (WEIGHTS == 1) return *(const Vec*)words;
    // The first is the lowest byte; on its way down from the top a byte keeps its sign.
    const Words integers = *(const Words*)words << (24 - 8 * part) >> 24;
    return __builtin_convertvector(integers, Vec) * *(const Vec*)scales;
}

// One step in depth: a weight of each column times a value of each row.
template <int LANES, int ROWS, int WEIGHTS>
INLINE void step(const float* x, int64_t x_stride, const float* words, const float* scales,
                 int part, typename Vector<LANES>::Type sums[ROWS][VECTORS]) {
    typedef typename Vector<LANES>::Type Vec;
    Vec weights[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++)
        weights[v] = weights_of<LANES, WEIGHTS>(words + v * LANES, scales + v * LANES, part);
    UNROLL for (int r = 0; r < ROWS; r++) {
        const Vec value = x[r * x_stride] - Vec{};
        UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] += value * weights[v];
        KEEP(value);
    }
}

// What is due with the next rows of words.
INLINE void prefetch(const Tile& tile, const char*& ahead, const int32_t*& wanted) {
    const char* lines_end = ahead + tile.lines * LINE;
    if (tile.once)
        for (; ahead < lines_end; ahead += LINE) __builtin_prefetch(ahead, 0, NO_CACHE);
    else
        for (; ahead < lines_end; ahead += LINE) __builtin_prefetch(ahead);
    const int64_t wanted_lines = std::min<int64_t>(tile.every, tile.wanted_end - wanted);
    for (int64_t i = 0; i < wanted_lines; i++)
        __builtin_prefetch(tile.array + *wanted++ * LINE, 0, SECOND_CACHE);
}

template <int LANES, int ROWS, int WEIGHTS>
INLINE void multiply(Tile& tile) {
    typedef typename Vector<LANES>::Type Vec;
    constexpr int WIDTH = VECTORS * LANES;
    Vec sums[ROWS][VECTORS] = {};
    const float *x = tile.x, *words = (const float*)tile.panel, *scales = words;
    const float* end = x + tile.depth;
    const char* ahead = tile.ahead;
    const int32_t* wanted = tile.wanted;
    while (x < end) {
        int64_t depth = end - x;
        if (WEIGHTS > 1) {
            depth = std::min(depth, GROUP);
            scales = words;
            words += WIDTH;
        }
        const float* whole = x + depth / WEIGHTS * WEIGHTS;
        while (x < whole) {
            prefetch(tile, ahead, wanted);
            const float* due = std::min(x + tile.every * WEIGHTS, whole);
            for (; x < due; x += WEIGHTS, words += WIDTH)
                UNROLL for (int part = 0; part < WEIGHTS; part++)
                    step<LANES, ROWS, WEIGHTS>(x + part, tile.x_stride, words, scales, part, sums);
        }
        for (int part = 0; part < depth % WEIGHTS; part++, x++)
            step<LANES, ROWS, WEIGHTS>(x, tile.x_stride, words, scales, part, sums);
    }
    tile.ahead = ahead;
    if (tile.columns == WIDTH)
        store<LANES, ROWS>(tile, sums);
    else
        store_edge<LANES, ROWS>(tile, sums);
}

// An instruction set's kernels.
struct Kernels {
    typedef void (*ByRows[MOST_ROWS])(Tile&);  // less 1

    const char* name;
    int64_t width, rows;  // of a panel, of a tile
    ByRows float32, int8;  // by what the weights are
};

#define KERNEL(NAME, LANES, TARGET)                                           \
    template <int ROWS, int WEIGHTS>                                          \
    TARGET void NAME(Tile& tile) { multiply<LANES, ROWS, WEIGHTS>(tile); }
#define FOUR_ROWS(NAME, FROM, WEIGHTS)                                        \
    NAME<FROM, WEIGHTS>, NAME<FROM + 1, WEIGHTS>, NAME<FROM + 2, WEIGHTS>,    \
        NAME<FROM + 3, WEIGHTS>
#define EIGHT_ROWS(NAME, WEIGHTS) {FOUR_ROWS(NAME, 1, WEIGHTS), FOUR_ROWS(NAME, 5, WEIGHTS)}

// The sums of a full tile, the weights of a step and a value of x take nearly all registers.
#if defined(__x86_64__)
KERNEL(avx512, 16, __attribute__((target("avx512f"))))
KERNEL(avx2, 8, __attribute__((target("avx2,fma"))))
constexpr Kernels AVX512 = {"avx512", 16 * VECTORS, 8, EIGHT_ROWS(avx512, 1), EIGHT_ROWS(avx512, 4)};
constexpr Kernels AVX2 = {
    "avx2", 8 * VECTORS, 4, {FOUR_ROWS(avx2, 1, 1)}, {FOUR_ROWS(avx2, 1, 4)}};
#endif
KERNEL(generic, 4, )
constexpr Kernels GENERIC = {
    "generic", 4 * VECTORS, 4, {FOUR_ROWS(generic, 1, 1)}, {FOUR_ROWS(generic, 1, 4)}};

#if defined(__x86_64__)
// All of x86-64-v4, which the other kernels are compiled for.
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

// The best of this CPU, or no better than $PREFIXD_NATIVE_ISA names.
const Kernels& choose() {
    const char* variable = std::getenv("PREFIXD_NATIVE_ISA");
    const char* most = variable ? variable : "";
#if defined(__x86_64__)
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool below = !std::strcmp(most, AVX2.name), least = !std::strcmp(most, GENERIC.name);
    if (!below && !least && has_avx512()) return AVX512;
    if (!least && fma) return AVX2;
#endif
    return GENERIC;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace
}  // namespace prefixd
