// Elementwise operations that are slow in XLA: SwiGLU, rotary embedding, whose angles XLA would compute again for each
// head of each layer, and the short convolution of a gated delta net. See ../native.py.

#if defined(__x86_64__) && defined(__GNUC__)

#include "simd.h"
#include "swiglu.h"

namespace {

constexpr int64_t kElementsPerJob = 16 << 10;

// Call work(float_type, begin, end) for slices of `count` items of `size` elements; float_type is Float32 or BFloat16.
template <class Work>
ffi::Error ParallelForSlices(ffi::ThreadPool& pool, ffi::DataType dtype, int64_t count, int64_t size, const Work& work) {
  const int64_t slice = std::max<int64_t>(1, kElementsPerJob / std::max<int64_t>(1, size));
  const auto run = [&](auto float_type) {
    ParallelFor(pool, (count + slice - 1) / slice,
                [&](int64_t job) { work(float_type, job * slice, std::min(count, (job + 1) * slice)); });
    return ffi::Error::Success();
  };
  if (dtype == ffi::F32) return run(Float32());
  if (dtype == ffi::BF16) return run(BFloat16());
  return ffi::Error::InvalidArgument("swiglu, rotate and short_convolution take float32 or bfloat16");
}

template <class Element, class Buffer>
Element* Data(Buffer&& buffer) {
  return static_cast<Element*>(buffer.untyped_data());
}

ffi::Error SwiGluImpl(ffi::ThreadPool pool, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> hidden) {
  if (up.element_count() != gate.element_count() || up.element_type() != gate.element_type()) {
    return ffi::Error::InvalidArgument("swiglu takes gate and up of the same size and type");
  }
  const int64_t count = gate.element_count();
  return ParallelForSlices(pool, gate.element_type(), count, 1, [&](auto float_type, int64_t begin, int64_t end) {
    using Element = typename decltype(float_type)::Element;
    SiluAndMul(Data<const Element>(gate) + begin, Data<const Element>(up) + begin, end - begin,
               Data<Element>(*hidden) + begin);
  });
}

// Rotate the pairs (i, i + head_dim / 2) of each head of one token.
template <class Element>
AVX512 void RotateToken(const Element* x, const float* cos, const float* sin, int64_t num_heads, int64_t head_dim,
                        Element* y) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += kFloatLanes) {
    const __mmask16 mask = LaneMask(half - i);
    const __m512 c = LoadFloats(cos + i, mask), s = LoadFloats(sin + i, mask);
    for (int64_t offset = i; offset < num_heads * head_dim; offset += head_dim) {
      const __m512 a = LoadFloats(x + offset, mask), b = LoadFloats(x + offset + half, mask);
      StoreFloats(_mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), y + offset, mask);
      StoreFloats(_mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), y + offset + half, mask);
    }
  }
}

ffi::Error RotateImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                      ffi::Result<ffi::AnyBuffer> y) {
  const auto shape = x.dimensions();  // [B, T, N, H]; the angles are [B, T, H / 2]
  const int64_t num_tokens = shape.size() == 4 ? shape[0] * shape[1] : 0, half = shape.size() == 4 ? shape[3] / 2 : 0;
  if (shape.size() != 4 || shape[3] % 2 != 0 || static_cast<int64_t>(cos.element_count()) != num_tokens * half ||
      static_cast<int64_t>(sin.element_count()) != num_tokens * half) {
    return ffi::Error::InvalidArgument("rotate takes heads [B, T, N, H] with even H, and cosines and sines [B, T, H / 2]");
  }
  const int64_t num_heads = shape[2], head_dim = shape[3], size = num_heads * head_dim;
  return ParallelForSlices(pool, x.element_type(), num_tokens, size, [&](auto float_type, int64_t begin, int64_t end) {
    using Element = typename decltype(float_type)::Element;
    for (int64_t t = begin; t < end; ++t) {
      RotateToken(Data<const Element>(x) + t * size, cos.typed_data() + t * half, sin.typed_data() + t * half, num_heads,
                  head_dim, Data<Element>(*y) + t * size);
    }
  });
}

constexpr int kMaxTaps = 8;

AVX512 INLINE __m512 Rounded(__m512 x, const float*) { return x; }
AVX512 INLINE __m512 Rounded(__m512 x, const uint16_t*) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// silu of the weighted sum of a token and those before it, of which `tokens[0]` is the first. The sum is rounded, as in
// PyTorch.
template <class Element>
AVX512 void ConvolveToken(const Element* const (&tokens)[kMaxTaps], const Element* weight, int64_t num_taps,
                          int64_t num_channels, Element* y) {
  for (int64_t i = 0; i < num_channels; i += kFloatLanes) {
    const __mmask16 mask = LaneMask(num_channels - i);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t tap = 0; tap < num_taps; ++tap) {
      sum = _mm512_fmadd_ps(LoadFloats(tokens[tap] + i, mask), LoadFloats(weight + tap * num_channels + i, mask), sum);
    }
    const __m512 x = Rounded(sum, y), one = _mm512_set1_ps(1.0f);
    StoreFloats(_mm512_div_ps(x, _mm512_add_ps(one, Exp(_mm512_sub_ps(_mm512_setzero_ps(), x)))), y + i, mask);
  }
}

ffi::Error ShortConvolutionImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer before, ffi::AnyBuffer weight,
                                ffi::Result<ffi::AnyBuffer> y) {
  const auto shape = x.dimensions(), taps = weight.dimensions();  // [B, T, G, C], [W, G, C]
  const bool is_form = shape.size() == 4 && taps.size() == 3 && taps[0] >= 1 && taps[0] <= kMaxTaps &&
                       taps[1] == shape[2] && taps[2] == shape[3] && x.element_type() == before.element_type() &&
                       x.element_type() == weight.element_type() &&
                       static_cast<int64_t>(before.element_count()) == shape[0] * (taps[0] - 1) * shape[2] * shape[3];
  if (!is_form) {
    return ffi::Error::InvalidArgument(
        "short_convolution takes tokens [B, T, G, C], those before them [B, W - 1, G, C] and a weight [W, G, C] of at "
        "most 8 taps, of one type");
  }
  const int64_t num_tokens = shape[1], num_taps = taps[0], size = shape[2] * shape[3];
  const auto convolve = [&](auto float_type, int64_t begin, int64_t end) {
    using Element = typename decltype(float_type)::Element;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / num_tokens, first = index % num_tokens - (num_taps - 1);
      const Element* tokens[kMaxTaps] = {};
      for (int64_t tap = 0; tap < num_taps; ++tap) {
        const int64_t token = first + tap;
        tokens[tap] = token < 0 ? Data<const Element>(before) + ((row + 1) * (num_taps - 1) + token) * size
                                : Data<const Element>(x) + (row * num_tokens + token) * size;
      }
      ConvolveToken(tokens, Data<const Element>(weight), num_taps, size, Data<Element>(*y) + index * size);
    }
  };
  return ParallelForSlices(pool, x.element_type(), shape[0] * num_tokens, size, convolve);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ShortConvolution, ShortConvolutionImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SwiGlu, SwiGluImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(Rotate, RotateImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

#endif
