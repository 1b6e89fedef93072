// A layer's experts, from the tokens to the weighted sums of their outputs: see grouped_matmul.h.
//
// Tokens are not copied into groups by expert: a tile reads its rows through an index and writes the results to their final
// places. silu(gate) · up is computed while both are still in the L2 cache.

#pragma once

#include "grouped_matmul.h"
#include "swiglu.h"

namespace {

constexpr int64_t kTokensPerJob = 8;  // of the weighted sums

// y = sum over k < count of scores[k] * x[k], vectors of `size` elements.
template <class Element>
SIMD void WeightedSum(const Element* x, const float* scores, int64_t count, int64_t size, Element* y) {
  const auto step = [&](int64_t i, auto lanes) SIMD {
    Floats sum = Set(0.0f);
    for (int64_t k = 0; k < count; ++k) sum = MultiplyAdd(Set(scores[k]), Load(x + k * size + i, lanes), sum);
    Store(sum, y + i, lanes);
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= size; i += kFloatLanes) step(i, AllLanes());
  if (i < size) step(i, FirstLanes(size - i));
}

// A choice is one expert of one token: choice t · K + k is token t's k-th expert.
template <class Type>
struct ExpertLayer {
  using Element = typename Type::Element;
  int64_t num_tokens, top_k, num_experts, embed, mlp;  // T, K, E, D, F
  Rows<const Element> x;
  Scratch rows;  // the tokens to multiply, see PrepareRows
  const Element *gate_up, *down;
  const int32_t* chosen;
  const float* scores;
  Rows<Element> hidden;  // one row per choice, sorted by expert
  Scratch hidden_rows;   // the rows of `hidden` to multiply
  Element *outputs, *mixed;

  void Run(const Pool& pool) const {
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

    const auto tokens = PrepareRows<Type>(pool, {x.data, x.stride, sorted_token.data()}, num_tokens, embed, groups, rows);
    const auto gate_of = [&](const Block& block) { return gate_up + (block.group.index * 2 * mlp + block.begin) * embed; };
    ParallelForBlocks<Type>(pool, groups, mlp, embed, [&](const Block& block, const Block* next) {
      const Group& group = block.group;
      const int64_t num_features = block.end - block.begin, up_offset = mlp * embed;
      std::vector<Element> gate(group.num_rows * num_features), up(group.num_rows * num_features);
      const auto group_tokens = tokens.From(group.first_row);
      const Element *weight = gate_of(block), *next_weight = next == nullptr ? nullptr : gate_of(*next);
      MultiplyBlock<Type, Element>(group_tokens, group.num_rows, weight, embed, {gate.data(), num_features}, num_features,
                                   next_weight);
      MultiplyBlock<Type, Element>(group_tokens, group.num_rows, weight + up_offset, embed, {up.data(), num_features},
                                   num_features, next == nullptr ? nullptr : next_weight + up_offset);
      for (int64_t row = 0; row < group.num_rows; ++row) {
        SiluAndMul(&gate[row * num_features], &up[row * num_features], num_features,
                   hidden[group.first_row + row] + block.begin);
      }
    });
    const auto inner = PrepareRows<Type>(pool, {hidden.data, hidden.stride}, num_choices, mlp, groups, hidden_rows);
    const auto down_of = [&](const Block& block) { return down + (block.group.index * embed + block.begin) * mlp; };
    ParallelForBlocks<Type>(pool, groups, embed, mlp, [&](const Block& block, const Block* next) {
      const Group& group = block.group;
      MultiplyBlock<Type, Element>(inner.From(group.first_row), group.num_rows, down_of(block), mlp,
                                   {outputs + block.begin, embed, &sorted_choice[group.first_row]}, block.end - block.begin,
                                   next == nullptr ? nullptr : down_of(*next));
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

void Experts(const Pool& pool, const ExpertsArguments& a) {
  WithType(a.dtype, [&](auto float_type) {
    using Type = decltype(float_type);
    using Element = typename Type::Element;
    ExpertLayer<Type>{a.num_tokens,
                      a.top_k,
                      a.num_experts,
                      a.embed,
                      a.mlp,
                      {static_cast<const Element*>(a.x), a.embed},
                      a.rows,
                      static_cast<const Element*>(a.gate_up),
                      static_cast<const Element*>(a.down),
                      a.chosen,
                      a.scores,
                      {static_cast<Element*>(a.hidden.data), a.hidden.stride},
                      a.hidden_rows,
                      static_cast<Element*>(a.outputs),
                      static_cast<Element*>(a.mixed)}
        .Run(pool);
  });
}

}  // namespace
