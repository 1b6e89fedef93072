// What the kernels compute with: vectors of float32 by build, the two types of float, and exp.
//
// A build's file defines SIMD, the attribute of functions that use its instructions, and includes its vectors. Functions
// without the attribute, those of the standard library too, are compiled for any processor.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#include SIMD_VECTORS

namespace {

// Every lane of a register.
struct AllLanes {};
template <class Element>
SIMD INLINE Floats Load(const Element* from, AllLanes) {
  return Load(from);
}
template <class Element>
SIMD INLINE void Store(Floats x, Element* to, AllLanes) {
  Store(x, to);
}

// The vectors in which a type's elements are multiplied: kLanes inputs each. kWidens: as float32. kPacks: in AMX's tiles.
struct Float32 {
  using Element = float;
  using Row = float;  // an element of the other operand's rows, see PrepareRows
  static constexpr int kLanes = kFloatLanes;
  static constexpr bool kWidens = false, kPacks = false;
  SIMD static INLINE Floats LoadVector(const float* from) { return Load(from); }
  SIMD static INLINE Floats LoadVector(const float* from, int count) { return Load(from, FirstLanes(count)); }
  SIMD static INLINE Floats MultiplyAdd(Floats x, Floats y, Floats sum) { return ::MultiplyAdd(x, y, sum); }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kLanes = 2 * kFloatLanes;
#ifdef HAS_AMX
  static constexpr bool kPacks = true;
#else
  static constexpr bool kPacks = false;
#endif
#ifdef HAS_BF16_DOT
  using Row = uint16_t;
  static constexpr bool kWidens = false;
  SIMD static INLINE Floats LoadVector(const uint16_t* from) { return _mm512_castsi512_ps(LoadPairs(from)); }
  SIMD static INLINE Floats LoadVector(const uint16_t* from, int count) {
    return _mm512_castsi512_ps(LoadPairs(from, count));
  }
  SIMD static INLINE Floats MultiplyAdd(Floats x, Floats y, Floats sum) { return MultiplyAddPairs(x, y, sum); }
#else
  using Row = float;
  static constexpr bool kWidens = true;
#endif
};

// e^x with the constants of Cephes' expf; 0 or infinity where the result has no exponent in float32.
SIMD INLINE Floats Exp(Floats x) {
  x = Min(Set(104.0f), Max(Set(-104.0f), x));
  const Floats n = Round(x * Set(1.44269504088896341f));
  x = NegatedMultiplyAdd(n, Set(0.693359375f), x);
  x = NegatedMultiplyAdd(n, Set(-2.12194440e-4f), x);
  Floats y = Set(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    y = MultiplyAdd(y, x, Set(c));
  }
  return TimesPowerOfTwo(MultiplyAdd(y, x * x, x) + Set(1.0f), n);
}

// x / (1 + e^-x).
SIMD INLINE Floats Silu(Floats x) { return x / (Set(1.0f) + Exp(Set(0.0f) - x)); }

// A value rounded to the type of an element.
SIMD INLINE Floats RoundedTo(const float*, Floats x) { return x; }
SIMD INLINE Floats RoundedTo(const uint16_t*, Floats x) { return Rounded(x); }

// Call run(Float32()) or run(BFloat16()).
template <class Run>
void WithType(Float dtype, const Run& run) {
  if (dtype == Float::kFloat32) {
    run(Float32());
  } else {
    run(BFloat16());
  }
}

}  // namespace
