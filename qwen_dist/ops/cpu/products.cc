// Rows of each group times that group's weight: see ../native.py and products.h.

#if defined(__x86_64__) && defined(__GNUC__)

#include "products.h"

namespace {

template <class Type, class Result>
void Multiply(ffi::ThreadPool& pool, Rows<const typename Type::Element> x, int64_t num_rows,
              const typename Type::Element* weights, ffi::AnyBuffer::Dimensions shape, const int32_t* sizes, Result* y) {
  const int64_t outputs = shape[1], inputs = shape[2];
  const auto groups = Groups(sizes, shape[0], num_rows);
  const auto weight = [=](const Part& part) { return weights + (part.group.index * outputs + part.first) * inputs; };
  ForEachPart<typename Type::Element>(pool, groups, outputs, inputs, [=](const Part& part, const Part* next) {
    const Group& group = part.group;
    Block<Type, Result>({x[group.first], x.size}, group.rows, weight(part), inputs,
                        {y + group.first * outputs + part.first, outputs}, part.last - part.first,
                        next == nullptr ? nullptr : weight(*next));
  });
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::Buffer<ffi::S32> sizes,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> spaced) {
  const auto type = x.element_type(), result = y->element_type();
  const auto rows = x.dimensions(), shape = weights.dimensions();
  if (rows.size() != 2 || shape.size() != 3 || rows[1] != shape[2] || shape[1] < kFeatures || weights.element_type() != type ||
      static_cast<int64_t>(sizes.element_count()) != shape[0]) {
    return ffi::Error::InvalidArgument("rows [R, C], weights [E, O, C] of the same type with O >= 4, and sizes [E] are wanted");
  }
  const auto multiply = [&](auto of, auto* to) {
    using Type = decltype(of);
    using Element = typename Type::Element;
    Multiply<Type>(pool, Spaced<Element>(pool, x, spaced), rows[0], static_cast<const Element*>(weights.untyped_data()), shape,
                   sizes.typed_data(), to);
    return ffi::Error::Success();
  };
  if (type == ffi::F32 && result == ffi::F32) return multiply(Float32(), static_cast<float*>(y->untyped_data()));
  if (type == ffi::BF16 && result == ffi::F32) return multiply(BFloat16(), static_cast<float*>(y->untyped_data()));
  if (type == ffi::BF16 && result == ffi::BF16) return multiply(BFloat16(), static_cast<uint16_t*>(y->untyped_data()));
  return ffi::Error::InvalidArgument("float32, or bfloat16 to float32 or bfloat16, are wanted");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// One bit a feature, in the order of FEATURES in ../native.py.
extern "C" int ProcessorFeatures() {
  return (__builtin_cpu_supports("avx512f") != 0) | (__builtin_cpu_supports("avx512bw") != 0) << 1 |
         (__builtin_cpu_supports("avx512dq") != 0) << 2 | (__builtin_cpu_supports("avx512vl") != 0) << 3 |
         (__builtin_cpu_supports("avx512bf16") != 0) << 4;
}

#else

extern "C" int ProcessorFeatures() { return 0; }

#endif
