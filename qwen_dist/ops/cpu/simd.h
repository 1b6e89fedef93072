// What the kernels share: vectors of float32 and bfloat16, exp, and a parallel loop over XLA's thread pool.

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
constexpr int kFloatLanes = 16;  // float32 values in a register

struct Float32 {
  using Element = float;
  using Vector = __m512;
  static constexpr int kLanes = 16;
  AVX512 static INLINE Vector Load(const Element* from) { return _mm512_loadu_ps(from); }
  AVX512 static INLINE Vector Load(const Element* from, int count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  }
  AVX512 static INLINE __m512 MultiplyAdd(__m512 sum, Vector x, Vector y) { return _mm512_fmadd_ps(x, y, sum); }
};

struct BFloat16 {
  using Element = uint16_t;
  using Vector = __m512i;
  static constexpr int kLanes = 32;
  AVX512 static INLINE Vector Load(const Element* from) { return _mm512_loadu_si512(from); }
  AVX512 static INLINE Vector Load(const Element* from, int count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
  }
  AVX512 static INLINE __m512 MultiplyAdd(__m512 sum, Vector x, Vector y) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};

// e^x with the constants of Cephes' expf; 0 or infinity where the result has no exponent in float32.
AVX512 INLINE __m512 Exp(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-104.0f)), _mm512_set1_ps(104.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(c));
  }
  y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(x, x), x), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// The mask of the first `count` lanes of a register, or of all. The other lanes are loaded as 0 and not stored.
AVX512 INLINE __mmask16 LaneMask(int64_t count) {
  return static_cast<__mmask16>((1u << std::min<int64_t>(count, kFloatLanes)) - 1);
}
AVX512 INLINE __m512 LoadFloats(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
AVX512 INLINE __m512 LoadFloats(const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
AVX512 INLINE void StoreFloats(__m512 x, float* to, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, x); }
AVX512 INLINE void StoreFloats(__m512 x, uint16_t* to, __mmask16 mask = 0xffff) {
  _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// Call job(0), …, job(num_jobs - 1) on this thread and on idle threads of the pool. This thread runs every job that no
// other has started, so the loop also ends if the pool has no idle thread.
inline void ParallelFor(ffi::ThreadPool& pool, int64_t num_jobs, std::function<void(int64_t)> job) {
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
  for (int64_t helper = 1; helper < std::min(pool.num_threads(), num_jobs); ++helper) {
    pool.Schedule(std::function<void()>(work));
  }
  work();
  // The remaining jobs finish soon, unless there are more threads than cores: then yield.
  for (int spins = 0; counters->finished.load() < num_jobs; ++spins) {
    if (spins < kSpins) {
      _mm_pause();
    } else {
      std::this_thread::yield();
    }
  }
}
