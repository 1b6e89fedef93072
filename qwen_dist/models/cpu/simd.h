// What the kernels share: vectors of floats of either kind, and a loop over the threads of XLA's pool.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

constexpr int kSpins = 2000;

struct Float32 {
  using Element = float;
  using Vector = __m512;
  static constexpr int kLanes = 16;
  AVX512 static INLINE Vector Load(const Element* from) { return _mm512_loadu_ps(from); }
  AVX512 static INLINE Vector Load(const Element* from, int number) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << number) - 1), from);
  }
  AVX512 static INLINE __m512 Add(__m512 sum, Vector x, Vector y) { return _mm512_fmadd_ps(x, y, sum); }
};

struct BFloat16 {
  using Element = uint16_t;
  using Vector = __m512i;
  static constexpr int kLanes = 32;
  AVX512 static INLINE Vector Load(const Element* from) { return _mm512_loadu_si512(from); }
  AVX512 static INLINE Vector Load(const Element* from, int number) {
    return _mm512_maskz_loadu_epi16((1u << number) - 1, from);
  }
  AVX512 static INLINE __m512 Add(__m512 sum, Vector x, Vector y) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};

// Calls job(0), …, job(number - 1), on this thread and on those of the pool that have nothing else to do. It never waits for
// a job that nobody has begun, so the pool may be as busy as it likes.
inline void ForEach(ffi::ThreadPool& pool, int64_t number, std::function<void(int64_t)> job) {
  struct State {
    std::atomic<int64_t> begun{0}, done{0};
  };
  auto state = std::make_shared<State>();
  std::function<void()> work = [state, number, job = std::move(job)] {
    for (int64_t index; (index = state->begun.fetch_add(1)) < number;) {
      job(index);
      state->done.fetch_add(1);
    }
  };
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), number); ++helper) {
    pool.Schedule(std::function<void()>(work));
  }
  work();
  // Others are about to be done, unless there are more threads than cores.
  for (int spins = 0; state->done.load() < number; ++spins) {
    if (spins < kSpins) {
      _mm_pause();
    } else {
      std::this_thread::yield();
    }
  }
}
