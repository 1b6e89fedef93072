// A layer's experts, from the tokens to what is mixed of them: see ../native.py and products.h.
//
// Tokens are not put together for their expert: a tile of the products takes its rows where they lie, and puts the results
// where they belong. silu(gate) · up is computed while both are still in the core's own cache.

#if defined(__x86_64__) && defined(__GNUC__)

#include "gate.h"
#include "products.h"

namespace {

constexpr int64_t kTokensOfJob = 8;  // when experts are mixed

// y = sum over k of scores[k] * x[k], of `size` numbers each.
template <class Element>
AVX512 void Mix(const Element* x, const float* scores, int64_t number, int64_t size, Element* y) {
  for (int64_t i = 0; i < size; i += kFloats) {
    const __mmask16 first = First(size - i);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < number; ++k) {
      sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[k]), Floats(x + k * size + i, first), sum);
    }
    Store(sum, y + i, first);
  }
}

template <class Type>
struct Layer {
  using Element = typename Type::Element;
  int64_t tokens, choices, experts, embed, mlp;  // T, K, E, D, F
  Rows<const Element> x;
  const Element *gate_up, *down;
  const int32_t* chosen;
  const float* scores;
  Rows<Element> hidden;  // by expert
  Element *each, *mixed;

  void Run(ffi::ThreadPool& pool) const {
    // Choices in the order of their experts; one that is no expert has no place in it.
    const int64_t num_choices = tokens * choices;
    std::vector<int32_t> sizes(experts), order(num_choices), token(num_choices);
    const auto is_expert = [&](int64_t choice) { return 0 <= chosen[choice] && chosen[choice] < experts; };
    for (int64_t choice = 0; choice < num_choices; ++choice) {
      if (is_expert(choice)) ++sizes[chosen[choice]];
    }
    std::vector<int32_t> next(experts);
    for (int64_t expert = 1; expert < experts; ++expert) next[expert] = next[expert - 1] + sizes[expert - 1];
    for (int64_t choice = 0; choice < num_choices; ++choice) {
      if (!is_expert(choice)) continue;
      const int32_t place = next[chosen[choice]]++;
      order[place] = static_cast<int32_t>(choice);
      token[place] = static_cast<int32_t>(choice / choices);
    }
    const auto groups = Groups(sizes.data(), experts, num_choices);

    const auto gate_of = [&](const Part& part) { return gate_up + (part.group.index * 2 * mlp + part.first) * embed; };
    ForEachPart<Element>(pool, groups, mlp, embed, [&](const Part& part, const Part* next) {
      const Group& group = part.group;
      const int64_t features = part.last - part.first, to_up = mlp * embed;
      std::vector<Element> gate(group.rows * features), up(group.rows * features);
      const Rows<const Element> rows{x.first, x.size, &token[group.first]};
      const Element *weight = gate_of(part), *after = next == nullptr ? nullptr : gate_of(*next);
      Block<Type, Element>(rows, group.rows, weight, embed, {gate.data(), features}, features, after);
      Block<Type, Element>(rows, group.rows, weight + to_up, embed, {up.data(), features}, features,
                           next == nullptr ? nullptr : after + to_up);
      for (int64_t row = 0; row < group.rows; ++row) {
        Gate(&gate[row * features], &up[row * features], features, hidden[group.first + row] + part.first);
      }
    });
    const auto down_of = [&](const Part& part) { return down + (part.group.index * embed + part.first) * mlp; };
    ForEachPart<Element>(pool, groups, embed, mlp, [&](const Part& part, const Part* next) {
      const Group& group = part.group;
      Block<Type, Element>({hidden[group.first], hidden.size}, group.rows, down_of(part), mlp,
                           {each + part.first, embed, &order[group.first]}, part.last - part.first,
                           next == nullptr ? nullptr : down_of(*next));
    });
    ForEach(pool, (tokens + kTokensOfJob - 1) / kTokensOfJob, [&](int64_t job) {
      for (int64_t t = job * kTokensOfJob; t < std::min(tokens, (job + 1) * kTokensOfJob); ++t) {
        for (int64_t choice = t * choices; choice < (t + 1) * choices; ++choice) {
          if (!is_expert(choice)) std::memset(each + choice * embed, 0, embed * sizeof(*each));
        }
        Mix(each + t * choices * embed, scores + t * choices, choices, embed, mixed + t * embed);
      }
    });
  }
};

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> chosen, ffi::Buffer<ffi::F32> scores,
               ffi::AnyBuffer gate_up, ffi::AnyBuffer down, ffi::Result<ffi::AnyBuffer> mixed,
               ffi::Result<ffi::AnyBuffer> each, ffi::Result<ffi::AnyBuffer> hidden, ffi::Result<ffi::AnyBuffer> spaced) {
  const auto x_shape = x.dimensions(), choices = chosen.dimensions(), shape = down.dimensions();
  const auto type = x.element_type();
  if (x_shape.size() != 2 || choices.size() != 2 || shape.size() != 3 || gate_up.dimensions().size() != 3 ||
      choices[0] != x_shape[0] || scores.element_count() != chosen.element_count() || shape[1] != x_shape[1] ||
      gate_up.dimensions()[1] != 2 * shape[2] || shape[1] % kFeatures != 0 ||
      shape[2] % kFeatures != 0 || gate_up.element_type() != type || down.element_type() != type) {
    return ffi::Error::InvalidArgument(
        "tokens [T, D], choices and scores [T, K], weights [E, 2F, D] and [E, D, F] of the tokens' type are wanted, D and F "
        "multiples of 4");
  }
  const auto run = [&](auto of) {
    using Type = decltype(of);
    using Element = typename Type::Element;
    const auto in = [](const auto& buffer) { return static_cast<const Element*>(buffer.untyped_data()); };
    const auto out = [](auto& buffer) { return static_cast<Element*>(buffer->untyped_data()); };
    const Rows<Element> room{out(hidden), hidden->dimensions()[1]};
    const auto rows = Spaced<Element>(pool, x, spaced);
    Layer<Type>{x_shape[0],  choices[1], shape[0],            shape[1],            shape[2], rows,
                in(gate_up), in(down),   chosen.typed_data(), scores.typed_data(), room,     out(each), out(mixed)}
        .Run(pool);
    return ffi::Error::Success();
  };
  if (type == ffi::F32) return run(Float32());
  if (type == ffi::BF16) return run(BFloat16());
  return ffi::Error::InvalidArgument("float32 or bfloat16 are wanted");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Experts, Run,
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
