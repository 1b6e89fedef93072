// Products of rows and weights.
//
// A weight is stored as in the checkpoint, out-features first, so both operands of a dot product are contiguous. A tile has
// a few rows and four features, as many as there are registers for partial sums, which are added up at the end. Each lane
// sums its inputs in their order, so a result has the same bits whatever the other rows are and however it is cut into
// blocks.
//
// A block of a weight stays in the L2 cache while all rows are multiplied with it. It takes rows in groups, whose inputs
// also stay there, and inputs in ranges, so that a tile's rows or features stay in the L1 cache while the others pass. The
// next block is prefetched in the meantime, which hides the time that the memory takes.
//
// A processor without instructions for bfloat16 widens it to float32, the even inputs of a vector apart from the odd ones,
// which takes two cheap instructions. Rows are widened once. So is a weight for a group of many rows; few rows widen it in
// registers. Both multiply the same numbers in the same order.

#pragma once

#include <type_traits>
#include <vector>

#include "amx_matmul.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace {

// A tile's rows: four sums for each, a vector of each row and one of a weight take 31 of 32 registers, or 16 of 16.
constexpr int kTileRows = kRegisters == 32 ? 6 : 3;
// Bytes of a weight's block. Rows that do not fit in the L2 cache are read again for each block, so blocks are larger then.
constexpr int64_t kBlockBytes = 64 << 10, kLargeBlockBytes = 256 << 10, kL2Bytes = 1 << 20;
constexpr int kMaxBlockFeatures = 64;
constexpr int64_t kGroupRows = 48;  // rows that pass while a tile's features are in the L1 cache
constexpr int64_t kRangeBytes = 28 << 10;  // of a tile's rows and features in a range of inputs
constexpr int64_t kMinPanelRows = kTileRows / 2 + 2;  // for which a weight is widened once
constexpr int64_t kLongFeatureBytes = 3 << 10;  // see ProcessorPrefetches
constexpr int64_t kClaimDivisor = 4;       // a thread claims 1 / 4 of its share of the remaining blocks at a time
constexpr int64_t kMinClaimsPerGroup = 4;  // groups may have very different numbers of rows

// Widen a row: of each vector of inputs the even ones, then the odd ones; zeros after the last.
SIMD INLINE void WidenRow(const uint16_t* from, int64_t num_inputs, float* to) {
  constexpr int kLanes = 2 * kFloatLanes;
  int64_t i = 0;
  for (; i + kLanes <= num_inputs; i += kLanes) {
    const auto pairs = LoadPairs(from + i);
    Store(Evens(pairs), to + i);
    Store(Odds(pairs), to + i + kFloatLanes);
  }
  if (i == num_inputs) return;
  const auto pairs = LoadPairs(from + i, static_cast<int>(num_inputs - i));
  Store(Evens(pairs), to + i);
  Store(Odds(pairs), to + i + kFloatLanes);
}
template <class Type>
SIMD void CopyRow(const typename Type::Element* from, int64_t num_inputs, typename Type::Row* to) {
  if constexpr (Type::kWidens) {
    WidenRow(from, num_inputs, to);
  } else {
    std::memcpy(to, from, num_inputs * sizeof(*to));
  }
}

// What MultiplyBlock reads rows from.
template <class Type>
using PreparedRows = std::conditional_t<Type::kPacks, PackedRows, Rows<const typename Type::Row>>;

// The rows to multiply: all `num_rows` of the matrix, of `num_inputs`. They are in `scratch` if there is one, widened or
// packed if the type is, and else taken where they are. Rows at a multiple of 4096 bytes from each other would compete for
// the same lines of the L1 cache, so those of the scratch are not.
template <class Type>
PreparedRows<Type> PrepareRows(const Pool& pool, Rows<const typename Type::Element> x, int64_t num_rows, int64_t num_inputs,
                               const std::vector<Group>& groups, const Scratch& scratch) {
  using Row = typename Type::Row;
  if constexpr (Type::kPacks) {
    return PackRows(pool, x, num_inputs, groups, scratch);
  } else {
    if (scratch.data == nullptr) return {reinterpret_cast<const Row*>(x.data), x.stride, x.index};
    const Rows<Row> to{static_cast<Row*>(scratch.data), scratch.stride};
    ParallelFor(pool, CeilDivide(num_rows, kCopyRowsPerJob), [&](int64_t job) {
      for (int64_t row = job * kCopyRowsPerJob; row < std::min(num_rows, (job + 1) * kCopyRowsPerJob); ++row) {
        CopyRow<Type>(x.data + row * x.stride, num_inputs, to[row]);
      }
    });
    return {to.data, to.stride, x.index};
  }
}

// Where the weights of a tile's features are: in the matrix, or in a panel, vector by vector.
template <class Element>
struct InMatrix {
  const Element* data;
  int64_t stride;
  SIMD INLINE const Element* operator()(int feature, int64_t input) const { return data + feature * stride + input; }
};
struct InPanel {
  const float* data;
  SIMD INLINE const float* operator()(int feature, int64_t input) const {
    return data + input * kTileFeatures + feature * kFloatLanes;
  }
};

// Add the products of inputs i, i + 1, … to the sums: `count` inputs if it is given, else a full vector. Rows or features,
// whichever are fewer, are loaded first and stay in registers.
template <class Type, int rows, class Weight, class... Count>
SIMD INLINE void AddProducts(const typename Type::Row* const (&x)[rows], const Weight& weight, int64_t i,
                             Floats (&sums)[rows][kTileFeatures], Count... count) {
  if constexpr (Type::kWidens) {
    UNROLL for (int half = 0; half < 2; ++half) {
      Floats row[rows];
      UNROLL for (int r = 0; r < rows; ++r) row[r] = Load(x[r] + i + half * kFloatLanes);
      UNROLL for (int f = 0; f < kTileFeatures; ++f) {
        const auto pairs = LoadPairs(weight(f, i), count...);
        const Floats w = half == 0 ? Evens(pairs) : Odds(pairs);
        UNROLL for (int r = 0; r < rows; ++r) sums[r][f] = MultiplyAdd(row[r], w, sums[r][f]);
      }
      // The compiler would keep the pairs for the other half, and there is no register for them.
      if (rows > kTileRows / 2) asm volatile("" : : : "memory");
    }
  } else if constexpr (rows > kTileFeatures) {
    Floats w[kTileFeatures];
    UNROLL for (int f = 0; f < kTileFeatures; ++f) w[f] = Type::LoadVector(weight(f, i), count...);
    UNROLL for (int r = 0; r < rows; ++r) {
      const Floats row = Type::LoadVector(x[r] + i, count...);
      UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = Type::MultiplyAdd(row, w[f], sums[r][f]);
    }
  } else {
    Floats row[rows];
    UNROLL for (int r = 0; r < rows; ++r) row[r] = Type::LoadVector(x[r] + i, count...);
    UNROLL for (int f = 0; f < kTileFeatures; ++f) {
      const Floats w = Type::LoadVector(weight(f, i), count...);
      UNROLL for (int r = 0; r < rows; ++r) sums[r][f] = Type::MultiplyAdd(row[r], w, sums[r][f]);
    }
  }
}

// A tile's part of a product: rows from `first_row` on, four features from `feature` on, a range of inputs.
template <class Row, class Result>
struct Tile {
  Rows<const Row> x;
  Rows<Result> y;
  int64_t first_row, feature, first_input, num_inputs;
  float* sums;  // between the ranges, if there are several
  bool is_first, is_last;
  // How many cache lines to prefetch for each vector of inputs.
  const char* prefetch;
  int prefetch_lines;
};

template <class Type, class Result, int rows, class Weight>
SIMD void MultiplyTile(const Tile<typename Type::Row, Result>& tile, const Weight& weight) {
  const typename Type::Row* x[rows];
  UNROLL for (int r = 0; r < rows; ++r) x[r] = tile.x[tile.first_row + r] + tile.first_input;
  Floats sums[rows][kTileFeatures];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kTileFeatures; ++f) sums[r][f] = Set(0.0f);
  if (!tile.is_first) {
    UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kTileFeatures; ++f) {
      sums[r][f] = Load(tile.sums + (r * kTileFeatures + f) * kFloatLanes);
    }
  }
  const int64_t num_inputs = tile.num_inputs;
  const char* prefetch = tile.prefetch;
  int64_t i = 0;
  for (; i + Type::kLanes <= num_inputs; i += Type::kLanes) {
    for (int line = 0; line < tile.prefetch_lines; ++line, prefetch += kCacheLine) Prefetch(prefetch);
    AddProducts<Type, rows>(x, weight, i, sums);
  }
  if (i < num_inputs) AddProducts<Type, rows>(x, weight, i, sums, static_cast<int>(num_inputs - i));
  UNROLL for (int r = 0; r < rows; ++r) {
    if (tile.is_last) {
      StoreSums(sums[r], tile.y[tile.first_row + r] + tile.feature);
    } else {
      UNROLL for (int f = 0; f < kTileFeatures; ++f) {
        Store(sums[r][f], tile.sums + (r * kTileFeatures + f) * kFloatLanes);
      }
    }
  }
}

// Call MultiplyTile for a number of rows.
template <class Type, class Result, int max_rows, class Weight>
INLINE void MultiplyTile(int64_t num_rows, const Tile<typename Type::Row, Result>& tile, const Weight& weight) {
  if (num_rows == max_rows) {
    MultiplyTile<Type, Result, max_rows>(tile, weight);
  } else if constexpr (max_rows > 1) {
    MultiplyTile<Type, Result, max_rows - 1>(num_rows, tile, weight);
  }
}

// Widen a range of inputs of a tile's features, which are `stride` elements apart, into a panel.
SIMD void WidenPanel(const uint16_t* weight, int64_t stride, int64_t num_inputs, float* panel) {
  constexpr int kLanes = 2 * kFloatLanes;
  const auto widen = [&](int64_t i, auto... count) SIMD {
    UNROLL for (int f = 0; f < kTileFeatures; ++f) {
      const auto pairs = LoadPairs(weight + f * stride + i, count...);
      Store(Evens(pairs), panel + i * kTileFeatures + f * kFloatLanes);
      Store(Odds(pairs), panel + (i + kFloatLanes) * kTileFeatures + f * kFloatLanes);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= num_inputs; i += kLanes) widen(i);
  if (i < num_inputs) widen(i, static_cast<int>(num_inputs - i));
}

// Memory of this thread, aligned to cache lines.
template <int purpose>
float* ThreadMemory(int64_t size) {
  struct alignas(kCacheLine) Line {
    float values[kCacheLine / sizeof(float)];
  };
  thread_local std::vector<Line> memory;
  const auto lines = static_cast<size_t>(CeilDivide(size, kCacheLine / sizeof(float)));
  if (memory.size() < lines) memory.resize(lines);
  return memory.data()->values;
}

// Whether the processor prefetches a weight better than instructions do. Intel's recognise that the inputs of four features are
// read in order, if there are enough of them.
inline bool ProcessorPrefetches(int64_t num_rows, int64_t feature_bytes) {
  return num_rows <= 2 && feature_bytes >= kLongFeatureBytes && IsIntel();
}

// Multiply all rows of a group with a block of features of its weight, and prefetch the block at `next_weight` unless it is
// null. If num_features is not a multiple of kTileFeatures, the last tile starts earlier, possibly before `weight`, and
// computes some features again.
template <class Type, class Result>
void MultiplyBlock(Rows<const typename Type::Row> x, int64_t num_rows, const typename Type::Element* weight,
                   int64_t num_inputs, Rows<Result> y, int64_t num_features, const typename Type::Element* next_weight) {
  using Row = typename Type::Row;
  constexpr int64_t kMaxRange = kRangeBytes / ((kTileRows + kTileFeatures) * sizeof(Row));
  const bool has_panel = Type::kWidens && num_rows >= kMinPanelRows;
  // A tile's features stay in the L1 cache while all rows pass, or if these are more, its rows while all features pass.
  const bool features_stay = has_panel || kTileFeatures > kTileRows;
  const int64_t num_ranges = features_stay && num_rows > kTileRows ? CeilDivide(num_inputs, kMaxRange) : 1;
  const int64_t range = RoundUp(CeilDivide(num_inputs, num_ranges), Type::kLanes);
  const int64_t feature_tiles = CeilDivide(num_features, kTileFeatures);
  const int64_t block_bytes = num_features * num_inputs * sizeof(*weight);
  // A tile prefetches a few cache lines for each vector of inputs, so that all row tiles together prefetch a block.
  const int64_t lanes = has_panel ? kFloatLanes : Type::kLanes;
  const int64_t lines_of_step = CeilDivide(kTileFeatures * lanes * sizeof(*weight), kCacheLine);
  const bool prefetches = next_weight != nullptr && !ProcessorPrefetches(num_rows, num_inputs * sizeof(*weight));
  const int64_t lines = prefetches ? CeilDivide(lines_of_step, CeilDivide(num_rows, kTileRows)) : 0;
  const char* prefetch = reinterpret_cast<const char*>(next_weight);
  const char* const prefetch_end = prefetch + block_bytes;
  constexpr int64_t kSumsSize = kTileRows * kTileFeatures * kFloatLanes;
  float* const sums = num_ranges == 1 ? nullptr : ThreadMemory<0>(feature_tiles * kGroupRows * kSumsSize / kTileRows);
  float* const panel = Type::kWidens ? ThreadMemory<1>(kTileFeatures * range) : nullptr;
  const int64_t max_group_rows = RoundUp(CeilDivide(num_rows, CeilDivide(num_rows, kGroupRows)), kTileRows);
  int64_t tile_begin[kGroupRows / kTileRows + 1];
  for (int64_t group_row = 0; group_row < num_rows; group_row += max_group_rows) {
    const int64_t group_rows = std::min(max_group_rows, num_rows - group_row);
    const int64_t num_tiles = CeilDivide(group_rows, kTileRows);
    // Tiles with more rows come first: the first tile waits for the block, and more products hide more of that time.
    for (int64_t tile = tile_begin[0] = 0; tile < num_tiles; ++tile) {
      tile_begin[tile + 1] = tile_begin[tile] + CeilDivide(group_rows - tile_begin[tile], num_tiles - tile);
    }
    for (int64_t input = 0; input < num_inputs; input += range) {
      const int64_t inputs = std::min(range, num_inputs - input);
      const int64_t prefetch_bytes = lines * kCacheLine * (has_panel ? inputs / kFloatLanes : inputs / Type::kLanes);
      Tile<Row, Result> tile;
      tile.x = x;
      tile.y = y;
      tile.first_input = input;
      tile.num_inputs = has_panel ? RoundUp(inputs, Type::kLanes) : inputs;
      tile.is_first = input == 0;
      tile.is_last = input + inputs == num_inputs;
      const auto multiply = [&](int64_t feature_tile, int64_t row_tile) {
        tile.first_row = group_row + tile_begin[row_tile];
        tile.feature = std::min(feature_tile * kTileFeatures, num_features - kTileFeatures);
        tile.sums = sums + (feature_tile * num_tiles + row_tile) * kSumsSize;
        tile.prefetch = prefetch;
        tile.prefetch_lines = prefetch < prefetch_end ? lines : 0;
        prefetch += prefetch_bytes;
        const int64_t tile_rows = tile_begin[row_tile + 1] - tile_begin[row_tile];
        const auto* const tile_weight = weight + tile.feature * num_inputs + input;
        if constexpr (Type::kWidens) {
          if (has_panel) {
            if (row_tile == 0) WidenPanel(tile_weight, num_inputs, inputs, panel);
            MultiplyTile<Float32, Result, kTileRows>(tile_rows, tile, InPanel{panel});
            return;
          }
        }
        MultiplyTile<Type, Result, kTileRows>(tile_rows, tile,
                                              InMatrix<typename Type::Element>{tile_weight, num_inputs});
      };
      if (features_stay) {
        for (int64_t f = 0; f < feature_tiles; ++f) for (int64_t r = 0; r < num_tiles; ++r) multiply(f, r);
      } else {
        for (int64_t r = 0; r < num_tiles; ++r) for (int64_t f = 0; f < feature_tiles; ++f) multiply(f, r);
      }
    }
  }
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
template <class Type, class Job>
void ParallelForBlocks(const Pool& pool, const std::vector<Group>& groups, int64_t num_features, int64_t num_inputs,
                       const Job& job) {
  using Element = typename Type::Element;
  constexpr int64_t kMultiple = Type::kPacks ? kPairedFeatures : kTileFeatures;
  const int64_t tile_bytes = kTileFeatures * num_inputs * sizeof(Element);
  const int64_t max_rows = groups.empty() ? 0 : groups.front().num_rows;
  const int64_t bytes = max_rows * num_inputs * sizeof(Element) > kL2Bytes ? kLargeBlockBytes : kBlockBytes;
  const int64_t size =
      RoundUp(std::clamp<int64_t>(bytes / tile_bytes * kTileFeatures, kTileFeatures, kMaxBlockFeatures), kMultiple);
  const int64_t blocks_per_group = (num_features + size - 1) / size, num_blocks = blocks_per_group * groups.size();
  const int64_t num_threads = std::max<int64_t>(1, pool.num_threads);
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

template <class Type, class Result>
void MultiplyGroups(const Pool& pool, const GroupedMatmulArguments& a) {
  using Element = typename Type::Element;
  const auto groups = NonEmptyGroups(a.sizes, a.num_groups, a.num_rows);
  const Rows<const Element> rows{static_cast<const Element*>(a.x), a.num_inputs};
  const auto x = PrepareRows<Type>(pool, rows, a.num_rows, a.num_inputs, groups, a.rows);
  const auto* const weights = static_cast<const Element*>(a.weights);
  auto* const y = static_cast<Result*>(a.y);
  const auto weight = [&](const Block& block) {
    return weights + (block.group.index * a.num_features + block.begin) * a.num_inputs;
  };
  ParallelForBlocks<Type>(pool, groups, a.num_features, a.num_inputs, [&](const Block& block, const Block* next) {
    const Group& group = block.group;
    MultiplyBlock<Type, Result>(x.From(group.first_row), group.num_rows, weight(block), a.num_inputs,
                                {y + group.first_row * a.num_features + block.begin, a.num_features},
                                block.end - block.begin, next == nullptr ? nullptr : weight(*next));
  });
}

void GroupedMatmul(const Pool& pool, const GroupedMatmulArguments& a) {
  if (a.dtype == Float::kFloat32) return MultiplyGroups<Float32, float>(pool, a);
  if (a.result == Float::kFloat32) return MultiplyGroups<BFloat16, float>(pool, a);
  MultiplyGroups<BFloat16, uint16_t>(pool, a);
}

}  // namespace
