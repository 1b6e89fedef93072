// Elementwise operations that are slow in XLA: SwiGLU, rotary embedding, whose angles XLA would compute again for each
// head of each layer, and the short convolution of a gated delta net.

#pragma once

#include "parallel.h"
#include "swiglu.h"

namespace {

constexpr int64_t kElementsPerJob = 16 << 10;

// Call work(float_type, begin, end) for slices of `count` items of `size` elements; float_type is Float32 or BFloat16.
template <class Work>
void ParallelForSlices(const Pool& pool, Float dtype, int64_t count, int64_t size, const Work& work) {
  const int64_t slice = std::max<int64_t>(1, kElementsPerJob / std::max<int64_t>(1, size));
  WithType(dtype, [&](auto float_type) {
    ParallelFor(pool, (count + slice - 1) / slice,
                [&](int64_t job) { work(float_type, job * slice, std::min(count, (job + 1) * slice)); });
  });
}

void SwiGlu(const Pool& pool, const SwiGluArguments& a) {
  ParallelForSlices(pool, a.dtype, a.count, 1, [&](auto float_type, int64_t begin, int64_t end) {
    using Element = typename decltype(float_type)::Element;
    SiluAndMul(static_cast<const Element*>(a.gate) + begin, static_cast<const Element*>(a.up) + begin, end - begin,
               static_cast<Element*>(a.hidden) + begin);
  });
}

// Rotate the pairs (i, i + head_dim / 2) of each head of one token.
template <class Element>
SIMD void RotateToken(const Element* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim,
                      Element* y) {
  const int64_t half = head_dim / 2;
  const auto step = [&](int64_t i, auto lanes) SIMD {
    const Floats c = Load(cos + i, lanes), s = Load(sin + i, lanes);
    for (int64_t offset = i; offset < num_heads * head_dim; offset += head_dim) {
      const Floats a = Load(x + offset, lanes), b = Load(x + offset + half, lanes);
      Store(MultiplySubtract(a, c, b * s), y + offset, lanes);
      Store(MultiplyAdd(b, c, a * s), y + offset + half, lanes);
    }
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= half; i += kFloatLanes) step(i, AllLanes());
  if (i < half) step(i, FirstLanes(half - i));
}

void Rotate(const Pool& pool, const RotateArguments& a) {
  const int64_t half = a.head_dim / 2, size = a.num_heads * a.head_dim;
  ParallelForSlices(pool, a.dtype, a.num_tokens, size, [&](auto float_type, int64_t begin, int64_t end) {
    using Element = typename decltype(float_type)::Element;
    for (int64_t t = begin; t < end; ++t) {
      RotateToken(static_cast<const Element*>(a.x) + t * size, a.cos + t * half, a.sin + t * half, a.num_heads, a.head_dim,
                  static_cast<Element*>(a.y) + t * size);
    }
  });
}

// silu of the weighted sum of a token and those before it, of which `tokens[0]` is the first. The sum is rounded, as in
// PyTorch.
template <class Element>
SIMD void ConvolveToken(const Element* const (&tokens)[kMaxTaps], const Element* weight, int64_t num_taps,
                        int64_t num_channels, Element* y) {
  const auto step = [&](int64_t i, auto lanes) SIMD {
    Floats sum = Set(0.0f);
    for (int64_t tap = 0; tap < num_taps; ++tap) {
      sum = MultiplyAdd(Load(tokens[tap] + i, lanes), Load(weight + tap * num_channels + i, lanes), sum);
    }
    Store(Silu(RoundedTo(y, sum)), y + i, lanes);
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= num_channels; i += kFloatLanes) step(i, AllLanes());
  if (i < num_channels) step(i, FirstLanes(num_channels - i));
}

void ShortConvolution(const Pool& pool, const ShortConvolutionArguments& a) {
  const int64_t size = a.num_channels;
  const auto convolve = [&](auto float_type, int64_t begin, int64_t end) {
    using Element = typename decltype(float_type)::Element;
    const auto *x = static_cast<const Element*>(a.x), *before = static_cast<const Element*>(a.before);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / a.num_tokens, first = index % a.num_tokens - (a.num_taps - 1);
      const Element* tokens[kMaxTaps] = {};
      for (int64_t tap = 0; tap < a.num_taps; ++tap) {
        const int64_t token = first + tap;
        tokens[tap] = token < 0 ? before + ((row + 1) * (a.num_taps - 1) + token) * size
                                : x + (row * a.num_tokens + token) * size;
      }
      ConvolveToken(tokens, static_cast<const Element*>(a.weight), a.num_taps, size,
                    static_cast<Element*>(a.y) + index * size);
    }
  };
  ParallelForSlices(pool, a.dtype, a.num_rows * a.num_tokens, size, convolve);
}

}  // namespace
