// Paged attention: queries times the pages of a key/value cache.
//
// One job is a range of query rows that share a key head. It goes over the pages of their sequence in the order of
// positions, with a running softmax. The keys of a page are transposed once, so that a row's 64 scores are a few registers.
// Where the processor multiplies pairs of 16-bit floats, values of two positions are interleaved, which is also the form that
// AMX multiplies; elsewhere both are widened. As many scores as registers hold are computed at a time. A row's result is
// computed in the same order whatever the other rows are. A page in int8 is dequantised to the queries' type first, into
// memory that the first caches hold.

#pragma once

#include <vector>

#include "amx_attention.h"
#include "parallel.h"
#include "rows.h"
#include "running_softmax.h"
#include "simd.h"

namespace {

// A tile's rows, and registers per row: for scores of a page, or columns of the values.
template <class Type>
constexpr int kAttendRows = Type::kPacks ? kTileSize : kRegisters == 32 ? 6 : 3;
constexpr int kAttendVectors = 4;
constexpr int kAttendSize = kAttendVectors * kFloatLanes;
template <class Type>
constexpr int64_t kRowsPerJob = Type::kPacks ? 128 : 120;  // a multiple of a tile's rows

using Words = const float*;  // each is a float32 or, if the type has pairs, two 16-bit floats

// What a word has of a type: one element, widened if it is not float32, or two.
template <class Type>
constexpr int kPerWord = sizeof(float) / sizeof(typename Type::Row);

template <class Type>
SIMD INLINE Floats LoadWords(const typename Type::Element* from, Lanes lanes) {
  if constexpr (kPerWord<Type> == 2) {
    return Load(reinterpret_cast<const float*>(from), lanes);
  } else {
    return Load(from, lanes);
  }
}

// Transpose keys [kPageSize][num_words] to [num_words][kPageSize].
template <class Type>
SIMD void TransposeKeys(const typename Type::Element* keys, int64_t num_words, float* transposed) {
  constexpr int kSize = kFloatLanes, kStep = kPerWord<Type>;
  for (int64_t word = 0; word < num_words; word += kSize) {
    const Lanes lanes = FirstLanes(num_words - word);
    const int count = static_cast<int>(std::min<int64_t>(kSize, num_words - word));
    for (int position = 0; position < kPageSize; position += kSize) {
      Floats block[kSize];
      UNROLL for (int i = 0; i < kSize; ++i) {
        block[i] = LoadWords<Type>(keys + ((position + i) * num_words + word) * kStep, lanes);
      }
      Transpose(block);
      for (int i = 0; i < count; ++i) Store(block[i], transposed + (word + i) * kPageSize + position);
    }
  }
}

// Pack values [kPageSize][head_dim] into words with num_columns columns, padded with zeros. A word has one element, or
// those of two consecutive positions.
template <class Type>
SIMD void PackValues(const typename Type::Element* values, int64_t head_dim, int64_t num_columns, float* packed) {
  for (int64_t position = 0; position < kPageSize; position += kPerWord<Type>) {
    for (int64_t column = 0; column < num_columns; column += kFloatLanes) {
      const auto* const from = values + position * head_dim + column;
      Floats words = Set(0.0f);
      if (column < head_dim) {
        if constexpr (kPerWord<Type> == 2) {
          words = LoadInterleaved(from, from + head_dim);
        } else {
          words = Load(from);
        }
      }
      Store(words, packed + position / kPerWord<Type> * num_columns + column);
    }
  }
}

// Multiply values by their scales, of which every kScaled of them share one.
template <class Element>
SIMD void DequantizePage(const int8_t* values, const uint16_t* scales, int64_t count, Element* page) {
  for (int64_t i = 0; i < count; i += kScaled) {
    const uint32_t bits = static_cast<uint32_t>(scales[i / kScaled]) << 16;
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    UNROLL for (int lane = 0; lane < kScaled; lane += kFloatLanes) {
      Store(LoadBytes(values + i + lane) * Set(scale), page + i + lane);
    }
  }
}

// Multiply a word of one operand, broadcast to all lanes, with a vector of the other.
template <class Type>
SIMD INLINE Floats MultiplyAddWord(float word, Floats vector, Floats sum) {
  if constexpr (kPerWord<Type> == 2) {
    return Type::MultiplyAdd(Set(word), vector, sum);
  } else {
    return MultiplyAdd(Set(word), vector, sum);
  }
}

// Add the products of each row's words with vectors, which are `stride` words apart, to its sums.
template <class Type, int rows>
SIMD INLINE void MultiplyWords(Words row_words, int64_t row_stride, int64_t num_words, Words vectors, int64_t stride,
                               Floats (&sums)[rows][kAttendVectors]) {
  for (int64_t word = 0; word < num_words; ++word) {
    if constexpr (kRegisters == 32) {
      Floats vector[kAttendVectors];
      UNROLL for (int v = 0; v < kAttendVectors; ++v) vector[v] = Load(vectors + word * stride + v * kFloatLanes);
      UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kAttendVectors; ++v) {
        sums[r][v] = MultiplyAddWord<Type>(row_words[r * row_stride + word], vector[v], sums[r][v]);
      }
    } else {
      Floats row[rows];
      UNROLL for (int r = 0; r < rows; ++r) row[r] = Set(row_words[r * row_stride + word]);
      UNROLL for (int v = 0; v < kAttendVectors; ++v) {
        const Floats vector = Load(vectors + word * stride + v * kFloatLanes);
        UNROLL for (int r = 0; r < rows; ++r) sums[r][v] = MultiplyAdd(row[r], vector, sums[r][v]);
      }
    }
  }
}

// Process one page for a tile of rows. A row sees the page's positions [begin, end).
template <class Type, int rows>
SIMD void AttendTile(Words q, int64_t num_words, Words transposed_keys, Words packed_values, int64_t num_columns,
                     float scale, const int32_t* begin, const int32_t* end, RunningSoftmax* softmax, float* accumulator) {
  constexpr int kWeightWords = kPageSize / kPerWord<Type>;  // of a row
  Floats scores[rows][kPageVectors];
  UNROLL for (int first = 0; first < kPageVectors; first += kAttendVectors) {
    Floats sums[rows][kAttendVectors];
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kAttendVectors; ++v) sums[r][v] = Set(0.0f);
    MultiplyWords<Type, rows>(q, num_words, num_words, transposed_keys + first * kFloatLanes, kPageSize, sums);
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kAttendVectors; ++v) {
      scores[r][first + v] =
          KeepRange(sums[r][v] * Set(scale), (first + v) * kFloatLanes, begin[r], end[r]);
    }
  }
  alignas(64) typename Type::Row weights[rows][kPageSize];
  float rescale[rows];
  UNROLL for (int r = 0; r < rows; ++r) rescale[r] = AddScores(scores[r], &softmax[r], weights[r]);
  for (int64_t column = 0; column < num_columns; column += kAttendSize) {
    Floats sums[rows][kAttendVectors];
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kAttendVectors; ++v) {
      sums[r][v] = Load(accumulator + r * num_columns + column + v * kFloatLanes) * Set(rescale[r]);
    }
    MultiplyWords<Type, rows>(reinterpret_cast<Words>(weights), kWeightWords, kWeightWords, packed_values + column,
                              num_columns, sums);
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kAttendVectors; ++v) {
      Store(sums[r][v], accumulator + r * num_columns + column + v * kFloatLanes);
    }
  }
}

// Call AttendTile for a number of rows.
template <class Type, int max_rows, class... Arguments>
INLINE void AttendRows(int64_t num_rows, Arguments... arguments) {
  if constexpr (Type::kPacks) {
    AttendWithTiles(num_rows, arguments...);
  } else if (num_rows == max_rows) {
    AttendTile<Type, max_rows>(arguments...);
  } else if constexpr (max_rows > 1) {
    AttendRows<Type, max_rows - 1>(num_rows, arguments...);
  }
}

// A page that a sequence reads, and the position of its first key.
struct Entry {
  int32_t start, page;
};

template <class Type>
struct Attention {
  using Element = typename Type::Element;
  const PagedAttentionArguments& shape;

  // Compute rows [first, last) of a sequence and a key head: row t · G + g is query head g of token t.
  SIMD void operator()(int64_t sequence, int64_t head, int64_t first, int64_t last,
                       const std::vector<Entry>& entries) const {
    const int64_t head_dim = shape.head_dim, num_rows = last - first, head_words = head_dim / kPerWord<Type>;
    const int64_t num_words = Type::kPacks ? RoundUp(head_words, kTileSize) : head_words;  // the last ones are 0
    const int64_t num_columns = (head_dim + kAttendSize - 1) / kAttendSize * kAttendSize;
    std::vector<RunningSoftmax> softmax(num_rows, RunningSoftmax{std::numeric_limits<float>::lowest(), {}});
    std::vector<float> accumulator(num_rows * num_columns);
    std::vector<float> queries(num_rows * num_words), transposed(num_words * kPageSize), packed(num_columns * kPageSize);
    std::vector<Element> page_keys, page_values;  // of pages in int8
    const auto* const q = static_cast<const Element*>(shape.q);
    auto* const out = static_cast<Element*>(shape.out);
    std::vector<int32_t> begin(num_rows), end(num_rows);
    std::vector<int64_t> position(num_rows), row_offset(num_rows);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t token = sequence * shape.num_tokens + (first + row) / shape.group_size;
      position[row] = shape.positions[token];
      row_offset[row] =
          ((token * shape.num_key_heads + head) * shape.group_size + (first + row) % shape.group_size) * head_dim;
      CopyQuery(q + row_offset[row], head_words, &queries[row * num_words]);
    }
    const int64_t last_position = *std::max_element(position.begin(), position.end());
    for (const Entry& entry : entries) {
      if (entry.start > last_position) break;
      bool is_visible = false;
      for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t distance = position[row] - entry.start;  // from the page's first position
        end[row] = static_cast<int32_t>(std::clamp<int64_t>(distance + 1, 0, kPageSize));
        const int64_t first_visible = shape.window == 0 ? 0 : distance - shape.window + 1;
        begin[row] = static_cast<int32_t>(std::clamp<int64_t>(first_visible, 0, kPageSize));
        is_visible |= begin[row] < end[row];
      }
      if (!is_visible) continue;
      const int64_t first_position = (entry.page * shape.num_key_heads + head) * kPageSize;
      const Element* const keys = Page(shape.keys, shape.key_scales, first_position, page_keys);
      const Element* const values = Page(shape.values, shape.value_scales, first_position, page_values);
      TransposeKeys<Type>(keys, head_words, transposed.data());
      PackValues<Type>(values, head_dim, num_columns, packed.data());
      const int64_t num_tiles = CeilDivide(num_rows, kAttendRows<Type>);
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t row = num_rows * tile / num_tiles, tile_rows = num_rows * (tile + 1) / num_tiles - row;
        AttendRows<Type, kAttendRows<Type>>(tile_rows, &queries[row * num_words], num_words, transposed.data(), packed.data(),
                                            num_columns, shape.scale, &begin[row], &end[row], &softmax[row],
                                            &accumulator[row * num_columns]);
      }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      const float total = Sum(Load(softmax[row].total));
      const Floats divisor = Set(std::max(total, std::numeric_limits<float>::min()));
      for (int64_t column = 0; column < head_dim; column += kFloatLanes) {
        Store(Load(&accumulator[row * num_columns + column]) / divisor, out + row_offset[row] + column);
      }
    }
  }

 private:
  // Return the page [kPageSize][head_dim] of a head; one in int8 is dequantised into `page`.
  SIMD const Element* Page(const void* pool, const uint16_t* scales, int64_t first_position,
                           std::vector<Element>& page) const {
    const int64_t offset = first_position * shape.head_dim;
    if (scales == nullptr) return static_cast<const Element*>(pool) + offset;
    page.resize(kPageSize * shape.head_dim);
    DequantizePage(static_cast<const int8_t*>(pool) + offset, scales + offset / kScaled, page.size(), page.data());
    return page.data();
  }

  SIMD static void CopyQuery(const Element* from, int64_t num_words, float* to) {
    for (int64_t word = 0; word < num_words; word += kFloatLanes) {
      const Lanes lanes = FirstLanes(num_words - word);
      Store(LoadWords<Type>(from + word * kPerWord<Type>, lanes), to + word, lanes);
    }
  }
};

void PagedAttention(const Pool& pool, const PagedAttentionArguments& a) {
  std::vector<std::vector<Entry>> entries(a.num_rows);
  for (int64_t index = 0; index < a.num_entries; ++index) {
    const int32_t row = a.rows[index], page = a.pages[index];
    if (row < 0 || row >= a.num_rows || page < 0 || page >= a.num_pages) continue;
    entries[row].push_back({a.starts[index], page});
  }
  for (auto& of_sequence : entries) {
    std::sort(of_sequence.begin(), of_sequence.end(), [](const Entry& a, const Entry& b) { return a.start < b.start; });
  }
  WithType(a.dtype, [&](auto float_type) {
    using Type = decltype(float_type);
    const Attention<Type> attention{a};
    const int64_t num_rows = a.num_tokens * a.group_size;
    const int64_t jobs_per_head = CeilDivide(num_rows, kRowsPerJob<Type>);
    ParallelFor(pool, a.num_rows * a.num_key_heads * jobs_per_head, [&](int64_t job) {
      const int64_t range = job % jobs_per_head, sequence = job / jobs_per_head / a.num_key_heads;
      attention(sequence, job / jobs_per_head % a.num_key_heads, num_rows * range / jobs_per_head,
                num_rows * (range + 1) / jobs_per_head, entries[sequence]);
    });
  });
}

}  // namespace
