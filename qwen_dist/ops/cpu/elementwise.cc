// What is computed number by number and takes XLA too long: the gate of an MLP, and the rotation of positions, whose angles
// XLA would take anew in each layer for each head. See ../native.py.

#if defined(__x86_64__) && defined(__GNUC__)

#include "gate.h"
#include "simd.h"

namespace {

constexpr int64_t kNumbersOfJob = 16 << 10;

// Calls work(of, first, last) with slices of `number` things of `size` numbers each; `of` is the type of x.
template <class Work>
ffi::Error ForEachSlice(ffi::ThreadPool& pool, ffi::DataType type, int64_t number, int64_t size, const Work& work) {
  const int64_t slice = std::max<int64_t>(1, kNumbersOfJob / std::max<int64_t>(1, size));
  const auto run = [&](auto of) {
    ForEach(pool, (number + slice - 1) / slice,
            [&](int64_t job) { work(of, job * slice, std::min(number, (job + 1) * slice)); });
    return ffi::Error::Success();
  };
  if (type == ffi::F32) return run(Float32());
  if (type == ffi::BF16) return run(BFloat16());
  return ffi::Error::InvalidArgument("float32 or bfloat16 are wanted");
}

template <class Element, class Buffer>
Element* Data(Buffer&& buffer) {
  return static_cast<Element*>(buffer.untyped_data());
}

ffi::Error GateAll(ffi::ThreadPool pool, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> hidden) {
  if (up.element_count() != gate.element_count() || up.element_type() != gate.element_type()) {
    return ffi::Error::InvalidArgument("gate and up of the same shape and type are wanted");
  }
  const int64_t number = gate.element_count();
  return ForEachSlice(pool, gate.element_type(), number, 1, [&](auto of, int64_t first, int64_t last) {
    using Element = typename decltype(of)::Element;
    Gate(Data<const Element>(gate) + first, Data<const Element>(up) + first, last - first, Data<Element>(*hidden) + first);
  });
}

// One token's heads of `width` numbers: the pairs (i, i + width / 2) of each are turned.
template <class Element>
AVX512 void Turn(const Element* x, const float* cos, const float* sin, int64_t heads, int64_t width, Element* y) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += kFloats) {
    const __mmask16 first = First(half - i);
    const __m512 c = Floats(cos + i, first), s = Floats(sin + i, first);
    for (int64_t at = i; at < heads * width; at += width) {
      const __m512 a = Floats(x + at, first), b = Floats(x + at + half, first);
      Store(_mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), y + at, first);
      Store(_mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), y + at + half, first);
    }
  }
}

ffi::Error TurnAll(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                   ffi::Result<ffi::AnyBuffer> y) {
  const auto shape = x.dimensions();  // [B, T, N, H], and angles [B, T, H / 2]
  const int64_t tokens = shape.size() == 4 ? shape[0] * shape[1] : 0, half = shape.size() == 4 ? shape[3] / 2 : 0;
  if (shape.size() != 4 || shape[3] % 2 != 0 || static_cast<int64_t>(cos.element_count()) != tokens * half ||
      static_cast<int64_t>(sin.element_count()) != tokens * half) {
    return ffi::Error::InvalidArgument("heads [B, T, N, H], and cosines and sines [B, T, H / 2], are wanted");
  }
  const int64_t heads = shape[2], width = shape[3], size = heads * width;
  return ForEachSlice(pool, x.element_type(), tokens, size, [&](auto of, int64_t first, int64_t last) {
    using Element = typename decltype(of)::Element;
    for (int64_t t = first; t < last; ++t) {
      Turn(Data<const Element>(x) + t * size, cos.typed_data() + t * half, sin.typed_data() + t * half, heads, width,
           Data<Element>(*y) + t * size);
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Gated, GateAll,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(Rotate, TurnAll,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

#endif
