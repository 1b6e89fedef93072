// Paged attention: queries times the pages of a key/value cache, for processors with AVX512-BF16. See ../native.py.
//
// One job is a range of query rows that share a key head. It goes over the pages of their sequence in the order of
// positions, with a running softmax (arXiv:2205.14135). The keys of a page are transposed once, so that a row's 64 scores
// are four registers. 16-bit values of two positions are interleaved, as the processor's dot product needs them. The scores
// of six rows, 24 registers, stay in registers until they are weights. A row's result is computed in the same order
// whatever the other rows are.

#if defined(__x86_64__) && defined(__GNUC__)

#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

namespace {

constexpr int kTileRows = 6;
constexpr int kPageSize = 64;    // positions
constexpr int kTileVectors = 4;  // registers per row of a tile: the scores of a page, or 64 columns of the values
constexpr int64_t kRowsPerJob = 120;

using Words = const int32_t*;  // each is a float32, two 16-bit floats or an index

// Transpose 16 × 16 words.
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

// Transpose keys [kPageSize][num_words] to [num_words][kPageSize].
AVX512 void TransposeKeys(Words keys, int64_t num_words, int32_t* transposed) {
  for (int64_t word = 0; word < num_words; word += 16) {
    const int count = static_cast<int>(std::min<int64_t>(16, num_words - word));
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    for (int position = 0; position < kPageSize; position += 16) {
      __m512i block[16];
      UNROLL for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi32(mask, keys + (position + i) * num_words + word);
      }
      Transpose(block);
      for (int i = 0; i < count; ++i) _mm512_storeu_si512(transposed + (word + i) * kPageSize + position, block[i]);
    }
  }
}

// Pack values [kPageSize][head_dim] into words with num_columns columns, padded with zeros. A word has one float32, or the
// 16-bit floats of two consecutive positions.
AVX512 void PackValues(const float* values, int64_t head_dim, int64_t num_columns, int32_t* packed) {
  for (int64_t position = 0; position < kPageSize; ++position) {
    for (int64_t column = 0; column < num_columns; column += kFloatLanes) {
      const __m512 row = column < head_dim ? _mm512_loadu_ps(values + position * head_dim + column) : _mm512_setzero_ps();
      _mm512_storeu_ps(packed + position * num_columns + column, row);
    }
  }
}
AVX512 void PackValues(const uint16_t* values, int64_t head_dim, int64_t num_columns, int32_t* packed) {
  const auto load = [&](int64_t position, int64_t column) AVX512 {
    return _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + position * head_dim + column)));
  };
  for (int64_t position = 0; position < kPageSize; position += 2) {
    for (int64_t column = 0; column < num_columns; column += kFloatLanes) {
      __m512i pair = _mm512_setzero_si512();
      if (column < head_dim) {
        pair = _mm512_or_si512(load(position, column), _mm512_slli_epi32(load(position + 1, column), 16));
      }
      _mm512_storeu_si512(packed + position / 2 * num_columns + column, pair);
    }
  }
}

// Multiply a word of one operand, broadcast to all lanes, with a vector of the other.
AVX512 INLINE __m512 MultiplyAdd(Float32, __m512 sum, int32_t word, __m512i vector) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(word)), _mm512_castsi512_ps(vector), sum);
}
AVX512 INLINE __m512 MultiplyAdd(BFloat16, __m512 sum, int32_t word, __m512i vector) {
  return BFloat16::MultiplyAdd(sum, _mm512_set1_epi32(word), vector);
}

// A row's running softmax: the highest score so far, and the sum of the weights relative to it, by lane.
struct RunningSoftmax {
  float highest;
  float total[kFloatLanes];
};

// Process one page for a tile of rows. A row sees the page's positions [begin, end).
template <class Type, int rows>
AVX512 void AttendTile(Words q, int64_t num_words, Words transposed_keys, Words packed_values, int64_t num_columns,
                       float scale, Words begin, Words end, RunningSoftmax* softmax, float* accumulator) {
  constexpr int kWeightWords = kPageSize * static_cast<int>(sizeof(typename Type::Element)) / 4;  // of a row
  __m512 scores[rows][kTileVectors];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kTileVectors; ++v) scores[r][v] = _mm512_setzero_ps();
  for (int64_t word = 0; word < num_words; ++word) {
    __m512i keys[kTileVectors];
    UNROLL for (int v = 0; v < kTileVectors; ++v) {
      keys[v] = _mm512_loadu_si512(transposed_keys + word * kPageSize + v * kFloatLanes);
    }
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kTileVectors; ++v) {
      scores[r][v] = MultiplyAdd(Type(), scores[r][v], q[r * num_words + word], keys[v]);
    }
  }
  alignas(64) typename Type::Element weights[rows][kPageSize];
  float rescale[rows];
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 minus_infinity = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  UNROLL for (int r = 0; r < rows; ++r) {
    const __m512i first = _mm512_set1_epi32(begin[r]), last = _mm512_set1_epi32(end[r]);
    UNROLL for (int v = 0; v < kTileVectors; ++v) {
      const __m512i position = _mm512_add_epi32(lanes, _mm512_set1_epi32(v * kFloatLanes));
      const __mmask16 visible = _mm512_cmpge_epi32_mask(position, first) & _mm512_cmplt_epi32_mask(position, last);
      scores[r][v] = _mm512_mask_mul_ps(minus_infinity, visible, scores[r][v], _mm512_set1_ps(scale));
    }
    const __m512 largest =
        _mm512_max_ps(_mm512_max_ps(scores[r][0], scores[r][1]), _mm512_max_ps(scores[r][2], scores[r][3]));
    const float highest = std::max(softmax[r].highest, _mm512_reduce_max_ps(largest));
    const __m512 rescaled = Exp(_mm512_set1_ps(softmax[r].highest - highest));
    __m512 total = _mm512_mul_ps(_mm512_loadu_ps(softmax[r].total), rescaled);
    UNROLL for (int v = 0; v < kTileVectors; ++v) {
      const __m512 weight = Exp(_mm512_sub_ps(scores[r][v], _mm512_set1_ps(highest)));
      total = _mm512_add_ps(total, weight);
      StoreFloats(weight, weights[r] + v * kFloatLanes);
    }
    softmax[r].highest = highest;
    rescale[r] = _mm512_cvtss_f32(rescaled);
    _mm512_storeu_ps(softmax[r].total, total);
  }
  for (int64_t column = 0; column < num_columns; column += kTileVectors * kFloatLanes) {
    __m512 sums[rows][kTileVectors];
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kTileVectors; ++v) {
      const __m512 before = _mm512_loadu_ps(accumulator + r * num_columns + column + v * kFloatLanes);
      sums[r][v] = _mm512_mul_ps(before, _mm512_set1_ps(rescale[r]));
    }
    for (int word = 0; word < kWeightWords; ++word) {
      __m512i values[kTileVectors];
      UNROLL for (int v = 0; v < kTileVectors; ++v) {
        values[v] = _mm512_loadu_si512(packed_values + word * num_columns + column + v * kFloatLanes);
      }
      UNROLL for (int r = 0; r < rows; ++r) {
        const int32_t weight = reinterpret_cast<const int32_t*>(weights[r])[word];
        UNROLL for (int v = 0; v < kTileVectors; ++v) sums[r][v] = MultiplyAdd(Type(), sums[r][v], weight, values[v]);
      }
    }
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int v = 0; v < kTileVectors; ++v) {
      _mm512_storeu_ps(accumulator + r * num_columns + column + v * kFloatLanes, sums[r][v]);
    }
  }
}

template <class Type>
constexpr decltype(&AttendTile<Type, 1>) kAttendTile[] = {AttendTile<Type, 1>, AttendTile<Type, 2>, AttendTile<Type, 3>,
                                                          AttendTile<Type, 4>, AttendTile<Type, 5>, AttendTile<Type, 6>};

// A page that a sequence reads, and the position of its first key.
struct Entry {
  int32_t start, page;
};

struct Shape {
  int64_t num_tokens, num_key_heads, group_size, head_dim;  // T, K, G query heads per key head, H
};

template <class Type>
struct Attention {
  using Element = typename Type::Element;
  Shape shape;
  const Element *q, *keys, *values;
  Words positions;
  float scale;
  int64_t window;  // 0 for none
  Element* out;

  // Compute rows [first, last) of a sequence and a key head: row t · G + g is query head g of token t.
  AVX512 void operator()(int64_t sequence, int64_t head, int64_t first, int64_t last,
                         const std::vector<Entry>& entries) const {
    const int64_t head_dim = shape.head_dim, num_rows = last - first, num_words = head_dim * sizeof(Element) / 4;
    const int64_t num_columns = (head_dim + kPageSize - 1) / kPageSize * kPageSize;
    std::vector<RunningSoftmax> softmax(num_rows, RunningSoftmax{std::numeric_limits<float>::lowest(), {}});
    std::vector<float> accumulator(num_rows * num_columns);
    std::vector<int32_t> queries(num_rows * num_words), transposed(num_words * kPageSize), packed(num_columns * kPageSize);
    std::vector<int32_t> begin(num_rows), end(num_rows);
    std::vector<int64_t> position(num_rows), row_offset(num_rows);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t token = sequence * shape.num_tokens + (first + row) / shape.group_size;
      position[row] = positions[token];
      row_offset[row] =
          ((token * shape.num_key_heads + head) * shape.group_size + (first + row) % shape.group_size) * head_dim;
      std::memcpy(&queries[row * num_words], q + row_offset[row], head_dim * sizeof(Element));
    }
    const int64_t last_position = *std::max_element(position.begin(), position.end());
    for (const Entry& entry : entries) {
      if (entry.start > last_position) break;
      bool is_visible = false;
      for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t distance = position[row] - entry.start;  // from the page's first position
        end[row] = static_cast<int32_t>(std::clamp<int64_t>(distance + 1, 0, kPageSize));
        begin[row] = window == 0 ? 0 : static_cast<int32_t>(std::clamp<int64_t>(distance - window + 1, 0, kPageSize));
        is_visible |= begin[row] < end[row];
      }
      if (!is_visible) continue;
      const int64_t page_offset = (entry.page * shape.num_key_heads + head) * kPageSize * head_dim;
      TransposeKeys(reinterpret_cast<Words>(keys + page_offset), num_words, transposed.data());
      PackValues(values + page_offset, head_dim, num_columns, packed.data());
      const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t row = num_rows * tile / num_tiles, tile_rows = num_rows * (tile + 1) / num_tiles - row;
        kAttendTile<Type>[tile_rows - 1](&queries[row * num_words], num_words, transposed.data(), packed.data(),
                                         num_columns, scale, &begin[row], &end[row], &softmax[row],
                                         &accumulator[row * num_columns]);
      }
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(softmax[row].total));
      const __m512 divisor = _mm512_set1_ps(std::max(total, std::numeric_limits<float>::min()));
      for (int64_t column = 0; column < head_dim; column += kFloatLanes) {
        StoreFloats(_mm512_div_ps(_mm512_loadu_ps(&accumulator[row * num_columns + column]), divisor),
                    out + row_offset[row] + column);
      }
    }
  }
};

ffi::Error PagedAttentionImpl(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                              ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::S32> pages,
                              ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> num_entries,
                              ffi::Result<ffi::AnyBuffer> out, float scale, int64_t window) {
  const auto q_shape = q.dimensions(), pages_shape = keys.dimensions();  // [B, T, N, H], [1, P, K, S, H]
  if (q_shape.size() != 4 || pages_shape.size() != 5 || pages_shape[0] != 1 || pages_shape[3] != kPageSize ||
      pages_shape[4] != q_shape[3] || q_shape[3] % kFloatLanes != 0 || q_shape[2] % pages_shape[2] != 0) {
    return ffi::Error::InvalidArgument(
        "paged_attention takes queries [B, T, N, H] and pages [1, P, K, 64, H]; N is a multiple of K, and H of 16");
  }
  const Shape shape{q_shape[1], pages_shape[2], q_shape[2] / pages_shape[2], q_shape[3]};
  std::vector<std::vector<Entry>> entries(q_shape[0]);
  const int64_t count = std::min<int64_t>(num_entries.typed_data()[0], rows.element_count());
  for (int64_t index = 0; index < count; ++index) {
    const int32_t row = rows.typed_data()[index], page = pages.typed_data()[index];
    if (row < 0 || row >= q_shape[0] || page < 0 || page >= pages_shape[1]) continue;
    entries[row].push_back({starts.typed_data()[index], page});
  }
  for (auto& of_sequence : entries) {
    std::sort(of_sequence.begin(), of_sequence.end(), [](const Entry& a, const Entry& b) { return a.start < b.start; });
  }
  const auto attend = [&](auto float_type) {
    using Type = decltype(float_type);
    using Element = typename Type::Element;
    const Attention<Type> attention{shape,
                                    static_cast<const Element*>(q.untyped_data()),
                                    static_cast<const Element*>(keys.untyped_data()),
                                    static_cast<const Element*>(values.untyped_data()),
                                    positions.typed_data(),
                                    scale,
                                    window,
                                    static_cast<Element*>(out->untyped_data())};
    const int64_t num_rows = shape.num_tokens * shape.group_size;
    const int64_t jobs_per_head = (num_rows + kRowsPerJob - 1) / kRowsPerJob;
    ParallelFor(pool, q_shape[0] * shape.num_key_heads * jobs_per_head, [&](int64_t job) {
      const int64_t range = job % jobs_per_head, sequence = job / jobs_per_head / shape.num_key_heads;
      attention(sequence, job / jobs_per_head % shape.num_key_heads, num_rows * range / jobs_per_head,
                num_rows * (range + 1) / jobs_per_head, entries[sequence]);
    });
    return ffi::Error::Success();
  };
  if (q.element_type() == ffi::F32 && keys.element_type() == ffi::F32) return attend(Float32());
  if (q.element_type() == ffi::BF16 && keys.element_type() == ffi::U16) return attend(BFloat16());
  return ffi::Error::InvalidArgument("paged_attention takes float32, or bfloat16 queries and pages of their bits (uint16)");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedAttention, PagedAttentionImpl,
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
