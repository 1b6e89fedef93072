// Vectors of 4 float32, with NEON on 64-bit ARM processors.

#pragma once

#include <arm_neon.h>

namespace {

using Floats = float32x4_t;
constexpr int kFloatLanes = 4;
constexpr int kRegisters = 32;

// The first lanes of a register; the others are loaded as 0 and not stored.
struct Lanes {
  int count;
};
INLINE Lanes FirstLanes(int64_t count) { return {static_cast<int>(std::clamp<int64_t>(count, 0, kFloatLanes))}; }

INLINE Floats Set(float x) { return vdupq_n_f32(x); }
INLINE float First(Floats x) { return vgetq_lane_f32(x, 0); }
INLINE Floats MultiplyAdd(Floats x, Floats y, Floats sum) { return vfmaq_f32(sum, x, y); }
INLINE Floats NegatedMultiplyAdd(Floats x, Floats y, Floats sum) { return vfmsq_f32(sum, x, y); }
INLINE Floats MultiplySubtract(Floats x, Floats y, Floats z) { return vfmaq_f32(vnegq_f32(z), x, y); }
INLINE Floats Max(Floats x, Floats y) { return vmaxq_f32(x, y); }
INLINE Floats Min(Floats x, Floats y) { return vminq_f32(x, y); }
INLINE Floats Round(Floats x) { return vrndnq_f32(x); }
// x · 2^n, for integers n between -252 and 254: in two steps, as 2^n may be no float32.
INLINE Floats TimesPowerOfTwo(Floats x, Floats n) {
  const int32x4_t power = vcvtq_s32_f32(n), half = vshrq_n_s32(power, 1);
  const auto exponent = [](int32x4_t p) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(p, vdupq_n_s32(127)), 23)); };
  return x * exponent(half) * exponent(vsubq_s32(power, half));
}
INLINE float Sum(Floats x) { return vaddvq_f32(x); }
INLINE float Largest(Floats x) { return vmaxvq_f32(x); }

INLINE uint32x4_t RoundedWords(Floats x) {  // the upper halves are the rounded bits
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
INLINE Floats Rounded(Floats x) { return vreinterpretq_f32_u32(vandq_u32(RoundedWords(x), vdupq_n_u32(0xffff0000))); }
INLINE Floats Load(const float* from) { return vld1q_f32(from); }
INLINE Floats Load(const uint16_t* from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }
template <class Element>
INLINE Floats Load(const Element* from, Lanes lanes) {
  if (lanes.count == kFloatLanes) return Load(from);
  Element elements[kFloatLanes] = {};
  for (int i = 0; i < lanes.count; ++i) elements[i] = from[i];
  return Load(elements);
}
INLINE void Store(Floats x, float* to) { vst1q_f32(to, x); }
INLINE void Store(Floats x, uint16_t* to) { vst1_u16(to, vshrn_n_u32(RoundedWords(x), 16)); }
template <class Element>
INLINE void Store(Floats x, Element* to, Lanes lanes) {
  if (lanes.count == kFloatLanes) return Store(x, to);
  Element elements[kFloatLanes];
  Store(x, elements);
  for (int i = 0; i < lanes.count; ++i) to[i] = elements[i];
}

// 4 bytes as numbers.
INLINE uint8x8_t Load4(const void* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return vreinterpret_u8_u32(vdup_n_u32(word));
}
INLINE Floats FromBytes(uint8x8_t bytes) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes)))); }
INLINE Floats LoadBytes(const int8_t* from) {
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(Load4(from))))));
}
// Part `part` of a run of 32 values of 4 bits: those in the low halves of its 16 bytes come first.
INLINE Floats LoadNibbles(const uint8_t* run, int part) {
  const uint8x8_t bytes = Load4(run + part % 4 * kFloatLanes);
  return FromBytes(part < 4 ? vand_u8(bytes, vdup_n_u8(15)) : vshr_n_u8(bytes, 4));
}
INLINE Floats SetFloat16(uint16_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))); }
INLINE Floats RoundedToFloat16(Floats x) { return vcvt_f32_f16(vcvt_f16_f32(x)); }

// The even and the odd ones of 8 bfloat16, of which the first `count` are loaded.
INLINE uint32x4_t LoadPairs(const uint16_t* from) { return vreinterpretq_u32_u16(vld1q_u16(from)); }
INLINE uint32x4_t LoadPairs(const uint16_t* from, int count) {
  uint16_t elements[2 * kFloatLanes] = {};
  for (int i = 0; i < count; ++i) elements[i] = from[i];
  return LoadPairs(elements);
}
INLINE Floats Evens(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
INLINE Floats Odds(uint32x4_t pairs) { return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000))); }

// x where begin <= first + lane < end, else -infinity.
INLINE Floats KeepRange(Floats x, int first, int begin, int end) {
  const int32_t lanes[] = {0, 1, 2, 3};
  const int32x4_t position = vaddq_s32(vdupq_n_s32(first), vld1q_s32(lanes));
  const uint32x4_t inside = vandq_u32(vcgeq_s32(position, vdupq_n_s32(begin)), vcltq_s32(position, vdupq_n_s32(end)));
  return vbslq_f32(inside, x, vdupq_n_f32(-std::numeric_limits<float>::infinity()));
}

// Transpose kFloatLanes × kFloatLanes words.
INLINE void Transpose(Floats (&x)[4]) {
  const float32x4x2_t ab = vtrnq_f32(x[0], x[1]), cd = vtrnq_f32(x[2], x[3]);
  x[0] = vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
  x[1] = vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
  x[2] = vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
  x[3] = vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
}

// Store the sums of the elements of each of four vectors.
template <class Element>
INLINE void StoreSums(const Floats (&x)[4], Element* to) {
  Store(vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])), to);
}

INLINE void Prefetch(const char* from) { __builtin_prefetch(from, 0, 2); }

// Denormal numbers as zeros, as long as an object lives.
class FlushDenormals {
 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | 1ull << 24));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
};

}  // namespace
