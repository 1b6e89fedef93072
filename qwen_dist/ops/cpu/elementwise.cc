// Elementwise operations that are slow in XLA: SwiGLU and rotary embedding, whose angles XLA would compute again for each
// head of each layer. See ../native.py.

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
  return ffi::Error::InvalidArgument("swiglu and rotate take float32 or bfloat16");
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

}  // namespace

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
