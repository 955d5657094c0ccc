// The threads of a parallel region and what they do one phase after another.
//
// A phase has a share of work for each thread. Who has done its own does those that others have not
// begun, and all go on when every share is done: so a thread that lost its core between phases holds
// up nobody, and finds its way back by looking. Before long phases a thread offers its core to
// whoever waits for it, as a server's event loop does: better there than amid a share, for which all
// would wait.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace prefixd {

constexpr int MOST_THREADS = 64;  // of a team: one bit each

inline int team_size() { return std::min(omp_get_max_threads(), MOST_THREADS); }

struct alignas(64) Phase {
    std::atomic<uint64_t> taken{0};  // shares, a bit each
    std::atomic<int64_t> next{0};    // item
    std::atomic<int64_t> done{0};    // shares or items
};

// What a thread knows of its team. All threads go through the same phases in the same order.
class Member {
public:
    explicit Member(std::vector<Phase>& phases)
        : thread(omp_get_thread_num()), threads(omp_get_num_threads()), phases(phases) {}

    // work(share, shares) for each share; returns when all are done.
    template <class Work>
    void shares(Work work) {
        Phase& phase = phases[at++];
        for (int i = 0; i < threads; i++) {
            const int share = (thread + i) % threads;
            const uint64_t bit = uint64_t(1) << share;
            if (phase.taken.load(std::memory_order_relaxed) & bit) continue;
            if (phase.taken.fetch_or(bit, std::memory_order_acq_rel) & bit) continue;
            work(share, threads);
            phase.done.fetch_add(1, std::memory_order_acq_rel);
        }
        wait(phase, threads);
    }

    // work(item) for each of so many, to whoever is free; returns when all are done.
    template <class Work>
    void items(int64_t count, Work work) {
        Phase& phase = phases[at++];
        int64_t mine = 0;
        for (; phase.next.load(std::memory_order_relaxed) < count; mine++) {
            const int64_t item = phase.next.fetch_add(1, std::memory_order_relaxed);
            if (item >= count) break;
            work(item);
        }
        if (mine) phase.done.fetch_add(mine, std::memory_order_acq_rel);
        wait(phase, count);
    }

    // Costs some 0.2 us where nobody wants the core.
    void offer_core() const { sched_yield(); }

    const int thread, threads;

private:
    void wait(const Phase& phase, int64_t all) const {
        for (int spins = 1; phase.done.load(std::memory_order_acquire) < all; spins++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins % SPINS == 0) offer_core();
        }
    }

    static constexpr int SPINS = 128;
    std::vector<Phase>& phases;
    int64_t at = 0;
};

}  // namespace prefixd
