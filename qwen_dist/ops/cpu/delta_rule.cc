// The gated delta rule (arXiv:2412.06464), token by token, for processors with AVX512-BF16. See ../delta_rule.py.
//
// Column j of a head's state depends on column j of the values only. A job therefore takes some columns of one head, which
// stay in the L1 cache while all tokens of a sequence pass. The state is read and written once a token: the pass that adds
// token t to it also multiplies it with the key and the query of token t + 1. A single token takes more columns at a time,
// and reads the state in the order of its memory. Each token is computed in the same order wherever it stands, so a
// sequence gets the same bits however it is cut into rows and steps.

#if defined(__x86_64__) && defined(__GNUC__)

#include <cmath>
#include <vector>

#include "simd.h"

namespace {

// Registers of a tile's columns: of many tokens, and of one.
constexpr int kTileVectors = 2, kStepVectors = 8;
constexpr int64_t kPreparedPerJob = 16;
constexpr float kNormEps = 1e-6f;

// A decaying state passes through the denormal numbers, which are slow. All threads must treat them alike.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

struct Shape {
  int64_t num_rows, num_tokens, key_heads, group_size, key_dim, value_dim;  // B, T, G, R, K, V
};

// Rows [first, end) of one sequence, and the slots of its state before and after them; before: -1 for zeros.
struct Chain {
  int64_t first, end, from, to;
};

// The sequences of the rows, without those that have no slot to write to.
std::vector<Chain> Chains(const int32_t* slots, const bool* is_start, const bool* continues, int64_t num_rows,
                          int64_t num_slots) {
  const auto has_slot = [&](int64_t row) { return slots[row] >= 0 && slots[row] < num_slots; };
  std::vector<Chain> chains;
  for (int64_t first = 0, end; first < num_rows; first = end) {
    for (end = first + 1; end < num_rows && continues[end];) ++end;
    const bool is_zero = is_start[first] || continues[first] || !has_slot(first);
    if (has_slot(end - 1)) chains.push_back({first, end, is_zero ? -1 : slots[first], slots[end - 1]});
  }
  return chains;
}

int64_t CountRows(const std::vector<Chain>& chains) {
  int64_t count = 0;
  for (const Chain& chain : chains) count += chain.end - chain.first;
  return count;
}

// Set the outputs of the rows that are in no chain to 0.
void ClearOutsideOf(const std::vector<Chain>& chains, int64_t num_rows, int64_t row_size, float* outputs) {
  int64_t row = 0;
  for (const Chain& chain : chains) {
    std::fill(outputs + row * row_size, outputs + chain.first * row_size, 0.0f);
    row = chain.end;
  }
  std::fill(outputs + row * row_size, outputs + num_rows * row_size, 0.0f);
}

// The sum of the products of two vectors.
template <class Element>
AVX512 INLINE float Dot(const Element* x, const Element* y, int64_t size) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kFloatLanes) {
    const __mmask16 mask = LaneMask(size - i);
    sum = _mm512_fmadd_ps(LoadFloats(x + i, mask), LoadFloats(y + i, mask), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

template <class Element>
AVX512 INLINE void Scale(const Element* x, float factor, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += kFloatLanes) {
    const __mmask16 mask = LaneMask(size - i);
    StoreFloats(_mm512_mul_ps(LoadFloats(x + i, mask), _mm512_set1_ps(factor)), to + i, mask);
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
  static int64_t Stride(int64_t size) { return 2 * size + 2; }
};

template <class Element>
AVX512 void Prepare(const Element* query, const Element* key, int64_t size, float* to) {
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

  AVX512 INLINE __m512 Load(int64_t row, int v) const { return _mm512_load_ps(rows[row].columns + v * kFloatLanes); }
  AVX512 INLINE void Store(__m512 x, int64_t row, int v) const {
    _mm512_store_ps(rows[row].columns + v * kFloatLanes, x);
  }
};

// Some columns of a state in the pool.
template <int vectors>
struct PoolTile {
  float* data;
  int64_t stride;
  __mmask16 mask[vectors];

  AVX512 INLINE __m512 Load(int64_t row, int v) const {
    return LoadFloats(data + row * stride + v * kFloatLanes, mask[v]);
  }
  AVX512 INLINE void Store(__m512 x, int64_t row, int v) const {
    StoreFloats(x, data + row * stride + v * kFloatLanes, mask[v]);
  }
};

// The state before a sequence starts, and nowhere.
struct NoTile {
  AVX512 INLINE __m512 Load(int64_t row, int v) const { return _mm512_setzero_ps(); }
  AVX512 INLINE void Store(__m512 x, int64_t row, int v) const {}
};

// A token that is to be added to the state: S <- decay S + key changeᵀ.
template <int vectors>
struct Token {
  float decay;
  const float* key;
  __m512 change[vectors];
};

// The products of the state with a key and a query.
template <int vectors>
struct Products {
  __m512 key[vectors], query[vectors];
};

// Write the state with the token in it, if there is one, and return its products with the next token's key and query.
template <bool has_token, bool has_next, int vectors, class From, class To>
AVX512 INLINE Products<vectors> Pass(const From& from, const To& to, int64_t key_dim, const Token<vectors>& token,
                                     const Prepared& next) {
  const __m512 decay = _mm512_set1_ps(token.decay);
  Products<vectors> sums;
  UNROLL for (int v = 0; v < vectors; ++v) sums.key[v] = sums.query[v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < key_dim; ++i) {
    UNROLL for (int v = 0; v < vectors; ++v) {
      __m512 state = from.Load(i, v);
      if (has_token) {
        state = _mm512_fmadd_ps(_mm512_set1_ps(token.key[i]), token.change[v], _mm512_mul_ps(decay, state));
      }
      to.Store(state, i, v);
      if (has_next) {
        sums.key[v] = _mm512_fmadd_ps(state, _mm512_set1_ps(next.key[i]), sums.key[v]);
        sums.query[v] = _mm512_fmadd_ps(state, _mm512_set1_ps(next.Query()[i]), sums.query[v]);
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
  Shape shape;
  const Element* values;
  const float *gates, *betas, *prepared;
  float *outputs, *pool;

  // Pass the tokens of a sequence through some columns.
  template <int vectors>
  AVX512 void Run(const Chain& chain, const Columns& columns) const {
    const FlushDenormals flush;
    const auto to = InPool<vectors>(chain.to, columns);
    if (chain.from < 0) {
      Run<vectors>(chain, columns, NoTile(), to);
    } else {
      Run<vectors>(chain, columns, InPool<vectors>(chain.from, columns), to);
    }
  }

 private:
  template <int vectors, class From>
  AVX512 INLINE void Run(const Chain& chain, const Columns& columns, const From& from, const PoolTile<vectors>& to) const {
    const int64_t key_dim = shape.key_dim, end = chain.end * shape.num_tokens;
    const int64_t first = NextReal(chain.first * shape.num_tokens, end, columns, to);
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

  template <int vectors>
  AVX512 PoolTile<vectors> InPool(int64_t slot, const Columns& columns) const {
    const int64_t offset = (slot * NumHeads() + columns.head) * shape.key_dim * shape.value_dim + columns.first;
    PoolTile<vectors> tile{pool + offset, shape.value_dim, {}};
    for (int v = 0; v < vectors; ++v) {
      tile.mask[v] = LaneMask(std::max<int64_t>(0, shape.value_dim - columns.first - v * kFloatLanes));
    }
    return tile;
  }

  Prepared Of(int64_t token, int64_t head) const {
    const int64_t index = token * shape.key_heads + head / shape.group_size;
    return {prepared + index * Prepared::Stride(shape.key_dim), shape.key_dim};
  }

  // The first of the tokens [token, end) that is not padding. Padding does not change the state, and its outputs are 0.
  template <int vectors>
  AVX512 int64_t NextReal(int64_t token, int64_t end, const Columns& columns, const PoolTile<vectors>& tile) const {
    for (; token < end; ++token) {
      const int64_t index = token * NumHeads() + columns.head, offset = index * shape.value_dim + columns.first;
      if (gates[index] != 0 || betas[index] != 0 || Of(token, columns.head).QuerySquares() != 0) break;
      for (int v = 0; v < vectors; ++v) {
        StoreFloats(_mm512_setzero_ps(), outputs + offset + v * kFloatLanes, tile.mask[v]);
      }
    }
    return token;
  }

  // Write a token's output, and return how it changes the state, from the products of the state before it.
  template <int vectors>
  AVX512 INLINE Token<vectors> Answer(int64_t token, const Columns& columns, const PoolTile<vectors>& tile,
                                      const Products<vectors>& sums) const {
    const int64_t index = token * NumHeads() + columns.head, offset = index * shape.value_dim + columns.first;
    const Prepared keys = Of(token, columns.head);
    const __m512 decay = Exp(_mm512_set1_ps(gates[index])), beta = _mm512_set1_ps(betas[index]);
    const __m512 overlap = _mm512_set1_ps(keys.Overlap());
    Token<vectors> added{_mm512_cvtss_f32(decay), keys.key, {}};
    UNROLL for (int v = 0; v < vectors; ++v) {
      const __m512 value = LoadFloats(values + offset + v * kFloatLanes, tile.mask[v]);
      added.change[v] = _mm512_mul_ps(beta, _mm512_fnmadd_ps(decay, sums.key[v], value));
      const __m512 output = _mm512_fmadd_ps(overlap, added.change[v], _mm512_mul_ps(decay, sums.query[v]));
      StoreFloats(output, outputs + offset + v * kFloatLanes, tile.mask[v]);
    }
    return added;
  }
};

ffi::Error CheckForm(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                     const ffi::Buffer<ffi::F32>& states) {
  const auto key = k.dimensions(), value = v.dimensions(), state = states.dimensions();
  const bool has_sizes = key.size() == 4 && value.size() == 5 && state.size() == 6 && state[0] == 1 &&
                         std::equal(key.begin(), key.begin() + 3, value.begin()) && state[2] == value[2] &&
                         state[3] == value[3] && state[4] == key[3] && state[5] == value[4] &&
                         q.element_count() == k.element_count() && k.element_count() > 0 && v.element_count() > 0;
  const ffi::DataType dtype = v.element_type();
  if (has_sizes && q.element_type() == dtype && k.element_type() == dtype && (dtype == ffi::F32 || dtype == ffi::BF16)) {
    return ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument(
      "delta_rule takes queries and keys [B, T, G, K] and values [B, T, G, R, V] in float32 or bfloat16, and states "
      "[1, M, G, R, K, V] in float32");
}

ffi::Error DeltaRuleImpl(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::F32> gates, ffi::Buffer<ffi::F32> betas, ffi::Buffer<ffi::S32> slots,
                         ffi::Buffer<ffi::PRED> is_start, ffi::Buffer<ffi::PRED> continues, ffi::Buffer<ffi::F32> states,
                         ffi::Result<ffi::Buffer<ffi::F32>> outputs, ffi::Result<ffi::Buffer<ffi::F32>> new_states,
                         ffi::Result<ffi::Buffer<ffi::F32>> prepared) {
  if (ffi::Error error = CheckForm(q, k, v, states); error.failure()) return error;
  const auto key = k.dimensions(), value = v.dimensions();
  const Shape shape{value[0], value[1], value[2], value[3], key[3], value[4]};
  const auto num_gates = v.element_count() / shape.value_dim, num_prepared = k.element_count() / shape.key_dim;
  const auto num_rows = static_cast<size_t>(shape.num_rows);
  if (gates.element_count() != num_gates || betas.element_count() != num_gates || slots.element_count() != num_rows ||
      is_start.element_count() != num_rows || continues.element_count() != num_rows ||
      outputs->element_count() != v.element_count() || new_states->untyped_data() != states.untyped_data() ||
      prepared->element_count() != num_prepared * Prepared::Stride(shape.key_dim)) {
    return ffi::Error::InvalidArgument("delta_rule takes gates and step sizes [B, T, G, R] and rows [B], in place");
  }
  const auto chains = Chains(slots.typed_data(), is_start.typed_data(), continues.typed_data(), shape.num_rows,
                             states.dimensions()[1]);
  ClearOutsideOf(chains, shape.num_rows, outputs->element_count() / shape.num_rows, outputs->typed_data());

  const auto run = [&](auto float_type) {
    using Element = typename decltype(float_type)::Element;
    const auto* queries = static_cast<const Element*>(q.untyped_data());
    const auto* keys = static_cast<const Element*>(k.untyped_data());
    const int64_t stride = Prepared::Stride(shape.key_dim), count = num_prepared;
    ParallelFor(pool, (count + kPreparedPerJob - 1) / kPreparedPerJob, [&](int64_t job) {
      const FlushDenormals flush;
      for (int64_t i = job * kPreparedPerJob; i < std::min(count, (job + 1) * kPreparedPerJob); ++i) {
        Prepare(queries + i * shape.key_dim, keys + i * shape.key_dim, shape.key_dim, prepared->typed_data() + i * stride);
      }
    });
    const DeltaRule<Element> rule{shape,
                                  static_cast<const Element*>(v.untyped_data()),
                                  gates.typed_data(),
                                  betas.typed_data(),
                                  prepared->typed_data(),
                                  outputs->typed_data(),
                                  new_states->typed_data()};
    const bool is_step = shape.num_tokens == 1 && static_cast<int64_t>(chains.size()) == CountRows(chains);
    const int64_t size = (is_step ? kStepVectors : kTileVectors) * kFloatLanes;
    const int64_t num_heads = shape.key_heads * shape.group_size, num_tiles = (shape.value_dim + size - 1) / size;
    ParallelFor(pool, static_cast<int64_t>(chains.size()) * num_heads * num_tiles, [&](int64_t job) {
      const Chain& chain = chains[job / num_tiles / num_heads];
      const Columns columns{job / num_tiles % num_heads, job % num_tiles * size};
      is_step ? rule.template Run<kStepVectors>(chain, columns) : rule.template Run<kTileVectors>(chain, columns);
    });
    return ffi::Error::Success();
  };
  return v.element_type() == ffi::F32 ? run(Float32()) : run(BFloat16());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DeltaRuleInSlots, DeltaRuleImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

#endif
