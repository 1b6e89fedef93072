// What the kernels share: vectors of floats of either kind, their exponentials, and a loop over the threads of XLA's pool.

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
constexpr int kFloats = 16;  // of a vector

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

// e^x by the constants of Cephes' expf; 0 or infinity where x is beyond any exponent.
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

// The first `number` of 16 floats of either kind; the others are 0, or not written.
AVX512 INLINE __mmask16 First(int64_t number) { return static_cast<__mmask16>((1u << std::min<int64_t>(number, kFloats)) - 1); }
AVX512 INLINE __m512 Floats(const float* from, __mmask16 first) { return _mm512_maskz_loadu_ps(first, from); }
AVX512 INLINE __m512 Floats(const uint16_t* from, __mmask16 first) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, from)), 16));
}
AVX512 INLINE void Store(__m512 x, float* to, __mmask16 first = 0xffff) { _mm512_mask_storeu_ps(to, first, x); }
AVX512 INLINE void Store(__m512 x, uint16_t* to, __mmask16 first = 0xffff) {
  _mm256_mask_storeu_epi16(to, first, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

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
