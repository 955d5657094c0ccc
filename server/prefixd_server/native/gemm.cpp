// y = x W^T for frozen weights in float32, for the few rows of decoding as well as for prefill.
//
// W [n, k] is packed in blocks of depth (of k), each in panels [depth][columns] of a few vectors'
// columns: one linear stream. A tile of rows times a panel keeps its sums in registers. All tiles
// of rows go over one panel while it is in the cache, and meanwhile the next one is prefetched: with
// many rows reading the weights costs no time, with few rows nothing else does.
//
// Each output is summed over k in order by one lane, so it is the same to the bit for any number of
// rows and of threads.

#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

namespace prefixd {
namespace {

constexpr int VECTORS = 3;  // of columns in a panel
constexpr int MOST_ROWS = 8;  // of a tile
constexpr int64_t LINE = 64;  // bytes
constexpr int64_t MOST_DEPTH = 1024;  // so that two panels fit the second cache
constexpr int64_t STREAM_AHEAD = 6144;  // bytes, where one tile reads a panel and no other does

// Some rows of x times a panel.
struct Tile {
    const float* x;
    int64_t x_stride;
    const float* panel;
    int64_t depth;
    const float* bias;  // or null
    float* y;
    int64_t y_stride;
    int64_t columns;  // of the panel that are not padding
    bool add;
    const char* ahead;  // what to prefetch
};

template <int LANES>
struct Vector {
    typedef float Type __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
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

// LINES are prefetched for each step in depth.
template <int LANES, int ROWS, int LINES>
INLINE void multiply(const Tile& tile) {
    typedef typename Vector<LANES>::Type Vec;
    constexpr int WIDTH = VECTORS * LANES;
    Vec sums[ROWS][VECTORS] = {};
    const float *x = tile.x, *panel = tile.panel;
    const int64_t stride = tile.x_stride;
    const char* ahead = tile.ahead;
    for (int64_t i = 0; i < tile.depth; i++, panel += WIDTH, ahead += LINES * LINE) {
        UNROLL for (int line = 0; line < LINES; line++) __builtin_prefetch(ahead + line * LINE);
        Vec weights[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) weights[v] = *(const Vec*)(panel + v * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Vec value = x[r * stride + i] - Vec{};
            UNROLL for (int v = 0; v < VECTORS; v++) sums[r][v] += value * weights[v];
        }
    }
    if (tile.columns == WIDTH)
        store<LANES, ROWS>(tile, sums);
    else
        store_edge<LANES, ROWS>(tile, sums);
}

// An instruction set's kernels, by rows - 1 and by lines prefetched.
struct Kernels {
    const char* name;
    int64_t width, rows;  // of a panel, of a tile
    void (*multiply[MOST_ROWS][VECTORS + 1])(const Tile&);
};

#define KERNEL(NAME, LANES, TARGET)                                                 \
    template <int ROWS, int LINES>                                                  \
    TARGET void NAME(const Tile& tile) { multiply<LANES, ROWS, LINES>(tile); }
#define BY_LINES(NAME, ROWS) {NAME<ROWS, 0>, NAME<ROWS, 1>, NAME<ROWS, 2>, NAME<ROWS, 3>}
#define FOUR_ROWS(NAME, FROM)                                                       \
    BY_LINES(NAME, FROM), BY_LINES(NAME, FROM + 1), BY_LINES(NAME, FROM + 2),       \
        BY_LINES(NAME, FROM + 3)

// The sums of a full tile, the weights of a step and a value of x take nearly all registers.
#if defined(__x86_64__)
KERNEL(avx512, 16, __attribute__((target("avx512f"))))
KERNEL(avx2, 8, __attribute__((target("avx2,fma"))))
constexpr Kernels AVX512 = {"avx512", 16 * VECTORS, 8, {FOUR_ROWS(avx512, 1), FOUR_ROWS(avx512, 5)}};
constexpr Kernels AVX2 = {"avx2", 8 * VECTORS, 4, {FOUR_ROWS(avx2, 1)}};
#endif
KERNEL(generic, 4, )
constexpr Kernels GENERIC = {"generic", 4 * VECTORS, 4, {FOUR_ROWS(generic, 1)}};

// The best of this CPU, or no better than $PREFIXD_NATIVE_ISA names.
const Kernels& choose() {
    const char* variable = std::getenv("PREFIXD_NATIVE_ISA");
    const char* most = variable ? variable : "";
#if defined(__x86_64__)
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool below = !std::strcmp(most, AVX2.name), least = !std::strcmp(most, GENERIC.name);
    if (!below && !least && __builtin_cpu_supports("avx512f")) return AVX512;
    if (!least && fma) return AVX2;
#endif
    return GENERIC;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
    int64_t first, end;
    int64_t size() const { return end - first; }
};

// The `index`th of `parts` nearly equal parts of [0, size).
Range part_of(int64_t size, int64_t index, int64_t parts) {
    return {size * index / parts, size * (index + 1) / parts};
}

int64_t depth_blocks(int64_t k) { return divide_up(k, MOST_DEPTH); }

// Some of the `tiles` of rows over one panel of a block of depth.
void multiply_panel(const Product& p, Range depth, int64_t panel, int64_t tiles, Range range) {
    const int64_t width = kernels().width, column = panel * width;
    const int64_t panels = divide_up(p.n, width);
    Tile tile = {};
    tile.x_stride = p.x_stride;
    tile.panel = p.packed + depth.first * panels * width + column * depth.size();
    tile.depth = depth.size();
    tile.bias = p.bias && depth.first == 0 ? p.bias + column : nullptr;
    tile.y_stride = p.y_stride;
    tile.columns = std::min(width, p.n - column);
    tile.add = p.add || depth.first > 0;
    // The tiles together prefetch the next panel.
    const int64_t bytes = width * depth.size() * 4;
    int64_t lines = divide_up(divide_up(width * 4, LINE), range.size());
    const char* end = (const char*)tile.panel + 2 * bytes;
    tile.ahead = (const char*)tile.panel + (range.size() == 1 ? STREAM_AHEAD : bytes);
    for (int64_t t = range.first; t < range.end; t++) {
        const Range rows = part_of(p.m, t, tiles);
        tile.x = p.x + rows.first * p.x_stride + depth.first;
        tile.y = p.y + rows.first * p.y_stride + column;
        if (tile.ahead >= end) lines = 0;
        kernels().multiply[rows.size() - 1][lines](tile);
        tile.ahead += depth.size() * lines * LINE;
    }
}

}  // namespace

void gemm_in_team(const Product& p, int thread, int threads) {
    const int64_t tiles = divide_up(p.m, kernels().rows);
    const int64_t panels = divide_up(p.n, kernels().width);
    // The same outputs in each block of depth: a thread adds to its own.
    const Range share = part_of(panels * tiles, thread, threads);
    const int64_t depths = depth_blocks(p.k);
    for (int64_t d = 0; d < depths; d++)
        for (int64_t i = share.first; i < share.end;) {
            const int64_t panel = i / tiles, first = i % tiles;
            const Range range = {first, std::min(tiles, first + share.end - i)};
            multiply_panel(p, part_of(p.k, d, depths), panel, tiles, range);
            i += range.size();
        }
}

}  // namespace prefixd

extern "C" {

using prefixd::Range;

const char* prefixd_gemm_isa() { return prefixd::kernels().name; }

// In floats.
int64_t prefixd_packed_size(int64_t n, int64_t k) {
    const int64_t width = prefixd::kernels().width;
    return prefixd::divide_up(n, width) * width * k;
}

// Weight [n, k], rows `row_stride` apart.
void prefixd_pack(const float* weight, int64_t row_stride, int64_t n, int64_t k, float* packed) {
    const int64_t width = prefixd::kernels().width;
    const int64_t panels = prefixd::divide_up(n, width), depths = prefixd::depth_blocks(k);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t d = 0; d < depths; d++) {
            const Range depth = prefixd::part_of(k, d, depths);
            float* to = packed + (depth.first * panels + panel * depth.size()) * width;
            for (int64_t i = depth.first; i < depth.end; i++)
                for (int64_t row = panel * width; row < (panel + 1) * width; row++)
                    *to++ = row < n ? weight[row * row_stride + i] : 0.f;
        }
}

void prefixd_gemm(const float* x, int64_t x_stride, const float* packed, const float* bias,
                  int64_t m, int64_t n, int64_t k, float* y, int64_t y_stride, int32_t add) {
    const prefixd::Product product = {x, x_stride, packed, bias, m, n, k, y, y_stride, add != 0};
#pragma omp parallel if (m * n * k > 65536)
    prefixd::gemm_in_team(product, omp_get_thread_num(), omp_get_num_threads());
}

}  // extern "C"
