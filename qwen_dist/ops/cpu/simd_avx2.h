// Vectors of 8 float32, with AVX2 and FMA.

#pragma once

#include <immintrin.h>

namespace {

using Floats = __m256;
constexpr int kFloatLanes = 8;
constexpr int kRegisters = 16;

// The first lanes of a register; the others are loaded as 0 and not stored. The instructions with a mask take many cycles
// on some processors, so elements are copied one by one where a register is not full.
struct Lanes {
  int count;
};
SIMD INLINE Lanes FirstLanes(int64_t count) { return {static_cast<int>(std::clamp<int64_t>(count, 0, kFloatLanes))}; }

SIMD INLINE Floats Set(float x) { return _mm256_set1_ps(x); }
SIMD INLINE float First(Floats x) { return _mm256_cvtss_f32(x); }
SIMD INLINE Floats MultiplyAdd(Floats x, Floats y, Floats sum) { return _mm256_fmadd_ps(x, y, sum); }
SIMD INLINE Floats NegatedMultiplyAdd(Floats x, Floats y, Floats sum) { return _mm256_fnmadd_ps(x, y, sum); }
SIMD INLINE Floats MultiplySubtract(Floats x, Floats y, Floats z) { return _mm256_fmsub_ps(x, y, z); }
// y if either is not a number.
SIMD INLINE Floats Max(Floats x, Floats y) { return _mm256_max_ps(x, y); }
SIMD INLINE Floats Min(Floats x, Floats y) { return _mm256_min_ps(x, y); }
SIMD INLINE Floats Round(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x · 2^n, for integers n between -252 and 254: in two steps, as 2^n may be no float32.
SIMD INLINE Floats TimesPowerOfTwo(Floats x, Floats n) {
  const __m256i power = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(power, 1);
  const auto exponent = [](__m256i p) SIMD {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(p, _mm256_set1_epi32(127)), 23));
  };
  return x * exponent(half) * exponent(_mm256_sub_epi32(power, half));
}
SIMD INLINE float Sum(Floats x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
SIMD INLINE float Largest(Floats x) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}

SIMD INLINE Floats Widened(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SIMD INLINE __m256i RoundedWords(Floats x) {  // the upper halves are the rounded bits
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, is_nan);
}
SIMD INLINE __m128i RoundedBits(Floats x) {
  const __m256i words = _mm256_srli_epi32(RoundedWords(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
SIMD INLINE Floats Rounded(Floats x) {
  return _mm256_castsi256_ps(_mm256_and_si256(RoundedWords(x), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
SIMD INLINE Floats Load(const float* from) { return _mm256_loadu_ps(from); }
SIMD INLINE Floats Load(const uint16_t* from) { return Widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
template <class Element>
SIMD INLINE Floats Load(const Element* from, Lanes lanes) {
  if (lanes.count == kFloatLanes) return Load(from);
  Element elements[kFloatLanes] = {};
  for (int i = 0; i < lanes.count; ++i) elements[i] = from[i];
  return Load(elements);
}
SIMD INLINE void Store(Floats x, float* to) { _mm256_storeu_ps(to, x); }
SIMD INLINE void Store(Floats x, uint16_t* to) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), RoundedBits(x)); }
template <class Element>
SIMD INLINE void Store(Floats x, Element* to, Lanes lanes) {
  if (lanes.count == kFloatLanes) return Store(x, to);
  Element elements[kFloatLanes];
  Store(x, elements);
  for (int i = 0; i < lanes.count; ++i) to[i] = elements[i];
}

// 8 bytes as numbers.
SIMD INLINE __m128i Load8(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
SIMD INLINE Floats LoadBytes(const int8_t* from) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(Load8(from))); }
// Part `part` of a run of 32 values of 4 bits: those in the low halves of its 16 bytes come first.
SIMD INLINE Floats LoadNibbles(const uint8_t* run, int part) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run));
  const __m128i values = _mm_and_si128(part < 2 ? both : _mm_srli_epi16(both, 4), _mm_set1_epi8(15));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(part % 2 == 0 ? values : _mm_srli_si128(values, 8)));
}
SIMD INLINE Floats SetFloat16(uint16_t bits) { return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(bits))); }
SIMD INLINE Floats RoundedToFloat16(Floats x) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The even and the odd ones of 16 bfloat16, of which the first `count` are loaded.
SIMD INLINE __m256i LoadPairs(const uint16_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
SIMD INLINE __m256i LoadPairs(const uint16_t* from, int count) {
  uint16_t elements[2 * kFloatLanes] = {};
  for (int i = 0; i < count; ++i) elements[i] = from[i];
  return LoadPairs(elements);
}
SIMD INLINE Floats Evens(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
SIMD INLINE Floats Odds(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

// x where begin <= first + lane < end, else -infinity.
SIMD INLINE Floats KeepRange(Floats x, int first, int begin, int end) {
  const __m256i position = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(position, _mm256_set1_epi32(begin - 1)),
                                          _mm256_cmpgt_epi32(_mm256_set1_epi32(end), position));
  return _mm256_blendv_ps(_mm256_set1_ps(-std::numeric_limits<float>::infinity()), x, _mm256_castsi256_ps(inside));
}

// Transpose kFloatLanes × kFloatLanes words.
SIMD INLINE void Transpose(Floats (&x)[8]) {
  Floats y[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
  UNROLL for (int i = 0; i < 8; ++i) x[i] = y[i];
}

// Store the sums of the elements of each of four vectors.
SIMD INLINE __m128 HorizontalSums(const Floats (&x)[4]) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
SIMD INLINE void StoreSums(const Floats (&x)[4], float* to) { _mm_storeu_ps(to, HorizontalSums(x)); }
SIMD INLINE void StoreSums(const Floats (&x)[4], uint16_t* to) {
  const __m128i rounded = RoundedBits(_mm256_castps128_ps256(HorizontalSums(x)));
  std::memcpy(to, &rounded, 4 * sizeof(*to));
}

SIMD INLINE void Prefetch(const char* from) { _mm_prefetch(from, _MM_HINT_T1); }

}  // namespace

#include "denormals_x86.h"
