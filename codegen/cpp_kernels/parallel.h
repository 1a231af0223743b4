// Threads of a kernel: all run the same statements, each on its share, or on the shares that it claims.
//
// OpenMP gives the threads; the library is linked to the runtime that PyTorch has loaded, so that one pool
// of threads serves both.
#pragma once
#include <omp.h>
#include <sched.h>
#include <atomic>
#include <cstdint>

namespace rw {

// Calls f(thread, num_threads) on every thread; it may meet at `barrier()`.
template <typename F> inline void parallel(int num_threads, F&& f) {
    if (num_threads <= 1) {
        f(0, 1);
        return;
    }
#pragma omp parallel num_threads(num_threads)
    f(omp_get_thread_num(), omp_get_num_threads());
}

// All threads of the enclosing `parallel` wait for each other.
inline void barrier() {
#pragma omp barrier
}

// Work in `count` shares that threads claim one after another. A thread that the system has put aside holds
// nobody up: the others do all shares without it, and it finds them done when it comes back.
struct alignas(128) Shares {
    std::atomic<int64_t> next, done;
};

// Calls f(share, count) for every share that is still free.
template <typename F> inline void claim(Shares& shares, int count, F&& f) {
    if (shares.next.load(std::memory_order_relaxed) >= count) return;
    for (;;) {
        int64_t share = shares.next.fetch_add(1, std::memory_order_relaxed);
        if (share >= count) return;
        f(int(share), count);
        shares.done.fetch_add(1, std::memory_order_release);
    }
}

// Waits until all shares are done, whoever does them.
inline void await(const Shares& shares, int count) {
    for (int spins = 0; shares.done.load(std::memory_order_acquire) < count; ++spins) {
        if (spins > 4000) {
            sched_yield();
            spins = 0;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

}  // namespace rw
