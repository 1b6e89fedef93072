// Attention of queries to the pages of a key/value cache, for processors with AVX512-BF16: see ../native.py.
//
// One job is some query rows that share a key head; it goes over the pages of their sequence in the order of positions, with
// a running maximum (arXiv:2205.14135). Of a page the keys are turned over once, so that 64 scores of a row are four
// registers, and of 16-bit values two positions are put side by side, which is what the processor multiplies. Six rows'
// scores, 24 registers, never leave the processor before they are weights. What a row gets is computed in the same order
// whatever else is computed beside it.

#if defined(__x86_64__) && defined(__GNUC__)

#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

namespace {

constexpr int kRows = 6;         // of a tile
constexpr int kPage = 64;        // positions
constexpr int kVectors = 4;      // of 16 floats: a page's scores, or as many columns of the values
constexpr int64_t kJobRows = 120;

using Ints = const int32_t*;

// Rows and columns of 16 × 16 words changed over.
AVX512 INLINE void Transpose(__m512i (&x)[16]) {
  __m512i y[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  UNROLL for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i % 4 + i / 4 * 4], y[i % 4 + i / 4 * 4 + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i % 4 + i / 4 * 4], y[i % 4 + i / 4 * 4 + 8], 0xdd);
  }
}

// Keys [kPage][words] turned over: [words][kPage]. A word is a float32, or two 16-bit floats.
AVX512 void TurnOver(Ints keys, int64_t words, int32_t* turned) {
  for (int64_t word = 0; word < words; word += 16) {
    const int number = static_cast<int>(std::min<int64_t>(16, words - word));
    const auto mask = static_cast<__mmask16>((1u << number) - 1);
    for (int position = 0; position < kPage; position += 16) {
      __m512i block[16];
      UNROLL for (int i = 0; i < 16; ++i) block[i] = _mm512_maskz_loadu_epi32(mask, keys + (position + i) * words + word);
      Transpose(block);
      for (int i = 0; i < number; ++i) _mm512_storeu_si512(turned + (word + i) * kPage + position, block[i]);
    }
  }
}

// Values [kPage][width] with so many positions side by side as a word holds, and `columns` of them, the last ones zeros.
AVX512 void Pair(const float* values, int64_t width, int64_t columns, int32_t* paired) {
  for (int64_t position = 0; position < kPage; ++position) {
    for (int64_t column = 0; column < columns; column += kFloats) {
      const __m512 row = column < width ? _mm512_loadu_ps(values + position * width + column) : _mm512_setzero_ps();
      _mm512_storeu_ps(paired + position * columns + column, row);
    }
  }
}
AVX512 void Pair(const uint16_t* values, int64_t width, int64_t columns, int32_t* paired) {
  const auto load = [&](int64_t position, int64_t column) AVX512 {
    return _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + position * width + column)));
  };
  for (int64_t position = 0; position < kPage; position += 2) {
    for (int64_t column = 0; column < columns; column += kFloats) {
      __m512i pair = _mm512_setzero_si512();
      if (column < width) {
        pair = _mm512_or_si512(load(position, column), _mm512_slli_epi32(load(position + 1, column), 16));
      }
      _mm512_storeu_si512(paired + position / 2 * columns + column, pair);
    }
  }
}

// A word of one operand, with itself in all lanes, and a vector of the other.
AVX512 INLINE __m512 Add(Float32, __m512 sum, int32_t word, __m512i vector) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(word)), _mm512_castsi512_ps(vector), sum);
}
AVX512 INLINE __m512 Add(BFloat16, __m512 sum, int32_t word, __m512i vector) {
  return BFloat16::Add(sum, _mm512_set1_epi32(word), vector);
}

// What is known of a row so far: the highest score, the sum of the weights relative to it (in 16 parts), the weighed values.
struct Row {
  float highest;
  float total[kFloats];
};

// One page for some rows. `firsts` and `lasts` say which slots each row sees, from one up to, not including, another.
template <class Type, int rows>
AVX512 void Tile(Ints q, int64_t words, Ints turned_keys, Ints paired_values, int64_t columns, float scale, Ints firsts,
                 Ints lasts, Row* known, float* mixed) {
  constexpr int kWords = kPage * static_cast<int>(sizeof(typename Type::Element)) / 4;  // of a row's weights
  __m512 scores[rows][kVectors];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kVectors; ++v) scores[r][v] = _mm512_setzero_ps();
  for (int64_t word = 0; word < words; ++word) {
    __m512i keys[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) keys[v] = _mm512_loadu_si512(turned_keys + word * kPage + v * kFloats);
    UNROLL for (int r = 0; r < rows; ++r) {
      UNROLL for (int v = 0; v < kVectors; ++v) scores[r][v] = Add(Type(), scores[r][v], q[r * words + word], keys[v]);
    }
  }
  alignas(64) typename Type::Element weights[rows][kPage];
  float shrink[rows];
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  UNROLL for (int r = 0; r < rows; ++r) {
    const __m512i first = _mm512_set1_epi32(firsts[r]), last = _mm512_set1_epi32(lasts[r]);
    UNROLL for (int v = 0; v < kVectors; ++v) {
      const __m512i slot = _mm512_add_epi32(lanes, _mm512_set1_epi32(v * kFloats));
      const __mmask16 seen = _mm512_cmpge_epi32_mask(slot, first) & _mm512_cmplt_epi32_mask(slot, last);
      scores[r][v] = _mm512_mask_mul_ps(nothing, seen, scores[r][v], _mm512_set1_ps(scale));
    }
    const __m512 most = _mm512_max_ps(_mm512_max_ps(scores[r][0], scores[r][1]), _mm512_max_ps(scores[r][2], scores[r][3]));
    const float highest = std::max(known[r].highest, _mm512_reduce_max_ps(most));
    const __m512 shrunk = Exp(_mm512_set1_ps(known[r].highest - highest));
    __m512 total = _mm512_mul_ps(_mm512_loadu_ps(known[r].total), shrunk);
    UNROLL for (int v = 0; v < kVectors; ++v) {
      const __m512 weight = Exp(_mm512_sub_ps(scores[r][v], _mm512_set1_ps(highest)));
      total = _mm512_add_ps(total, weight);
      Store(weight, weights[r] + v * kFloats);
    }
    known[r].highest = highest;
    shrink[r] = _mm512_cvtss_f32(shrunk);
    _mm512_storeu_ps(known[r].total, total);
  }
  for (int64_t column = 0; column < columns; column += kVectors * kFloats) {
    __m512 sums[rows][kVectors];
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kVectors; ++v) {
      const __m512 before = _mm512_loadu_ps(mixed + r * columns + column + v * kFloats);
      sums[r][v] = _mm512_mul_ps(before, _mm512_set1_ps(shrink[r]));
    }
    for (int word = 0; word < kWords; ++word) {
      __m512i values[kVectors];
      UNROLL for (int v = 0; v < kVectors; ++v) {
        values[v] = _mm512_loadu_si512(paired_values + word * columns + column + v * kFloats);
      }
      UNROLL for (int r = 0; r < rows; ++r) {
        const int32_t weight = reinterpret_cast<const int32_t*>(weights[r])[word];
        UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = Add(Type(), sums[r][v], weight, values[v]);
      }
    }
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(mixed + r * columns + column + v * kFloats, sums[r][v]);
    }
  }
}

template <class Type>
constexpr decltype(&Tile<Type, 1>) kTiles[] = {Tile<Type, 1>, Tile<Type, 2>, Tile<Type, 3>,
                                               Tile<Type, 4>, Tile<Type, 5>, Tile<Type, 6>};

struct Visit {
  int32_t start, page;
};

struct Sizes {
  int64_t tokens, key_heads, group, width;  // T, K, G, H
};

template <class Type>
struct Attention {
  using Element = typename Type::Element;
  Sizes sizes;
  const Element *q, *keys, *values;
  Ints positions;
  float scale;
  int64_t window;  // 0 for none
  Element* out;

  // The rows [first, last) of a sequence and a key head, counted over tokens and the query heads of each.
  AVX512 void operator()(int64_t sequence, int64_t head, int64_t first, int64_t last,
                         const std::vector<Visit>& visits) const {
    const int64_t width = sizes.width, rows = last - first, words = width * sizeof(Element) / 4;
    const int64_t columns = (width + kPage - 1) / kPage * kPage;
    std::vector<Row> known(rows, Row{std::numeric_limits<float>::lowest(), {}});
    std::vector<float> mixed(rows * columns);
    std::vector<int32_t> queries(rows * words), turned(words * kPage), paired(columns * kPage), firsts(rows), lasts(rows);
    std::vector<int64_t> position(rows), place(rows);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = sequence * sizes.tokens + (first + row) / sizes.group;
      position[row] = positions[token];
      place[row] = ((token * sizes.key_heads + head) * sizes.group + (first + row) % sizes.group) * width;
      std::memcpy(&queries[row * words], q + place[row], width * sizeof(Element));
    }
    const int64_t latest = *std::max_element(position.begin(), position.end());
    for (const Visit& visit : visits) {
      if (visit.start > latest) break;
      bool is_seen = false;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t distance = position[row] - visit.start;  // to the first slot
        lasts[row] = static_cast<int32_t>(std::clamp<int64_t>(distance + 1, 0, kPage));
        firsts[row] = window == 0 ? 0 : static_cast<int32_t>(std::clamp<int64_t>(distance - window + 1, 0, kPage));
        is_seen |= firsts[row] < lasts[row];
      }
      if (!is_seen) continue;
      const int64_t offset = (visit.page * sizes.key_heads + head) * kPage * width;
      TurnOver(reinterpret_cast<Ints>(keys + offset), words, turned.data());
      Pair(values + offset, width, columns, paired.data());
      const int64_t tiles = (rows + kRows - 1) / kRows;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t from = rows * tile / tiles, number = rows * (tile + 1) / tiles - from;
        kTiles<Type>[number - 1](&queries[from * words], words, turned.data(), paired.data(), columns, scale, &firsts[from],
                                 &lasts[from], &known[from], &mixed[from * columns]);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(known[row].total));
      const __m512 by = _mm512_set1_ps(std::max(total, std::numeric_limits<float>::min()));
      for (int64_t column = 0; column < width; column += kFloats) {
        Store(_mm512_div_ps(_mm512_loadu_ps(&mixed[row * columns + column]), by), out + place[row] + column);
      }
    }
  }
};

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::S32> pages,
                  ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> num_visits, ffi::Result<ffi::AnyBuffer> out,
                  float scale, int64_t window) {
  const auto shape = q.dimensions(), pages_shape = keys.dimensions();  // [B, T, N, H], [1, P, K, S, H]
  if (shape.size() != 4 || pages_shape.size() != 5 || pages_shape[0] != 1 || pages_shape[3] != kPage ||
      pages_shape[4] != shape[3] || shape[3] % kFloats != 0 || shape[2] % pages_shape[2] != 0) {
    return ffi::Error::InvalidArgument("queries [B, T, N, H] and pages [1, P, K, 64, H] are wanted, H a multiple of 16");
  }
  const Sizes sizes{shape[1], pages_shape[2], shape[2] / pages_shape[2], shape[3]};
  std::vector<std::vector<Visit>> visits(shape[0]);
  const int64_t number = std::min<int64_t>(num_visits.typed_data()[0], rows.element_count());
  for (int64_t index = 0; index < number; ++index) {
    const int32_t row = rows.typed_data()[index], page = pages.typed_data()[index];
    if (row < 0 || row >= shape[0] || page < 0 || page >= pages_shape[1]) continue;
    visits[row].push_back({starts.typed_data()[index], page});
  }
  for (auto& of_row : visits) {
    std::sort(of_row.begin(), of_row.end(), [](const Visit& a, const Visit& b) { return a.start < b.start; });
  }
  const auto attend = [&](auto of) {
    using Type = decltype(of);
    using Element = typename Type::Element;
    const Attention<Type> attention{sizes,
                                    static_cast<const Element*>(q.untyped_data()),
                                    static_cast<const Element*>(keys.untyped_data()),
                                    static_cast<const Element*>(values.untyped_data()),
                                    positions.typed_data(),
                                    scale,
                                    window,
                                    static_cast<Element*>(out->untyped_data())};
    const int64_t num_rows = sizes.tokens * sizes.group, parts = (num_rows + kJobRows - 1) / kJobRows;
    ForEach(pool, shape[0] * sizes.key_heads * parts, [&](int64_t job) {
      const int64_t part = job % parts, sequence = job / parts / sizes.key_heads;
      attention(sequence, job / parts % sizes.key_heads, num_rows * part / parts, num_rows * (part + 1) / parts,
                visits[sequence]);
    });
    return ffi::Error::Success();
  };
  if (q.element_type() == ffi::F32 && keys.element_type() == ffi::F32) return attend(Float32());
  if (q.element_type() == ffi::BF16 && keys.element_type() == ffi::U16) return attend(BFloat16());
  return ffi::Error::InvalidArgument("float32, or bfloat16 and pages of its bits, are wanted");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedAttention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));

#endif
