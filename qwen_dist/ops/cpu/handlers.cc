// The functions that XLA calls: they check the arguments and call the build of the kernels that the attribute `build` names.
// See ../native.py.

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// The builds in the order of BUILDS in ../native_library.py; null if they are for another kind of processor.
const Kernels* const kBuilds[] = {
#if defined(HAS_AMX_COMPILER)
    &kAmxBf16, &kAvx512Bf16, &kAvx512, &kAvx2, nullptr
#elif defined(__x86_64__) && defined(__GNUC__)
    nullptr, &kAvx512Bf16, &kAvx512, &kAvx2, nullptr
#elif defined(__aarch64__) && defined(__GNUC__)
    nullptr, nullptr, nullptr, nullptr, &kNeon
#else
    nullptr, nullptr, nullptr, nullptr, nullptr
#endif
};
constexpr int64_t kNumBuilds = sizeof(kBuilds) / sizeof(*kBuilds);

Pool PoolOf(ffi::ThreadPool& pool) {
  return {&pool, pool.num_threads(), [](void* to, std::function<void()> task) {
            static_cast<ffi::ThreadPool*>(to)->Schedule(std::move(task));
          }};
}

bool IsFloat(ffi::DataType dtype) { return dtype == ffi::F32 || dtype == ffi::BF16; }
Float FloatOf(ffi::DataType dtype) { return dtype == ffi::F32 ? Float::kFloat32 : Float::kBFloat16; }
template <class Buffer>
int64_t Count(const Buffer& buffer) { return static_cast<int64_t>(buffer.element_count()); }

// The scratch for the rows of a product, if it is what the build needs for [num_rows, num_inputs] of a type: it may be
// empty, unless 16-bit floats are widened, packed, or reordered because the weight is quantised.
bool GetScratch(const Kernels& kernels, ffi::DataType dtype, int64_t num_rows, int64_t num_inputs, ffi::AnyBuffer buffer,
                Scratch* scratch, bool is_quantized = false) {
  const bool is_wide = kernels.widens && dtype == ffi::BF16;
  const bool is_packed = kernels.packs && !IsPackedForm(num_rows, num_inputs);
  const bool is_needed = dtype == ffi::BF16 && (is_wide || is_packed || is_quantized);
  const auto shape = buffer.dimensions();
  const int64_t multiple = !is_needed ? 1 : is_quantized ? kStepInputs : kWideMultiple;
  const int64_t of_multiple = is_needed && is_quantized ? kStepInputsBytes / (is_wide ? 4 : 2) : multiple;
  const int64_t least = (num_inputs + multiple - 1) / multiple * of_multiple;
  if (shape.size() != 2 || shape[1] < least || buffer.element_type() != (is_wide ? ffi::F32 : dtype)) return false;
  const bool is_empty = shape[0] == 0;
  if (is_empty ? is_needed && num_rows > 0 : shape[0] != num_rows) return false;
  *scratch = {is_empty ? nullptr : buffer.untyped_data(), shape[1]};
  return true;
}

ffi::Error NoBuild() { return ffi::Error::InvalidArgument("build is not the number of a build for this kind of processor"); }
const Kernels* Build(int64_t build) { return build >= 0 && build < kNumBuilds ? kBuilds[build] : nullptr; }

ffi::Error GroupedMatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::Buffer<ffi::S32> sizes,
                             ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> scratch, int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto dtype = x.element_type(), result = y->element_type();
  const auto rows = x.dimensions(), shape = weights.dimensions();
  Scratch rows_scratch;
  if (rows.size() != 2 || shape.size() != 3 || rows[1] != shape[2] || shape[1] < kTileFeatures ||
      weights.element_type() != dtype || Count(sizes) != shape[0] || Count(*y) != rows[0] * shape[1] ||
      !GetScratch(*kernels, dtype, rows[0], rows[1], *scratch, &rows_scratch)) {
    return ffi::Error::InvalidArgument(
        "grouped_matmul takes rows [R, C], weights [E, O, C] of the same type with O >= 4, and sizes [E]");
  }
  if (!IsFloat(dtype) || !IsFloat(result) || (dtype == ffi::F32 && result != ffi::F32)) {
    return ffi::Error::InvalidArgument("grouped_matmul takes float32 to float32, or bfloat16 to float32 or bfloat16");
  }
  kernels->grouped_matmul(PoolOf(pool),
                          {FloatOf(dtype), FloatOf(result), rows[0], shape[0], shape[1], shape[2], x.untyped_data(),
                           weights.untyped_data(), sizes.typed_data(), y->untyped_data(), rows_scratch});
  return ffi::Error::Success();
}

ffi::Error QuantizedShapes() {
  return ffi::Error::InvalidArgument(
      "quantized_matmul takes rows [R, C], values [E, O, C / 32, 32] in int8 or [E, O, C / 32, 16] bytes with O >= 4, E * O * G "
      "scales, as many zero points or none, and sizes [E]; E may be left out for one weight");
}

ffi::Error QuantizedMatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values, ffi::AnyBuffer scales,
                               ffi::Buffer<ffi::S8> zero_points, ffi::Buffer<ffi::S32> sizes, ffi::Result<ffi::AnyBuffer> y,
                               ffi::Result<ffi::AnyBuffer> scratch, int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto dtype = x.element_type(), result = y->element_type(), scale = scales.element_type();
  const auto rows = x.dimensions(), shape = values.dimensions();
  const bool is_int4 = values.element_type() == ffi::U8;
  Scratch rows_scratch;
  // The values are [E, O, runs, width] or, of one weight, [O, runs, width].
  const size_t first = shape.size() == 4 ? 1 : 0;
  if (rows.size() != 2 || shape.size() != 3 + first) return QuantizedShapes();
  const int64_t num_weights = first == 1 ? shape[0] : 1, num_features = shape[first], num_runs = shape[first + 1];
  const int64_t width = shape[first + 2], num_rows = num_weights * num_features;
  const int64_t num_groups = num_rows == 0 ? 0 : Count(scales) / num_rows;
  if (rows[1] != num_runs * kRun || width != (is_int4 ? kRun / 2 : kRun) || num_features < kTileFeatures ||
      num_groups == 0 || Count(scales) != num_rows * num_groups || num_runs % num_groups != 0 ||
      (Count(zero_points) != 0 && Count(zero_points) != Count(scales)) || Count(sizes) != num_weights ||
      Count(*y) != rows[0] * num_features || !(is_int4 || values.element_type() == ffi::S8) ||
      !(scale == ffi::F32 || scale == ffi::BF16 || scale == ffi::F16) ||
      !GetScratch(*kernels, dtype, rows[0], rows[1], *scratch, &rows_scratch, true)) {
    return QuantizedShapes();
  }
  if (!IsFloat(dtype) || !IsFloat(result) || (dtype == ffi::F32 && result != ffi::F32)) {
    return ffi::Error::InvalidArgument("quantized_matmul takes float32 to float32, or bfloat16 to float32 or bfloat16");
  }
  const ScaleType scale_type = scale == ffi::F32    ? ScaleType::kFloat32
                               : scale == ffi::BF16 ? ScaleType::kBFloat16
                                                    : ScaleType::kFloat16;
  kernels->quantized_matmul(
      PoolOf(pool), {FloatOf(dtype), FloatOf(result), is_int4 ? Encoding::kInt4 : Encoding::kInt8, scale_type, rows[0],
                     num_weights, num_features, rows[1], rows[1] / num_groups, x.untyped_data(), values.untyped_data(),
                     scales.untyped_data(), Count(zero_points) == 0 ? nullptr : zero_points.typed_data(),
                     sizes.typed_data(), y->untyped_data(), rows_scratch});
  return ffi::Error::Success();
}

ffi::Error ExpertsImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> chosen, ffi::Buffer<ffi::F32> scores,
                       ffi::AnyBuffer gate_up, ffi::AnyBuffer down, ffi::Result<ffi::AnyBuffer> mixed,
                       ffi::Result<ffi::AnyBuffer> outputs, ffi::Result<ffi::AnyBuffer> hidden,
                       ffi::Result<ffi::AnyBuffer> scratch, ffi::Result<ffi::AnyBuffer> hidden_scratch, int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto x_shape = x.dimensions(), choices = chosen.dimensions(), shape = down.dimensions();
  const auto hidden_shape = hidden->dimensions();
  const auto dtype = x.element_type();
  const bool is_packed = kernels->packs && dtype == ffi::BF16;  // each token once for each of its experts
  Scratch rows, hidden_rows;
  if (x_shape.size() != 2 || choices.size() != 2 || shape.size() != 3 || gate_up.dimensions().size() != 3 ||
      choices[0] != x_shape[0] || Count(scores) != Count(chosen) || shape[1] != x_shape[1] ||
      gate_up.dimensions()[1] != 2 * shape[2] || gate_up.dimensions()[2] != shape[1] || shape[1] % kTileFeatures != 0 ||
      shape[2] % kTileFeatures != 0 || gate_up.element_type() != dtype || down.element_type() != dtype ||
      hidden_shape.size() != 2 || hidden_shape[0] != Count(chosen) || hidden_shape[1] < shape[2] ||
      !GetScratch(*kernels, dtype, is_packed ? Count(chosen) : x_shape[0], shape[1], *scratch, &rows) ||
      !GetScratch(*kernels, dtype, Count(chosen), shape[2], *hidden_scratch, &hidden_rows)) {
    return ffi::Error::InvalidArgument(
        "experts takes tokens [T, D], chosen experts and scores [T, K], and weights [E, 2F, D] and [E, D, F] of the same "
        "type; D and F are multiples of 4");
  }
  if (!IsFloat(dtype)) return ffi::Error::InvalidArgument("experts takes float32 or bfloat16");
  kernels->experts(PoolOf(pool), {FloatOf(dtype), x_shape[0], choices[1], shape[0], shape[1], shape[2], x.untyped_data(),
                                  gate_up.untyped_data(), down.untyped_data(), chosen.typed_data(), scores.typed_data(),
                                  mixed->untyped_data(), outputs->untyped_data(),
                                  {hidden->untyped_data(), hidden_shape[1]}, rows, hidden_rows});
  return ffi::Error::Success();
}

ffi::Error SwiGluImpl(ffi::ThreadPool pool, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> hidden,
                      int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto dtype = gate.element_type();
  if (Count(up) != Count(gate) || up.element_type() != dtype || !IsFloat(dtype)) {
    return ffi::Error::InvalidArgument("swiglu takes gate and up of the same size and type, float32 or bfloat16");
  }
  kernels->swiglu(PoolOf(pool),
                  {FloatOf(dtype), Count(gate), gate.untyped_data(), up.untyped_data(), hidden->untyped_data()});
  return ffi::Error::Success();
}

ffi::Error RotateImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                      ffi::Result<ffi::AnyBuffer> y, int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto shape = x.dimensions();  // [B, T, N, H]; the angles are [B, T, H / 2]
  const int64_t num_tokens = shape.size() == 4 ? shape[0] * shape[1] : 0, half = shape.size() == 4 ? shape[3] / 2 : 0;
  if (shape.size() != 4 || shape[3] % 2 != 0 || Count(cos) != num_tokens * half || Count(sin) != num_tokens * half ||
      !IsFloat(x.element_type())) {
    return ffi::Error::InvalidArgument(
        "rotate takes heads [B, T, N, H] in float32 or bfloat16 with even H, and cosines and sines [B, T, H / 2]");
  }
  kernels->rotate(PoolOf(pool), {FloatOf(x.element_type()), num_tokens, shape[2], shape[3], x.untyped_data(),
                                 cos.typed_data(), sin.typed_data(), y->untyped_data()});
  return ffi::Error::Success();
}

ffi::Error ShortConvolutionImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer before, ffi::AnyBuffer weight,
                                ffi::Result<ffi::AnyBuffer> y, int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto shape = x.dimensions(), taps = weight.dimensions();  // [B, T, G, C], [W, G, C]
  const auto dtype = x.element_type();
  if (shape.size() != 4 || taps.size() != 3 || taps[0] < 1 || taps[0] > kMaxTaps || taps[1] != shape[2] ||
      taps[2] != shape[3] || dtype != before.element_type() || dtype != weight.element_type() || !IsFloat(dtype) ||
      Count(before) != shape[0] * (taps[0] - 1) * shape[2] * shape[3]) {
    return ffi::Error::InvalidArgument(
        "short_convolution takes tokens [B, T, G, C], those before them [B, W - 1, G, C] and a weight [W, G, C] of at "
        "most 8 taps, all float32 or all bfloat16");
  }
  kernels->short_convolution(PoolOf(pool),
                             {FloatOf(dtype), shape[0], shape[1], taps[0], shape[2] * shape[3], x.untyped_data(),
                              before.untyped_data(), weight.untyped_data(), y->untyped_data()});
  return ffi::Error::Success();
}

ffi::Error PagedAttentionImpl(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                              ffi::Buffer<ffi::U16> key_scales, ffi::Buffer<ffi::U16> value_scales,
                              ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::S32> pages,
                              ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> num_entries,
                              ffi::Result<ffi::AnyBuffer> out, float scale, int64_t window, int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto q_shape = q.dimensions(), shape = keys.dimensions();  // [B, T, N, H], [1, P, K, S, H]
  if (q_shape.size() != 4 || shape.size() != 5 || shape[0] != 1 || shape[3] != kPageSize || shape[4] != q_shape[3] ||
      q_shape[3] % kHeadMultiple != 0 || q_shape[2] % shape[2] != 0 || Count(values) != Count(keys)) {
    return ffi::Error::InvalidArgument(
        "paged_attention takes queries [B, T, N, H] and pages [1, P, K, 64, H]; N is a multiple of K, and H of 16");
  }
  const bool is_wide = q.element_type() == ffi::F32, is_int8 = keys.element_type() == ffi::S8;
  const int64_t num_scales = is_int8 ? Count(keys) / kScaled : 0;
  if ((!is_wide && q.element_type() != ffi::BF16) || keys.element_type() != values.element_type() ||
      (!is_int8 && keys.element_type() != (is_wide ? ffi::F32 : ffi::U16)) || Count(key_scales) != num_scales ||
      Count(value_scales) != num_scales) {
    return ffi::Error::InvalidArgument(
        "paged_attention takes float32 or bfloat16 queries, and pages of their type (the bits of bfloat16 in uint16) or int8 "
        "with a scale, the bits of bfloat16, for every 16 values");
  }
  const int64_t count = std::min<int64_t>(num_entries.typed_data()[0], Count(rows));
  kernels->paged_attention(PoolOf(pool), {FloatOf(q.element_type()), q_shape[0], q_shape[1], shape[2],
                                          q_shape[2] / shape[2], q_shape[3], shape[1], count, q.untyped_data(),
                                          keys.untyped_data(), values.untyped_data(),
                                          is_int8 ? key_scales.typed_data() : nullptr,
                                          is_int8 ? value_scales.typed_data() : nullptr, positions.typed_data(),
                                          rows.typed_data(), pages.typed_data(), starts.typed_data(), scale, window,
                                          out->untyped_data()});
  return ffi::Error::Success();
}

ffi::Error DeltaRuleImpl(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::F32> gates, ffi::Buffer<ffi::F32> betas, ffi::Buffer<ffi::S32> slots,
                         ffi::Buffer<ffi::S32> written_slots, ffi::Buffer<ffi::PRED> is_start, ffi::Buffer<ffi::PRED> continues, ffi::Buffer<ffi::F32> states,
                         ffi::Result<ffi::Buffer<ffi::F32>> outputs, ffi::Result<ffi::Buffer<ffi::F32>> new_states,
                         ffi::Result<ffi::Buffer<ffi::F32>> prepared, int64_t build) {
  const Kernels* kernels = Build(build);
  if (kernels == nullptr) return NoBuild();
  const auto key = k.dimensions(), value = v.dimensions(), state = states.dimensions();
  const auto dtype = v.element_type();
  const bool has_sizes = key.size() == 4 && value.size() == 5 && state.size() == 6 && state[0] == 1 &&
                         std::equal(key.begin(), key.begin() + 3, value.begin()) && state[2] == value[2] &&
                         state[3] == value[3] && state[4] == key[3] && state[5] == value[4] && Count(q) == Count(k) &&
                         Count(k) > 0 && Count(v) > 0;
  if (!has_sizes || q.element_type() != dtype || k.element_type() != dtype || !IsFloat(dtype)) {
    return ffi::Error::InvalidArgument(
        "delta_rule takes queries and keys [B, T, G, K] and values [B, T, G, R, V] in float32 or bfloat16, and states "
        "[1, M, G, R, K, V] in float32");
  }
  const int64_t num_gates = Count(v) / value[4];
  if (Count(gates) != num_gates || Count(betas) != num_gates || Count(slots) != value[0] ||
      Count(written_slots) != value[0] || Count(is_start) != value[0] || Count(continues) != value[0] ||
      Count(*outputs) != Count(v) || new_states->untyped_data() != states.untyped_data() ||
      Count(*prepared) != Count(k) / key[3] * PreparedStride(key[3])) {
    return ffi::Error::InvalidArgument("delta_rule takes gates and step sizes [B, T, G, R] and rows [B], in place");
  }
  kernels->delta_rule(PoolOf(pool), {FloatOf(dtype), value[0], value[1], value[2], value[3], key[3], value[4], state[1],
                                     q.untyped_data(), k.untyped_data(), v.untyped_data(), gates.typed_data(),
                                     betas.typed_data(), slots.typed_data(), written_slots.typed_data(),
                                     is_start.typed_data(), continues.typed_data(), outputs->typed_data(),
                                     new_states->typed_data(), prepared->typed_data()});
  return ffi::Error::Success();
}

thread_local bool is_pool_thread = false;

// Return a handler that does the same, after which XLA continues in a thread of its pool. XLA starts a program in another
// thread, from which each product has to wake threads of the pool. Among the threads of the pool, those without work look
// for some before they sleep, so they are often awake.
template <class... Arguments>
auto ContinueOnPool(ffi::Error (*handler)(ffi::ThreadPool, Arguments...)) {
  return [handler](ffi::ThreadPool pool, Arguments... arguments) {
    ffi::Promise promise;
    ffi::Future future(promise);
    const ffi::Error error = handler(pool, arguments...);
    if (!error.success()) {
      promise.SetError(error);
    } else if (is_pool_thread) {
      promise.SetAvailable();
    } else {
      pool.Schedule([promise]() mutable {
        is_pool_thread = true;
        promise.SetAvailable();
      });
    }
    return future;
  };
}

using Any = ffi::AnyBuffer;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U16 = ffi::Buffer<ffi::U16>;
using Pred = ffi::Buffer<ffi::PRED>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMatmul, ContinueOnPool(GroupedMatmulImpl),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<S32>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Attr<int64_t>("build"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizedMatmul, ContinueOnPool(QuantizedMatmulImpl),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<S32>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Attr<int64_t>("build"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Experts, ExpertsImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Attr<int64_t>("build"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SwiGlu, SwiGluImpl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Ret<Any>().Attr<int64_t>("build"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Rotate, RotateImpl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<F32>().Arg<F32>().Ret<Any>().Attr<int64_t>("build"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ShortConvolution, ShortConvolutionImpl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Any>().Arg<Any>().Arg<Any>().Ret<Any>().Attr<int64_t>("build"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedAttention, PagedAttentionImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<U16>()
                                  .Arg<U16>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Ret<Any>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("build"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeltaRuleInSlots, DeltaRuleImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<Pred>()
                                  .Arg<Pred>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Attr<int64_t>("build"));
