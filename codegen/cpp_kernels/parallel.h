// Threads of a kernel: all run the same statements, each on its share.
//
// OpenMP gives the threads; the library is linked to the runtime that PyTorch has loaded, so that one pool
// of threads serves both.
#pragma once
#include <omp.h>

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

}  // namespace rw
