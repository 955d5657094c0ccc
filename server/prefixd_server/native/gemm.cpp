// y = x W^T for frozen weights, for the few rows of decoding as well as for prefill.
//
// W [n, k] is packed in blocks of depth (of k), each in panels [depth][columns] of a few vectors'
// columns: one linear stream of words. A word is a float; or four numbers in int8 that follow each
// other in depth, and ahead of each group in depth is a row of words with the columns' scales: they
// become float32 in registers. A tile of rows times a panel keeps its sums in registers. All tiles of
// rows go over one panel while it is in the cache, and meanwhile the next one is prefetched: with
// many rows reading the weights costs no time, with few rows nothing else does. What one tile alone
// reads is fetched past the second and third caches: they could not hold it until the next step, and
// may so keep what others need before, as the interpreter's data.
//
// Each output is summed over k in order by one lane, so it is the same to the bit for any number of
// rows and of threads.

#include "gemm.h"

#include <omp.h>

#include "gemm_tile.h"

namespace prefixd {
namespace {

constexpr int64_t MOST_DEPTH = 1024;  // so that two panels fit the second cache
constexpr int64_t STREAM_AHEAD = 6144;  // bytes, where one tile reads a panel and no other does
constexpr int64_t RUN = 1536;  // bytes of a panel at least that a tile multiplies with no prefetch

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
// Each begins with a whole group.
Range depth_block(int64_t k, int64_t index) {
    const Range groups = part_of(divide_up(k, GROUP), index, depth_blocks(k));
    return {groups.first * GROUP, std::min(k, groups.end * GROUP)};
}
// Of a column.
int64_t words_of(int64_t depth, bool int8) {
    return int8 ? divide_up(depth, GROUP) + divide_up(depth, WORD) : depth;
}
int64_t panels_of(const Product& p) { return divide_up(p.n, kernels().width); }
int64_t tiles_of(const Product& p) { return divide_up(p.m, kernels().rows); }

// A thread's tiles, counted panel by panel.
Range share_of(const Product& p, int thread, int threads) {
    return part_of(panels_of(p) * tiles_of(p), thread, threads);
}

// Where a panel begins, in words.
int64_t place_of(int64_t n, Range depth, int64_t panel, bool int8) {
    const int64_t width = kernels().width, above = words_of(depth.first, int8);
    return (above * divide_up(n, width) + panel * words_of(depth.size(), int8)) * width;
}

const char* panel_at(const Product& p, Range depth, int64_t panel) {
    return (const char*)p.packed + place_of(p.n, depth, panel, p.int8) * WORD;
}

// The next lines for a tile to fetch that reads so many rows of words.
void take(Wanted& wanted, int64_t rows, Tile& tile) {
    if (wanted.at == wanted.end && wanted.other) {
        wanted.array = wanted.other;
        wanted.other = nullptr;
        wanted.at = wanted.lines;
    }
    tile.array = wanted.array;
    tile.wanted = wanted.at;
    tile.wanted_end = wanted.at += std::min<int64_t>(rows, wanted.end - wanted.at);
}

// Some tiles of rows over one panel; `after` is the panel that this thread multiplies next, or null.
void multiply_panel(const Product& p, Range depth, int64_t panel, Range tiles, const char* after) {
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
    // All of them, or memory would be asked for too much at once and then for nothing. In long runs,
    // for what is done between two is dear where two threads share a core.
    const int64_t row = width * WORD;
    tile.once = tiles.size() == 1;
    tile.ahead = tile.once ? (const char*)tile.panel + STREAM_AHEAD : after;
    const char* end = tile.ahead + row * words_of(depth.size(), p.int8);
    tile.every = std::max(RUN, tiles.size() * LINE) / row;
    tile.lines = tile.ahead ? divide_up(tile.every * row, LINE * tiles.size()) : 0;
    const auto& by_rows = p.int8 ? kernels().int8 : kernels().float32;
    for (int64_t t = tiles.first; t < tiles.end; t++) {
        const Range rows = part_of(p.m, t, tiles_of(p));
        tile.x = p.x + rows.first * p.x_stride + depth.first;
        tile.y = p.y + rows.first * p.y_stride + column;
        // Where there are tiles without a line of the next panel to fetch, or this is the last one.
        if (p.wanted && tiles.size() > 1 && (tile.lines == 0 || t + 1 == tiles.end))
            take(*p.wanted, tile.depth / (p.int8 ? WORD : 1), tile);
        by_rows[rows.size() - 1](tile);
        tile.wanted = tile.wanted_end;
        if (tile.ahead >= end) tile.lines = 0;
    }
}

// A thread's first panel in a block of depth; after the last block, in the product that follows.
const char* first_panel(const Product* p, int64_t block, int thread, int threads) {
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
            const char* after = i < share.end ? panel_at(p, depth, panel + 1)
                                               : first_panel(&p, block + 1, thread, threads);
            multiply_panel(p, depth, panel, range, after);
        }
    }
}

}  // namespace prefixd

extern "C" {

using prefixd::Range;

const char* prefixd_gemm_isa() { return prefixd::kernels().name; }

// In words of 4 bytes.
int64_t prefixd_packed_size(int64_t n, int64_t k, int32_t int8) {
    const int64_t width = prefixd::kernels().width;
    return prefixd::divide_up(n, width) * width * prefixd::words_of(k, int8);
}

// Weight [n, k] in float32, rows `row_stride` apart.
void prefixd_pack(const float* weight, int64_t row_stride, int64_t n, int64_t k, float* packed) {
    const int64_t width = prefixd::kernels().width, panels = prefixd::divide_up(n, width);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t block = 0; block < prefixd::depth_blocks(k); block++) {
            const Range depth = prefixd::depth_block(k, block);
            float* to = packed + prefixd::place_of(n, depth, panel, false);
            for (int64_t i = depth.first; i < depth.end; i++)
                for (int64_t row = panel * width; row < (panel + 1) * width; row++)
                    *to++ = row < n ? weight[row * row_stride + i] : 0.f;
        }
}

// Weight [n, k] in int8, rows `row_stride` apart, and its scales [n, ceil(k / GROUP)]. What pads
// `packed` must be zeros already.
void prefixd_pack_int8(const int8_t* weight, int64_t row_stride, const float* scales, int64_t n,
                       int64_t k, int8_t* packed) {
    constexpr int64_t GROUP = prefixd::GROUP, WORD = prefixd::WORD;
    const int64_t width = prefixd::kernels().width, row_bytes = width * WORD;
    const int64_t groups = prefixd::divide_up(k, GROUP);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++)
        for (int64_t block = 0; block < prefixd::depth_blocks(k); block++) {
            const Range depth = prefixd::depth_block(k, block);
            const int64_t place = prefixd::place_of(n, depth, row / width, true);
            int8_t* to = packed + (place + row % width) * WORD - row_bytes;
            for (int64_t i = depth.first; i < depth.end; i++) {
                if (i % GROUP == 0)
                    std::memcpy(to += row_bytes, scales + row * groups + i / GROUP, WORD);
                if (i % WORD == 0) to += row_bytes;
                to[i % WORD] = weight[row * row_stride + i];
            }
        }
}

void prefixd_gemm(const float* x, int64_t x_stride, const void* packed, int32_t int8,
                  const float* bias, int64_t m, int64_t n, int64_t k, float* y, int64_t y_stride,
                  int32_t add) {
    const prefixd::Product product = {x, x_stride, packed, int8 != 0, bias,    m,
                                      n, k,        y,      y_stride,  add != 0};
#pragma omp parallel if (m * n * k > 65536)
    prefixd::gemm_in_team(product, omp_get_thread_num(), omp_get_num_threads());
}

}  // extern "C"
