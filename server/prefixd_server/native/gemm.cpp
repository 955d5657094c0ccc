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
Range depth_block(int64_t k, int64_t index) { return part_of(k, index, depth_blocks(k)); }
int64_t panels_of(const Product& p) { return divide_up(p.n, kernels().width); }
int64_t tiles_of(const Product& p) { return divide_up(p.m, kernels().rows); }

// A thread's tiles, counted panel by panel.
Range share_of(const Product& p, int thread, int threads) {
    return part_of(panels_of(p) * tiles_of(p), thread, threads);
}

const float* panel_at(const Product& p, Range depth, int64_t panel) {
    return p.packed + (depth.first * panels_of(p) + panel * depth.size()) * kernels().width;
}

// Some tiles of rows over one panel; `after` is the panel that this thread multiplies next, or null.
void multiply_panel(const Product& p, Range depth, int64_t panel, Range tiles, const float* after) {
    const int64_t width = kernels().width, column = panel * width;
    Tile tile = {};
    tile.x_stride = p.x_stride;
    tile.panel = panel_at(p, depth, panel);
    tile.depth = depth.size();
    tile.bias = p.bias && depth.first == 0 ? p.bias + column : nullptr;
    tile.y_stride = p.y_stride;
    tile.columns = std::min(width, p.n - column);
    tile.add = p.add || depth.first > 0;
    // The tiles prefetch the panel after this in turn; one alone is as slow as its own panel comes.
    const int64_t bytes = width * depth.size() * 4;
    tile.ahead = (const char*)(tiles.size() == 1 ? tile.panel : after);
    if (tiles.size() == 1) tile.ahead += STREAM_AHEAD;
    const char* end = tile.ahead + bytes;
    int64_t lines = tile.ahead ? divide_up(divide_up(width * 4, LINE), tiles.size()) : 0;
    for (int64_t t = tiles.first; t < tiles.end; t++) {
        const Range rows = part_of(p.m, t, tiles_of(p));
        tile.x = p.x + rows.first * p.x_stride + depth.first;
        tile.y = p.y + rows.first * p.y_stride + column;
        kernels().multiply[rows.size() - 1][lines](tile);
        tile.ahead += depth.size() * lines * LINE;
        if (tile.ahead >= end) lines = 0;
    }
}

// A thread's first panel in a block of depth; after the last block, in the product that follows.
const float* first_panel(const Product* p, int64_t block, int thread, int threads) {
    if (block == depth_blocks(p->k)) p = p->next, block = 0;
    if (!p || p->m == 0) return nullptr;
    const int64_t panel = share_of(*p, thread, threads).first / tiles_of(*p);
    return panel_at(*p, depth_block(p->k, block), panel);
}

}  // namespace

void gemm_in_team(const Product& p, int thread, int threads) {
    const int64_t tiles = tiles_of(p);
    // The same outputs in each block of depth: a thread adds to its own.
    const Range share = share_of(p, thread, threads);
    for (int64_t block = 0; block < depth_blocks(p.k); block++) {
        const Range depth = depth_block(p.k, block);
        for (int64_t i = share.first; i < share.end;) {
            const int64_t panel = i / tiles, first = i % tiles;
            const Range range = {first, std::min(tiles, first + share.end - i)};
            i += range.size();
            const float* after = i < share.end ? panel_at(p, depth, panel + 1)
                                               : first_panel(&p, block + 1, thread, threads);
            multiply_panel(p, depth, panel, range, after);
        }
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
    const int64_t panels = prefixd::divide_up(n, width);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t block = 0; block < prefixd::depth_blocks(k); block++) {
            const Range depth = prefixd::depth_block(k, block);
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
