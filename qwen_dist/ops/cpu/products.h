// Rows times weights, for processors with AVX512-BF16.
//
// A weight lies as the checkpoint stores it, out-features first, so the sum over the inputs runs along memory for both
// operands: six rows and four features at a time, in 24 registers, which are summed up at the end. Each number is therefore
// summed in the same order whatever else is computed beside it. Weights are read once, in blocks that stay in the core's own
// cache while all rows are multiplied with them; the next block is fetched in the meantime, which hides the memory.

#pragma once

#include <cstring>
#include <vector>

#include "simd.h"

namespace {

constexpr int kRows = 6, kFeatures = 4;  // of a tile; 24 sums, 4 weights and a row are 29 of 32 registers
// Of a weight at a time. Rows that a core's own cache does not hold come from further away once for each block: a larger one.
constexpr int64_t kBlockBytes = 64 << 10, kLargeBlockBytes = 256 << 10, kOwnCache = 1 << 20;
constexpr int kMaxBlock = 64;         // features
constexpr int64_t kShare = 4;         // a thread takes one in so many of its share of the blocks that are left
constexpr int64_t kPartsOfGroup = 4;  // at least: groups may have very different numbers of rows
constexpr int64_t kRowsOfJob = 16;    // when they are copied
constexpr int kLine = 64;             // bytes

// The sums of four vectors' elements.
AVX512 INLINE __m128 Sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

AVX512 INLINE void StoreTile(__m128 sums, float* to) { _mm_storeu_ps(to, sums); }
AVX512 INLINE void StoreTile(__m128 sums, uint16_t* to) {
  const __m128bh rounded = _mm_cvtneps_pbh(sums);
  std::memcpy(to, &rounded, kFeatures * sizeof(*to));
}

// Adds `number` products to each sum, or as many as a vector has; from input i on.
template <class Type, int rows, class... Number>
AVX512 INLINE void Step(const typename Type::Element* const (&x)[rows], const typename Type::Element* weight,
                        int64_t inputs, int64_t i, __m512 (&sums)[rows][kFeatures], Number... number) {
  typename Type::Vector w[kFeatures];
  UNROLL for (int f = 0; f < kFeatures; ++f) w[f] = Type::Load(weight + f * inputs + i, number...);
  UNROLL for (int r = 0; r < rows; ++r) {
    const auto row = Type::Load(x[r] + i, number...);
    UNROLL for (int f = 0; f < kFeatures; ++f) sums[r][f] = Type::Add(sums[r][f], row, w[f]);
  }
}

// The rows of a group: one after the other, or where `index` has them.
template <class Element>
struct Rows {
  Element* first;
  int64_t size;
  const int32_t* index = nullptr;

  Element* operator[](int64_t row) const { return first + (index == nullptr ? row : index[row]) * size; }
};

// Rows put where `spaced` has room for them, if it has: further apart than they are. A multiple of 4096 bytes apart, they would
// all want the same lines of a core's cache.
template <class Element>
Rows<const Element> Spaced(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, ffi::Result<ffi::AnyBuffer>& spaced) {
  const auto shape = x.dimensions();
  const Rows<const Element> rows{static_cast<const Element*>(x.untyped_data()), shape[1]};
  if (spaced->element_count() == 0) return rows;
  const Rows<Element> to{static_cast<Element*>(spaced->untyped_data()), spaced->dimensions()[1]};
  ForEach(pool, (shape[0] + kRowsOfJob - 1) / kRowsOfJob, [&](int64_t job) {
    for (int64_t row = job * kRowsOfJob; row < std::min(shape[0], (job + 1) * kRowsOfJob); ++row) {
      std::memcpy(to[row], rows[row], shape[1] * sizeof(Element));
    }
  });
  return {to.first, to.size};
}

// y[row][f] = sum over the inputs of x[row] * weight[f], for some rows from one on and the features from f = `feature` on;
// for each vector of inputs it fetches `lines` of memory from `ahead` on.
template <class Type, class Result, int rows>
AVX512 void Tile(Rows<const typename Type::Element> x, int64_t first, const typename Type::Element* weight, int64_t inputs,
                 Rows<Result> y, int64_t feature, const char* ahead, int lines) {
  const typename Type::Element* row[rows];
  UNROLL for (int r = 0; r < rows; ++r) row[r] = x[first + r];
  weight += feature * inputs;
  __m512 sums[rows][kFeatures];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kFeatures; ++f) sums[r][f] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + Type::kLanes <= inputs; i += Type::kLanes) {
    for (int line = 0; line < lines; ++line, ahead += kLine) _mm_prefetch(ahead, _MM_HINT_T1);
    Step<Type, rows>(row, weight, inputs, i, sums);
  }
  if (i < inputs) Step<Type, rows>(row, weight, inputs, i, sums, static_cast<int>(inputs - i));
  UNROLL for (int r = 0; r < rows; ++r) {
    StoreTile(Sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), y[first + r] + feature);
  }
}

template <class Type, class Result>
constexpr decltype(&Tile<Type, Result, 1>) kTiles[] = {Tile<Type, Result, 1>, Tile<Type, Result, 2>,
                                                       Tile<Type, Result, 3>, Tile<Type, Result, 4>,
                                                       Tile<Type, Result, 5>, Tile<Type, Result, 6>};

// All rows of a group times some features of its weight, while as many from `next` on are fetched, unless it is null. Before
// less than a tile of features there must be others, of which some are then done again.
template <class Type, class Result>
void Block(Rows<const typename Type::Element> x, int64_t rows, const typename Type::Element* weight, int64_t inputs,
           Rows<Result> y, int64_t features, const typename Type::Element* next) {
  const int64_t num_tiles = (rows + kRows - 1) / kRows;
  const int lines = next == nullptr ? 0 : static_cast<int>((kFeatures + num_tiles - 1) / num_tiles);
  const int64_t tile_bytes = lines * (inputs / Type::kLanes) * kLine;
  const char* ahead = reinterpret_cast<const char*>(next);
  const char* const end = ahead + features * inputs * sizeof(*weight);
  for (int64_t tile = num_tiles, row = 0; tile > 0; --tile) {
    const int64_t number = (rows - row + tile - 1) / tile;
    for (int64_t f = 0; f < features; f += kFeatures) {
      kTiles<Type, Result>[number - 1](x, row, weight, inputs, y, std::min(f, features - kFeatures), ahead,
                                       ahead < end ? lines : 0);
      ahead += tile_bytes;
    }
    row += number;
  }
}

// Rows that have the same weight.
struct Group {
  int64_t index, first, rows;
};

// The groups that have rows, of which there are `num_rows`, the largest first.
inline std::vector<Group> Groups(const int32_t* sizes, int64_t number, int64_t num_rows) {
  std::vector<Group> groups;
  for (int64_t index = 0, first = 0; index < number && first < num_rows; first += sizes[index++]) {
    const int64_t rows = std::min<int64_t>(sizes[index], num_rows - first);
    if (rows > 0) groups.push_back({index, first, rows});
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.rows > b.rows; });
  return groups;
}

// Some features of a group's weight.
struct Part {
  Group group;
  int64_t first, last;
};

// Calls job(part, next) with parts of each group's features, as large as stays in a core's own cache. `next` is what the same
// thread will be called with then, or null. Threads take parts that follow each other, and fewer the fewer are left, so that
// they come to the end together. Every other thread begins with the last groups, of few rows: these keep the memory
// busy, and those of many the cores.
template <class Element, class Job>
void ForEachPart(ffi::ThreadPool& pool, const std::vector<Group>& groups, int64_t outputs, int64_t inputs, const Job& job) {
  const int64_t feature_bytes = kFeatures * inputs * sizeof(Element);
  const int64_t most_rows = groups.empty() ? 0 : groups.front().rows;
  const int64_t bytes = most_rows * inputs * sizeof(Element) > kOwnCache ? kLargeBlockBytes : kBlockBytes;
  const int64_t size = std::clamp<int64_t>(bytes / feature_bytes * kFeatures, kFeatures, kMaxBlock);
  const int64_t of_group = (outputs + size - 1) / size, number = of_group * groups.size();
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t most = groups.size() == 1 ? number : (of_group + kPartsOfGroup - 1) / kPartsOfGroup;
  struct Span {
    int32_t first, last;
  };
  std::atomic<Span> left{Span{0, static_cast<int32_t>(number)}};
  const auto take = [&](bool at_end) {
    Span before = left.load(), after, taken;
    do {
      const int64_t share = (before.last - before.first) / (threads * kShare);
      const auto some = std::min<int32_t>(std::clamp<int64_t>(share, 1, most), before.last - before.first);
      taken = at_end ? Span{before.last - some, before.last} : Span{before.first, before.first + some};
      after = at_end ? Span{before.first, taken.first} : Span{taken.last, before.last};
    } while (!left.compare_exchange_weak(before, after));
    return taken;
  };
  const auto part = [&](int64_t index) {
    const int64_t first = index % of_group * size;
    return Part{groups[index / of_group], first, std::min(outputs, first + size)};
  };
  ForEach(pool, std::min(threads, number), [&](int64_t thread) {
    const bool at_end = groups.size() > 1 && thread % 2 == 1;
    for (Span span = take(at_end), next; span.first < span.last; span = next) {
      for (int32_t index = span.first; index < span.last; ++index) {
        const bool is_last = index + 1 == span.last;
        if (is_last) next = take(at_end);
        if (is_last && next.first == next.last) {
          job(part(index), nullptr);
        } else {
          const Part following = part(is_last ? next.first : index + 1);
          job(part(index), &following);
        }
      }
    }
  });
}

}  // namespace
