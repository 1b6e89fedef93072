// The gated delta rule (arXiv:2412.06464), token by token. See ../delta_rule.py.
//
// Column j of a head's state depends on column j of the values only. A job therefore takes some columns of one head, which
// stay in the L1 cache while all tokens of a sequence pass. The state is read and written once a token: the pass that adds
// token t to it also multiplies it with the key and the query of token t + 1. A single token takes more columns at a time,
// and reads the state in the order of its memory. Each token is computed in the same order wherever it stands, so a
// sequence gets the same bits however it is cut into rows and steps.

#pragma once

#include <cmath>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace {

// Registers of a tile's columns: of many tokens, and of one.
constexpr int kTileVectors = 2, kStepVectors = kRegisters / 4;
constexpr int64_t kPreparedPerJob = 16;
constexpr float kNormEps = 1e-6f;

// Rows [first, end) of one sequence, and the slots of its state before and after them; before: -1 for zeros.
struct Part {
  int64_t first, end, from, to;
};
// All rows of a sequence. Most have one part; more where the state between two rows is wanted.
using Chain = std::vector<Part>;

// The sequences of the rows, without those whose state after the last row goes to no slot.
std::vector<Chain> Chains(const DeltaRuleArguments& a) {
  const auto is_slot = [&](int32_t slot) { return slot >= 0 && slot < a.num_slots; };
  std::vector<Chain> chains;
  for (int64_t first = 0, end; first < a.num_rows; first = end) {
    const bool is_zero = a.is_start[first] || a.continues[first] || !is_slot(a.slots[first]);
    int64_t from = is_zero ? -1 : a.slots[first], begin = first;
    Chain chain;
    for (end = first + 1; end < a.num_rows && a.continues[end]; ++end) {
      if (!is_slot(a.written_slots[end - 1])) continue;
      chain.push_back({begin, end, from, a.written_slots[end - 1]});
      from = a.written_slots[end - 1], begin = end;
    }
    if (!is_slot(a.written_slots[end - 1])) continue;
    chain.push_back({begin, end, from, a.written_slots[end - 1]});
    chains.push_back(std::move(chain));
  }
  return chains;
}

int64_t CountRows(const std::vector<Chain>& chains) {
  int64_t count = 0;
  for (const Chain& chain : chains) count += chain.back().end - chain.front().first;
  return count;
}

// Set the outputs of the rows that are in no chain to 0.
void ClearOutsideOf(const std::vector<Chain>& chains, int64_t num_rows, int64_t row_size, float* outputs) {
  int64_t row = 0;
  for (const Chain& chain : chains) {
    std::fill(outputs + row * row_size, outputs + chain.front().first * row_size, 0.0f);
    row = chain.back().end;
  }
  std::fill(outputs + row * row_size, outputs + num_rows * row_size, 0.0f);
}

// The sum of the products of two vectors.
template <class Element>
SIMD INLINE float Dot(const Element* x, const Element* y, int64_t size) {
  Floats sum = Set(0.0f);
  for (int64_t i = 0; i < size; i += kFloatLanes) {
    const Lanes lanes = FirstLanes(size - i);
    sum = MultiplyAdd(Load(x + i, lanes), Load(y + i, lanes), sum);
  }
  return Sum(sum);
}

template <class Element>
SIMD INLINE void Scale(const Element* x, float factor, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += kFloatLanes) {
    const Lanes lanes = FirstLanes(size - i);
    Store(Load(x + i, lanes) * Set(factor), to + i, lanes);
  }
}

// What the tiles of all value heads need of a token and key head: the normalised key, the normalised and scaled query,
// their product, and the query's squared length before.
struct Prepared {
  const float* key;
  int64_t size;

  const float* Query() const { return key + size; }
  float Overlap() const { return key[2 * size]; }
  float QuerySquares() const { return key[2 * size + 1]; }
};

template <class Element>
SIMD void Prepare(const Element* query, const Element* key, int64_t size, float* to) {
  const float squares = Dot(query, query, size);
  Scale(key, 1 / std::sqrt(Dot(key, key, size) + kNormEps), size, to);
  Scale(query, 1 / (std::sqrt(squares + kNormEps) * std::sqrt(static_cast<float>(size))), size, to + size);
  to[2 * size] = Dot<float>(to, to + size, size);
  to[2 * size + 1] = squares;
}

// Some columns of a state in this thread's memory, without gaps: in the pool, rows compete for the same lines of the L1
// cache.
struct LocalTile {
  struct alignas(64) Row {
    float columns[kTileVectors * kFloatLanes];
  };
  Row* rows;

  SIMD INLINE Floats Load(int64_t row, int v) const { return ::Load(rows[row].columns + v * kFloatLanes); }
  SIMD INLINE void Store(Floats x, int64_t row, int v) const {
    ::Store(x, rows[row].columns + v * kFloatLanes);
  }
};

// Some columns of a state in the pool; a mask says which lanes of a register they are.
template <int vectors, class Mask>
struct PoolTile {
  float* data;
  int64_t stride;
  Mask mask[vectors];

  SIMD INLINE Floats Load(int64_t row, int v) const {
    return ::Load(data + row * stride + v * kFloatLanes, mask[v]);
  }
  SIMD INLINE void Store(Floats x, int64_t row, int v) const {
    ::Store(x, data + row * stride + v * kFloatLanes, mask[v]);
  }
};

// The state before a sequence starts, and nowhere.
struct NoTile {
  SIMD INLINE Floats Load(int64_t row, int v) const { return Set(0.0f); }
  SIMD INLINE void Store(Floats x, int64_t row, int v) const {}
};

// A token that is to be added to the state: S <- decay S + key changeᵀ.
template <int vectors>
struct Token {
  float decay;
  const float* key;
  Floats change[vectors];
};

// The products of the state with a key and a query.
template <int vectors>
struct Products {
  Floats key[vectors], query[vectors];
};

// Write the state with the token in it, if there is one, and return its products with the next token's key and query.
template <bool has_token, bool has_next, int vectors, class From, class To>
SIMD INLINE Products<vectors> Pass(const From& from, const To& to, int64_t key_dim, const Token<vectors>& token,
                                     const Prepared& next) {
  const Floats decay = Set(token.decay);
  Products<vectors> sums;
  UNROLL for (int v = 0; v < vectors; ++v) sums.key[v] = sums.query[v] = Set(0.0f);
  for (int64_t i = 0; i < key_dim; ++i) {
    UNROLL for (int v = 0; v < vectors; ++v) {
      Floats state = from.Load(i, v);
      if (has_token) {
        state = MultiplyAdd(Set(token.key[i]), token.change[v], decay * state);
      }
      to.Store(state, i, v);
      if (has_next) {
        sums.key[v] = MultiplyAdd(state, Set(next.key[i]), sums.key[v]);
        sums.query[v] = MultiplyAdd(state, Set(next.Query()[i]), sums.query[v]);
      }
    }
  }
  return sums;
}

// Some columns of the state of a value head.
struct Columns {
  int64_t head, first;
};

template <class Element>
struct DeltaRule {
  const DeltaRuleArguments& shape;
  const Element* values;
  const float *gates, *betas, *prepared;
  float *outputs, *pool;

  // Pass the tokens of a sequence through some columns.
  template <int vectors>
  SIMD void Run(const Chain& chain, const Columns& columns) const {
    for (const Part& part : chain) {
      if (columns.first + vectors * kFloatLanes <= shape.value_dim) {
        Run<vectors, AllLanes>(part, columns);
      } else {
        Run<vectors, Lanes>(part, columns);
      }
    }
  }

 private:
  template <int vectors, class Mask>
  SIMD void Run(const Part& part, const Columns& columns) const {
    // A decaying state passes through the denormal numbers, which are slow. All threads must treat them alike.
    const FlushDenormals flush;
    const auto to = InPool<vectors, Mask>(part.to, columns);
    if (part.from < 0) {
      RunFrom<vectors>(part, columns, NoTile(), to);
    } else {
      RunFrom<vectors>(part, columns, InPool<vectors, Mask>(part.from, columns), to);
    }
  }

  template <int vectors, class From, class Mask>
  SIMD INLINE void RunFrom(const Part& part, const Columns& columns, const From& from,
                           const PoolTile<vectors, Mask>& to) const {
    const int64_t key_dim = shape.key_dim, end = part.end * shape.num_tokens;
    const int64_t first = NextReal(part.first * shape.num_tokens, end, columns, to);
    const Token<vectors> none{};
    if (first == end) {
      Pass<false, false>(from, to, key_dim, none, {});
    } else if constexpr (vectors == kStepVectors) {
      const auto sums = Pass<false, true>(from, NoTile(), key_dim, none, Of(first, columns.head));
      Pass<true, false>(from, to, key_dim, Answer(first, columns, to, sums), {});
    } else {
      thread_local std::vector<LocalTile::Row> memory;
      if (static_cast<int64_t>(memory.size()) < key_dim) memory.resize(key_dim);
      const LocalTile local{memory.data()};
      auto sums = Pass<false, true>(from, local, key_dim, none, Of(first, columns.head));
      for (int64_t token = first, next; token < end; token = next) {
        const Token<vectors> added = Answer(token, columns, to, sums);
        next = NextReal(token + 1, end, columns, to);
        if (next < end) {
          sums = Pass<true, true>(local, local, key_dim, added, Of(next, columns.head));
        } else {
          Pass<true, false>(local, to, key_dim, added, {});
        }
      }
    }
  }

  int64_t NumHeads() const { return shape.key_heads * shape.group_size; }

  template <int vectors, class Mask>
  SIMD INLINE PoolTile<vectors, Mask> InPool(int64_t slot, const Columns& columns) const {
    const int64_t offset = (slot * NumHeads() + columns.head) * shape.key_dim * shape.value_dim + columns.first;
    PoolTile<vectors, Mask> tile{pool + offset, shape.value_dim, {}};
    if constexpr (std::is_same_v<Mask, Lanes>) {
      for (int v = 0; v < vectors; ++v) tile.mask[v] = FirstLanes(shape.value_dim - columns.first - v * kFloatLanes);
    }
    return tile;
  }

  Prepared Of(int64_t token, int64_t head) const {
    const int64_t index = token * shape.key_heads + head / shape.group_size;
    return {prepared + index * PreparedStride(shape.key_dim), shape.key_dim};
  }

  // The first of the tokens [token, end) that is not padding. Padding does not change the state, and its outputs are 0.
  template <int vectors, class Mask>
  SIMD INLINE int64_t NextReal(int64_t token, int64_t end, const Columns& columns,
                               const PoolTile<vectors, Mask>& tile) const {
    for (; token < end; ++token) {
      const int64_t index = token * NumHeads() + columns.head, offset = index * shape.value_dim + columns.first;
      if (gates[index] != 0 || betas[index] != 0 || Of(token, columns.head).QuerySquares() != 0) break;
      for (int v = 0; v < vectors; ++v) {
        Store(Set(0.0f), outputs + offset + v * kFloatLanes, tile.mask[v]);
      }
    }
    return token;
  }

  // Write a token's output, and return how it changes the state, from the products of the state before it.
  template <int vectors, class Mask>
  SIMD INLINE Token<vectors> Answer(int64_t token, const Columns& columns, const PoolTile<vectors, Mask>& tile,
                                    const Products<vectors>& sums) const {
    const int64_t index = token * NumHeads() + columns.head, offset = index * shape.value_dim + columns.first;
    const Prepared keys = Of(token, columns.head);
    const Floats decay = Exp(Set(gates[index])), beta = Set(betas[index]);
    const Floats overlap = Set(keys.Overlap());
    Token<vectors> added{First(decay), keys.key, {}};
    UNROLL for (int v = 0; v < vectors; ++v) {
      const Floats value = Load(values + offset + v * kFloatLanes, tile.mask[v]);
      added.change[v] = beta * NegatedMultiplyAdd(decay, sums.key[v], value);
      const Floats output = MultiplyAdd(overlap, added.change[v], decay * sums.query[v]);
      Store(output, outputs + offset + v * kFloatLanes, tile.mask[v]);
    }
    return added;
  }
};

void RunDeltaRule(const Pool& pool, const DeltaRuleArguments& a) {
  const int64_t num_heads = a.key_heads * a.group_size;
  const auto chains = Chains(a);
  ClearOutsideOf(chains, a.num_rows, a.num_tokens * num_heads * a.value_dim, a.outputs);
  WithType(a.dtype, [&](auto float_type) {
    using Element = typename decltype(float_type)::Element;
    const auto *queries = static_cast<const Element*>(a.q), *keys = static_cast<const Element*>(a.k);
    const int64_t count = a.num_rows * a.num_tokens * a.key_heads;
    ParallelFor(pool, (count + kPreparedPerJob - 1) / kPreparedPerJob, [&](int64_t job) {
      const FlushDenormals flush;
      for (int64_t i = job * kPreparedPerJob; i < std::min(count, (job + 1) * kPreparedPerJob); ++i) {
        Prepare(queries + i * a.key_dim, keys + i * a.key_dim, a.key_dim, a.prepared + i * PreparedStride(a.key_dim));
      }
    });
    const DeltaRule<Element> rule{a, static_cast<const Element*>(a.v), a.gates, a.betas, a.prepared, a.outputs, a.states};
    const bool is_step = a.num_tokens == 1 && static_cast<int64_t>(chains.size()) == CountRows(chains);
    const int64_t size = (is_step ? kStepVectors : kTileVectors) * kFloatLanes;
    const int64_t num_tiles = (a.value_dim + size - 1) / size;
    ParallelFor(pool, static_cast<int64_t>(chains.size()) * num_heads * num_tiles, [&](int64_t job) {
      const Chain& chain = chains[job / num_tiles / num_heads];
      const Columns columns{job / num_tiles % num_heads, job % num_tiles * size};
      is_step ? rule.template Run<kStepVectors>(chain, columns) : rule.template Run<kTileVectors>(chain, columns);
    });
  });
}

}  // namespace
