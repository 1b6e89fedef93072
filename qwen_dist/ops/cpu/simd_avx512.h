// Vectors of 16 float32, with AVX512 and, if HAS_BF16_DOT is defined, AVX512-BF16.

#pragma once

#include <immintrin.h>

namespace {

using Floats = __m512;
constexpr int kFloatLanes = 16;
constexpr int kRegisters = 32;

// The first lanes of a register; the others are loaded as 0 and not stored.
struct Lanes {
  __mmask16 mask;
};
SIMD INLINE Lanes FirstLanes(int64_t count) {
  return {static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kFloatLanes)) - 1)};
}

SIMD INLINE Floats Set(float x) { return _mm512_set1_ps(x); }
SIMD INLINE float First(Floats x) { return _mm512_cvtss_f32(x); }
SIMD INLINE Floats MultiplyAdd(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
SIMD INLINE Floats NegatedMultiplyAdd(Floats x, Floats y, Floats sum) { return _mm512_fnmadd_ps(x, y, sum); }
SIMD INLINE Floats MultiplySubtract(Floats x, Floats y, Floats z) { return _mm512_fmsub_ps(x, y, z); }
// y if either is not a number.
SIMD INLINE Floats Max(Floats x, Floats y) { return _mm512_max_ps(x, y); }
SIMD INLINE Floats Min(Floats x, Floats y) { return _mm512_min_ps(x, y); }
SIMD INLINE Floats Round(Floats x) { return _mm512_roundscale_ps(x, 0); }
// x · 2^n, for integers n.
SIMD INLINE Floats TimesPowerOfTwo(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
SIMD INLINE float Sum(Floats x) { return _mm512_reduce_add_ps(x); }
SIMD INLINE float Largest(Floats x) { return _mm512_reduce_max_ps(x); }

SIMD INLINE Floats Widened(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
SIMD INLINE __m256i RoundedBits(Floats x) {
#ifdef HAS_BF16_DOT
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
#endif
}
SIMD INLINE Floats Load(const float* from) { return _mm512_loadu_ps(from); }
SIMD INLINE Floats Load(const uint16_t* from) {
  return Widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
SIMD INLINE Floats Load(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes.mask, from); }
SIMD INLINE Floats Load(const uint16_t* from, Lanes lanes) { return Widened(_mm256_maskz_loadu_epi16(lanes.mask, from)); }
SIMD INLINE void Store(Floats x, float* to) { _mm512_storeu_ps(to, x); }
SIMD INLINE void Store(Floats x, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), RoundedBits(x));
}
SIMD INLINE void Store(Floats x, float* to, Lanes lanes) { _mm512_mask_storeu_ps(to, lanes.mask, x); }
SIMD INLINE void Store(Floats x, uint16_t* to, Lanes lanes) { _mm256_mask_storeu_epi16(to, lanes.mask, RoundedBits(x)); }
SIMD INLINE Floats Rounded(Floats x) { return Widened(RoundedBits(x)); }

// 16 bytes as numbers.
SIMD INLINE __m128i Load16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
SIMD INLINE Floats LoadBytes(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Load16(from))); }
// Part `part` of a run of 32 values of 4 bits: those in the low halves of its 16 bytes come first.
SIMD INLINE Floats LoadNibbles(const uint8_t* run, int part) {
  const __m128i halves = part == 0 ? Load16(run) : _mm_srli_epi16(Load16(run), 4);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(halves, _mm_set1_epi8(15))));
}
SIMD INLINE Floats SetFloat16(uint16_t bits) { return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(bits))); }
SIMD INLINE Floats RoundedToFloat16(Floats x) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The even and the odd ones of 32 bfloat16, of which the first `count` are loaded.
SIMD INLINE __m512i LoadPairs(const uint16_t* from) { return _mm512_loadu_si512(from); }
SIMD INLINE __m512i LoadPairs(const uint16_t* from, int count) {
  return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
}
SIMD INLINE Floats Evens(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
SIMD INLINE Floats Odds(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
#ifdef HAS_BF16_DOT
// Pairs, viewed as float32, of an element of `even` and one of `odd`.
SIMD INLINE Floats LoadInterleaved(const uint16_t* even, const uint16_t* odd) {
  const auto load = [](const uint16_t* from) SIMD {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  return _mm512_castsi512_ps(_mm512_or_si512(load(even), _mm512_slli_epi32(load(odd), 16)));
}
// 32 numbers, rounded to bfloat16, as pairs in their order.
SIMD INLINE Floats RoundedPairs(Floats first, Floats second) {
  return reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(second, first));
}
// Add the products of 16 pairs, viewed as float32.
SIMD INLINE Floats MultiplyAddPairs(Floats x, Floats y, Floats sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
}
#endif

// x where begin <= first + lane < end, else -infinity.
SIMD INLINE Floats KeepRange(Floats x, int first, int begin, int end) {
  const __m512i position = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                        11, 12, 13, 14, 15));
  const __mmask16 inside = _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32(begin)) &
                           _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32(end));
  return _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), inside, x);
}

// Transpose kFloatLanes × kFloatLanes words.
SIMD INLINE void Transpose(Floats (&x)[16]) {
  Floats y[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  const auto low = [](Floats a, Floats b) SIMD {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](Floats a, Floats b) SIMD {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  UNROLL for (int i = 0; i < 16; i += 4) {
    x[i] = low(y[i], y[i + 2]);
    x[i + 1] = high(y[i], y[i + 2]);
    x[i + 2] = low(y[i + 1], y[i + 3]);
    x[i + 3] = high(y[i + 1], y[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_f32x4(y[i % 4 + i / 4 * 4], y[i % 4 + i / 4 * 4 + 8], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(y[i % 4 + i / 4 * 4], y[i % 4 + i / 4 * 4 + 8], 0xdd);
  }
}

// Store the sums of the elements of each of four vectors.
SIMD INLINE __m128 HorizontalSums(const Floats (&x)[4]) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
SIMD INLINE void StoreSums(const Floats (&x)[4], float* to) { _mm_storeu_ps(to, HorizontalSums(x)); }
SIMD INLINE void StoreSums(const Floats (&x)[4], uint16_t* to) {
  const __m256i rounded = RoundedBits(_mm512_castps128_ps512(HorizontalSums(x)));
  std::memcpy(to, &rounded, 4 * sizeof(*to));
}

SIMD INLINE void Prefetch(const char* from) { _mm_prefetch(from, _MM_HINT_T1); }

}  // namespace

#include "denormals_x86.h"
