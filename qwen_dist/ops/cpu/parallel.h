// A parallel loop over XLA's thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "kernels.h"

namespace {

constexpr int kSpins = 2000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

// Call job(0), …, job(num_jobs - 1) on this thread and on idle threads of the pool. This thread runs every job that no
// other has started, so the loop also ends if the pool has no idle thread.
inline void ParallelFor(const Pool& pool, int64_t num_jobs, std::function<void(int64_t)> job) {
  struct Counters {
    std::atomic<int64_t> started{0}, finished{0};
  };
  auto counters = std::make_shared<Counters>();
  std::function<void()> work = [counters, num_jobs, job = std::move(job)] {
    for (int64_t index; (index = counters->started.fetch_add(1)) < num_jobs;) {
      job(index);
      counters->finished.fetch_add(1);
    }
  };
  for (int64_t helper = 1; helper < std::min(pool.num_threads, num_jobs); ++helper) pool.schedule(pool.pool, work);
  work();
  // The remaining jobs finish soon, unless there are more threads than cores: then yield.
  for (int spins = 0; counters->finished.load() < num_jobs; ++spins) {
    if (spins < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace
