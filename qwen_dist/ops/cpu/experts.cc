// A layer's experts, from the tokens to the weighted sums of their outputs: see ../native.py and grouped_matmul.h.
//
// Tokens are not copied into groups by expert: a tile reads its rows through an index and writes the results to their final
// places. silu(gate) · up is computed while both are still in the L2 cache.

#if defined(__x86_64__) && defined(__GNUC__)

#include "grouped_matmul.h"
#include "swiglu.h"

namespace {

constexpr int64_t kTokensPerJob = 8;  // of the weighted sums

// y = sum over k < count of scores[k] * x[k], vectors of `size` elements.
template <class Element>
AVX512 void WeightedSum(const Element* x, const float* scores, int64_t count, int64_t size, Element* y) {
  for (int64_t i = 0; i < size; i += kFloatLanes) {
    const __mmask16 mask = LaneMask(size - i);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; ++k) {
      sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[k]), LoadFloats(x + k * size + i, mask), sum);
    }
    StoreFloats(sum, y + i, mask);
  }
}

// A choice is one expert of one token: choice t · K + k is token t's k-th expert.
template <class Type>
struct ExpertLayer {
  using Element = typename Type::Element;
  int64_t num_tokens, top_k, num_experts, embed, mlp;  // T, K, E, D, F
  Rows<const Element> x;
  const Element *gate_up, *down;
  const int32_t* chosen;
  const float* scores;
  Rows<Element> hidden;  // one row per choice, sorted by expert
  Element *outputs, *mixed;

  void Run(ffi::ThreadPool& pool) const {
    // Sort the choices by expert, and leave out those whose number is no expert.
    const int64_t num_choices = num_tokens * top_k;
    std::vector<int32_t> sizes(num_experts), sorted_choice(num_choices), sorted_token(num_choices);
    const auto is_expert = [&](int64_t choice) { return 0 <= chosen[choice] && chosen[choice] < num_experts; };
    for (int64_t choice = 0; choice < num_choices; ++choice) {
      if (is_expert(choice)) ++sizes[chosen[choice]];
    }
    std::vector<int32_t> next_row(num_experts);
    for (int64_t expert = 1; expert < num_experts; ++expert) {
      next_row[expert] = next_row[expert - 1] + sizes[expert - 1];
    }
    for (int64_t choice = 0; choice < num_choices; ++choice) {
      if (!is_expert(choice)) continue;
      const int32_t row = next_row[chosen[choice]]++;
      sorted_choice[row] = static_cast<int32_t>(choice);
      sorted_token[row] = static_cast<int32_t>(choice / top_k);
    }
    const auto groups = NonEmptyGroups(sizes.data(), num_experts, num_choices);

    const auto gate_of = [&](const Block& block) { return gate_up + (block.group.index * 2 * mlp + block.begin) * embed; };
    ParallelForBlocks<Element>(pool, groups, mlp, embed, [&](const Block& block, const Block* next) {
      const Group& group = block.group;
      const int64_t num_features = block.end - block.begin, up_offset = mlp * embed;
      std::vector<Element> gate(group.num_rows * num_features), up(group.num_rows * num_features);
      const Rows<const Element> rows{x.data, x.stride, &sorted_token[group.first_row]};
      const Element *weight = gate_of(block), *next_weight = next == nullptr ? nullptr : gate_of(*next);
      MultiplyBlock<Type, Element>(rows, group.num_rows, weight, embed, {gate.data(), num_features}, num_features,
                                   next_weight);
      MultiplyBlock<Type, Element>(rows, group.num_rows, weight + up_offset, embed, {up.data(), num_features}, num_features,
                                   next == nullptr ? nullptr : next_weight + up_offset);
      for (int64_t row = 0; row < group.num_rows; ++row) {
        SiluAndMul(&gate[row * num_features], &up[row * num_features], num_features,
                   hidden[group.first_row + row] + block.begin);
      }
    });
    const auto down_of = [&](const Block& block) { return down + (block.group.index * embed + block.begin) * mlp; };
    ParallelForBlocks<Element>(pool, groups, embed, mlp, [&](const Block& block, const Block* next) {
      const Group& group = block.group;
      MultiplyBlock<Type, Element>({hidden[group.first_row], hidden.stride}, group.num_rows, down_of(block), mlp,
                                   {outputs + block.begin, embed, &sorted_choice[group.first_row]},
                                   block.end - block.begin, next == nullptr ? nullptr : down_of(*next));
    });
    ParallelFor(pool, (num_tokens + kTokensPerJob - 1) / kTokensPerJob, [&](int64_t job) {
      for (int64_t t = job * kTokensPerJob; t < std::min(num_tokens, (job + 1) * kTokensPerJob); ++t) {
        for (int64_t choice = t * top_k; choice < (t + 1) * top_k; ++choice) {
          if (!is_expert(choice)) std::memset(outputs + choice * embed, 0, embed * sizeof(*outputs));
        }
        WeightedSum(outputs + t * top_k * embed, scores + t * top_k, top_k, embed, mixed + t * embed);
      }
    });
  }
};

ffi::Error ExpertsImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> chosen, ffi::Buffer<ffi::F32> scores,
                       ffi::AnyBuffer gate_up, ffi::AnyBuffer down, ffi::Result<ffi::AnyBuffer> mixed,
                       ffi::Result<ffi::AnyBuffer> outputs, ffi::Result<ffi::AnyBuffer> hidden,
                       ffi::Result<ffi::AnyBuffer> scratch) {
  const auto x_shape = x.dimensions(), choices = chosen.dimensions(), shape = down.dimensions();
  const auto dtype = x.element_type();
  if (x_shape.size() != 2 || choices.size() != 2 || shape.size() != 3 || gate_up.dimensions().size() != 3 ||
      choices[0] != x_shape[0] || scores.element_count() != chosen.element_count() || shape[1] != x_shape[1] ||
      gate_up.dimensions()[1] != 2 * shape[2] || shape[1] % kTileFeatures != 0 ||
      shape[2] % kTileFeatures != 0 || gate_up.element_type() != dtype || down.element_type() != dtype) {
    return ffi::Error::InvalidArgument(
        "experts takes tokens [T, D], chosen experts and scores [T, K], and weights [E, 2F, D] and [E, D, F] of the same "
        "type; D and F are multiples of 4");
  }
  const auto run = [&](auto float_type) {
    using Type = decltype(float_type);
    using Element = typename Type::Element;
    const auto in = [](const auto& buffer) { return static_cast<const Element*>(buffer.untyped_data()); };
    const auto out = [](auto& buffer) { return static_cast<Element*>(buffer->untyped_data()); };
    const Rows<Element> hidden_rows{out(hidden), hidden->dimensions()[1]};
    const auto rows = WithPaddedStride<Element>(pool, x, scratch);
    ExpertLayer<Type>{x_shape[0],
                      choices[1],
                      shape[0],
                      shape[1],
                      shape[2],
                      rows,
                      in(gate_up),
                      in(down),
                      chosen.typed_data(),
                      scores.typed_data(),
                      hidden_rows,
                      out(outputs),
                      out(mixed)}
        .Run(pool);
    return ffi::Error::Success();
  };
  if (dtype == ffi::F32) return run(Float32());
  if (dtype == ffi::BF16) return run(BFloat16());
  return ffi::Error::InvalidArgument("experts takes float32 or bfloat16");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Experts, ExpertsImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

#endif
