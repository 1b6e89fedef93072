// The rows of each group times that group's weight: see ../native.py and grouped_matmul.h.

#if defined(__x86_64__) && defined(__GNUC__)

#include "grouped_matmul.h"

namespace {

template <class Type, class Result>
void MultiplyGroups(ffi::ThreadPool& pool, Rows<const typename Type::Element> x, int64_t num_rows,
                    const typename Type::Element* weights, ffi::AnyBuffer::Dimensions shape, const int32_t* sizes,
                    Result* y) {
  const int64_t num_features = shape[1], num_inputs = shape[2];
  const auto groups = NonEmptyGroups(sizes, shape[0], num_rows);
  const auto weight = [=](const Block& block) {
    return weights + (block.group.index * num_features + block.begin) * num_inputs;
  };
  ParallelForBlocks<typename Type::Element>(
      pool, groups, num_features, num_inputs, [=](const Block& block, const Block* next) {
        const Group& group = block.group;
        MultiplyBlock<Type, Result>({x[group.first_row], x.stride}, group.num_rows, weight(block), num_inputs,
                                    {y + group.first_row * num_features + block.begin, num_features},
                                    block.end - block.begin, next == nullptr ? nullptr : weight(*next));
      });
}

ffi::Error GroupedMatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::Buffer<ffi::S32> sizes,
                             ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> scratch) {
  const auto dtype = x.element_type(), result = y->element_type();
  const auto rows = x.dimensions(), shape = weights.dimensions();
  if (rows.size() != 2 || shape.size() != 3 || rows[1] != shape[2] || shape[1] < kTileFeatures ||
      weights.element_type() != dtype || static_cast<int64_t>(sizes.element_count()) != shape[0]) {
    return ffi::Error::InvalidArgument(
        "grouped_matmul takes rows [R, C], weights [E, O, C] of the same type with O >= 4, and sizes [E]");
  }
  const auto multiply = [&](auto float_type, auto* to) {
    using Type = decltype(float_type);
    using Element = typename Type::Element;
    MultiplyGroups<Type>(pool, WithPaddedStride<Element>(pool, x, scratch), rows[0],
                         static_cast<const Element*>(weights.untyped_data()), shape, sizes.typed_data(), to);
    return ffi::Error::Success();
  };
  if (dtype == ffi::F32 && result == ffi::F32) return multiply(Float32(), static_cast<float*>(y->untyped_data()));
  if (dtype == ffi::BF16 && result == ffi::F32) return multiply(BFloat16(), static_cast<float*>(y->untyped_data()));
  if (dtype == ffi::BF16 && result == ffi::BF16) return multiply(BFloat16(), static_cast<uint16_t*>(y->untyped_data()));
  return ffi::Error::InvalidArgument("grouped_matmul takes float32 to float32, or bfloat16 to float32 or bfloat16");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmul, GroupedMatmulImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// One bit per feature, in the order of FEATURES in ../native.py.
extern "C" int ProcessorFeatures() {
  return (__builtin_cpu_supports("avx512f") != 0) | (__builtin_cpu_supports("avx512bw") != 0) << 1 |
         (__builtin_cpu_supports("avx512dq") != 0) << 2 | (__builtin_cpu_supports("avx512vl") != 0) << 3 |
         (__builtin_cpu_supports("avx512bf16") != 0) << 4;
}

#else

extern "C" int ProcessorFeatures() { return 0; }

#endif
