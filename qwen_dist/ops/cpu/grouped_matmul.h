// Products of rows and weights, for processors with AVX512-BF16.
//
// A weight is stored as in the checkpoint, out-features first, so both operands of a dot product are contiguous. A tile has
// six rows and four features: 24 registers of partial sums, added up at the end. A result is therefore summed in the same
// order whatever the other rows are. Weights are read once, in blocks that stay in the L2 cache while all rows are
// multiplied with them. The next block is prefetched in the meantime, which hides the time that the memory takes.

#pragma once

#include <cstring>
#include <vector>

#include "simd.h"

namespace {

constexpr int kTileRows = 6, kTileFeatures = 4;  // 24 sums, 4 weights and a row take 29 of 32 registers
// Bytes of a weight's block. Rows that do not fit in the L2 cache are read again for each block, so blocks are larger then.
constexpr int64_t kBlockBytes = 64 << 10, kLargeBlockBytes = 256 << 10, kL2Bytes = 1 << 20;
constexpr int kMaxBlockFeatures = 64;
constexpr int64_t kClaimDivisor = 4;       // a thread claims 1 / 4 of its share of the remaining blocks at a time
constexpr int64_t kMinClaimsPerGroup = 4;  // groups may have very different numbers of rows
constexpr int64_t kCopyRowsPerJob = 16;
constexpr int kCacheLine = 64;  // bytes

// The sums of the elements of each of four vectors.
AVX512 INLINE __m128 HorizontalSums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

AVX512 INLINE void StoreSums(__m128 sums, float* to) { _mm_storeu_ps(to, sums); }
AVX512 INLINE void StoreSums(__m128 sums, uint16_t* to) {
  const __m128bh rounded = _mm_cvtneps_pbh(sums);
  std::memcpy(to, &rounded, kTileFeatures * sizeof(*to));
}

// Add the products of inputs i, i + 1, … to the sums: `count` inputs if it is given, else a full vector.
template <class Type, int rows, class... Count>
AVX512 INLINE void Accumulate(const typename Type::Element* const (&x)[rows], const typename Type::Element* weight,
                              int64_t num_inputs, int64_t i, __m512 (&sums)[rows][kTileFeatures], Count... count) {
  typename Type::Vector w[kTileFeatures];
  UNROLL for (int f = 0; f < kTileFeatures; ++f) w[f] = Type::Load(weight + f * num_inputs + i, count...);
  UNROLL for (int r = 0; r < rows; ++r) {
    const auto row = Type::Load(x[r] + i, count...);
    UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = Type::MultiplyAdd(sums[r][f], row, w[f]);
  }
}

// Rows of a matrix, `stride` elements apart; with `index`, row r is the matrix's row index[r].
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;
  const int32_t* index = nullptr;

  Element* operator[](int64_t row) const { return data + (index == nullptr ? row : index[row]) * stride; }
};

// Copy the rows to `scratch`, whose rows are further apart, unless it is empty. Rows at a multiple of 4096 bytes from each
// other would compete for the same lines of the L1 cache.
template <class Element>
Rows<const Element> WithPaddedStride(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, ffi::Result<ffi::AnyBuffer>& scratch) {
  const auto shape = x.dimensions();
  const Rows<const Element> rows{static_cast<const Element*>(x.untyped_data()), shape[1]};
  if (scratch->element_count() == 0) return rows;
  const Rows<Element> to{static_cast<Element*>(scratch->untyped_data()), scratch->dimensions()[1]};
  ParallelFor(pool, (shape[0] + kCopyRowsPerJob - 1) / kCopyRowsPerJob, [&](int64_t job) {
    for (int64_t row = job * kCopyRowsPerJob; row < std::min(shape[0], (job + 1) * kCopyRowsPerJob); ++row) {
      std::memcpy(to[row], rows[row], shape[1] * sizeof(Element));
    }
  });
  return {to.data, to.stride};
}

// Compute y[row][f] = sum over the inputs of x[row] * weight[f], for rows from `first_row` on and kTileFeatures features
// from `feature` on. For each vector of inputs prefetch `prefetch_lines` cache lines, from `prefetch` on.
template <class Type, class Result, int rows>
AVX512 void MultiplyTile(Rows<const typename Type::Element> x, int64_t first_row, const typename Type::Element* weight,
                         int64_t num_inputs, Rows<Result> y, int64_t feature, const char* prefetch, int prefetch_lines) {
  const typename Type::Element* row[rows];
  UNROLL for (int r = 0; r < rows; ++r) row[r] = x[first_row + r];
  weight += feature * num_inputs;
  __m512 sums[rows][kTileFeatures];
  UNROLL for (int r = 0; r < rows; ++r) {
    UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = _mm512_setzero_ps();
  }
  int64_t i = 0;
  for (; i + Type::kLanes <= num_inputs; i += Type::kLanes) {
    for (int line = 0; line < prefetch_lines; ++line, prefetch += kCacheLine) _mm_prefetch(prefetch, _MM_HINT_T1);
    Accumulate<Type, rows>(row, weight, num_inputs, i, sums);
  }
  if (i < num_inputs) Accumulate<Type, rows>(row, weight, num_inputs, i, sums, static_cast<int>(num_inputs - i));
  UNROLL for (int r = 0; r < rows; ++r) {
    StoreSums(HorizontalSums(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), y[first_row + r] + feature);
  }
}

template <class Type, class Result>
constexpr decltype(&MultiplyTile<Type, Result, 1>) kMultiplyTile[] = {
    MultiplyTile<Type, Result, 1>, MultiplyTile<Type, Result, 2>, MultiplyTile<Type, Result, 3>,
    MultiplyTile<Type, Result, 4>, MultiplyTile<Type, Result, 5>, MultiplyTile<Type, Result, 6>};

// Multiply all rows of a group with a block of features of its weight, and prefetch the block at `next_weight` unless it is
// null. If num_features is not a multiple of kTileFeatures, the last tile starts earlier, possibly before `weight`, and
// computes some features again.
template <class Type, class Result>
void MultiplyBlock(Rows<const typename Type::Element> x, int64_t num_rows, const typename Type::Element* weight,
                   int64_t num_inputs, Rows<Result> y, int64_t num_features, const typename Type::Element* next_weight) {
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  const int lines = next_weight == nullptr ? 0 : static_cast<int>((kTileFeatures + num_tiles - 1) / num_tiles);
  const int64_t tile_bytes = lines * (num_inputs / Type::kLanes) * kCacheLine;
  const char* prefetch = reinterpret_cast<const char*>(next_weight);
  const char* const end = prefetch + num_features * num_inputs * sizeof(*weight);
  for (int64_t tile = num_tiles, row = 0; tile > 0; --tile) {
    const int64_t tile_rows = (num_rows - row + tile - 1) / tile;
    for (int64_t f = 0; f < num_features; f += kTileFeatures) {
      kMultiplyTile<Type, Result>[tile_rows - 1](x, row, weight, num_inputs, y, std::min(f, num_features - kTileFeatures),
                                                 prefetch, prefetch < end ? lines : 0);
      prefetch += tile_bytes;
    }
    row += tile_rows;
  }
}

// Consecutive rows that are multiplied with the same weight, number `index`.
struct Group {
  int64_t index, first_row, num_rows;
};

// The groups that have rows, those with the most rows first. There are `num_rows` rows in all.
inline std::vector<Group> NonEmptyGroups(const int32_t* sizes, int64_t num_groups, int64_t num_rows) {
  std::vector<Group> groups;
  for (int64_t index = 0, first = 0; index < num_groups && first < num_rows; first += sizes[index++]) {
    const int64_t rows = std::min<int64_t>(sizes[index], num_rows - first);
    if (rows > 0) groups.push_back({index, first, rows});
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.num_rows > b.num_rows; });
  return groups;
}

// The features [begin, end) of a group's weight.
struct Block {
  Group group;
  int64_t begin, end;
};

// Call job(block, next) for blocks of each group's features that fit in the L2 cache. `next` is the block that the thread
// processes next, or null. Threads claim consecutive blocks, and fewer when fewer remain, so that they finish together.
// Every other thread starts from the last groups, which have few rows: these keep the memory busy while the groups with many
// rows keep the cores busy.
template <class Element, class Job>
void ParallelForBlocks(ffi::ThreadPool& pool, const std::vector<Group>& groups, int64_t num_features, int64_t num_inputs,
                       const Job& job) {
  const int64_t tile_bytes = kTileFeatures * num_inputs * sizeof(Element);
  const int64_t max_rows = groups.empty() ? 0 : groups.front().num_rows;
  const int64_t bytes = max_rows * num_inputs * sizeof(Element) > kL2Bytes ? kLargeBlockBytes : kBlockBytes;
  const int64_t size = std::clamp<int64_t>(bytes / tile_bytes * kTileFeatures, kTileFeatures, kMaxBlockFeatures);
  const int64_t blocks_per_group = (num_features + size - 1) / size, num_blocks = blocks_per_group * groups.size();
  const int64_t num_threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t max_claim =
      groups.size() == 1 ? num_blocks : (blocks_per_group + kMinClaimsPerGroup - 1) / kMinClaimsPerGroup;
  struct Range {
    int32_t begin, end;
  };
  std::atomic<Range> remaining{Range{0, static_cast<int32_t>(num_blocks)}};
  const auto claim = [&](bool from_end) {
    Range before = remaining.load(), after, claimed;
    do {
      const int64_t share = (before.end - before.begin) / (num_threads * kClaimDivisor);
      const auto count = std::min<int32_t>(std::clamp<int64_t>(share, 1, max_claim), before.end - before.begin);
      claimed = from_end ? Range{before.end - count, before.end} : Range{before.begin, before.begin + count};
      after = from_end ? Range{before.begin, claimed.begin} : Range{claimed.end, before.end};
    } while (!remaining.compare_exchange_weak(before, after));
    return claimed;
  };
  const auto block = [&](int64_t index) {
    const int64_t begin = index % blocks_per_group * size;
    return Block{groups[index / blocks_per_group], begin, std::min(num_features, begin + size)};
  };
  ParallelFor(pool, std::min(num_threads, num_blocks), [&](int64_t thread) {
    const bool from_end = groups.size() > 1 && thread % 2 == 1;
    for (Range range = claim(from_end), next; range.begin < range.end; range = next) {
      for (int32_t index = range.begin; index < range.end; ++index) {
        const bool is_last = index + 1 == range.end;
        if (is_last) next = claim(from_end);
        if (is_last && next.begin == next.end) {
          job(block(index), nullptr);
        } else {
          const Block following = block(is_last ? next.begin : index + 1);
          job(block(index), &following);
        }
      }
    }
  });
}

}  // namespace
