// Products of rows and weights in bfloat16 with AMX.
//
// A tile register has 16 rows of 64 bytes. One instruction adds the products of 16 features and 16 rows over 32 inputs to a
// tile of 16 × 16 sums. The features are its first operand, as the weight is stored. The rows are its second operand, whose
// rows are pairs of inputs: they are packed so once, 16 rows of a group together. Four tiles of sums, for two tiles of
// features and two of rows, hide the latency of the instruction.
//
// Every number of rows is multiplied so, also a single one: AMX adds products in another order than AVX512-BF16, and a
// result must not depend on the other rows. A single row's packed form is the row itself.

#pragma once

#include <type_traits>

#include "amx.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kPairedFeatures = 2 * kTileSize, kPairedRows = 2 * kTileSize;
constexpr int64_t kFewPairs = 3, kShortFeatureBytes = 4 << 10;  // see TilesPrefetch

// Rows as they are and packed. `packed` has `stride` elements for each row. Up to 16 consecutive rows of a group are together:
// the first pair of inputs of each row, then the second pair of each.
struct PackedRows {
  Rows<const uint16_t> rows;
  const uint16_t* packed;
  int64_t stride;

  PackedRows From(int64_t row) const { return {rows.From(row), packed + row * stride, stride}; }
};

#ifdef HAS_AMX

SIMD void PackTile(Rows<const uint16_t> x, int num_rows, int64_t num_inputs, uint16_t* to) {
  const Lanes lanes = FirstLanes(num_rows);
  const auto pack = [&](int64_t i, auto... count) SIMD {
    Floats pairs[kTileSize];
    for (int r = 0; r < kTileSize; ++r) pairs[r] = r < num_rows ? BFloat16::LoadVector(x[r] + i, count...) : Set(0.0f);
    Transpose(pairs);
    for (int pair = 0; pair < kTileSize; ++pair, to += 2 * num_rows) {
      Store(pairs[pair], reinterpret_cast<float*>(to), lanes);
    }
  };
  int64_t i = 0;
  for (; i + kTileInputs <= num_inputs; i += kTileInputs) pack(i);
  if (i < num_inputs) pack(i, static_cast<int>(num_inputs - i));
}

// Pack the rows of the groups, tile by tile, in `scratch`.
inline PackedRows PackRows(const Pool& pool, Rows<const uint16_t> x, int64_t num_inputs, const std::vector<Group>& groups,
                           const Scratch& scratch) {
  auto* const packed = static_cast<uint16_t*>(scratch.data);
  std::vector<Group> tiles;
  for (const Group& group : groups) {
    if (IsPackedForm(group.num_rows, num_inputs)) continue;
    for (int64_t row = 0; row < group.num_rows; row += kTileSize) {
      tiles.push_back({group.index, group.first_row + row, std::min<int64_t>(kTileSize, group.num_rows - row)});
    }
  }
  ParallelFor(pool, static_cast<int64_t>(tiles.size()), [&](int64_t job) {
    const Group& tile = tiles[job];
    PackTile(x.From(tile.first_row), static_cast<int>(tile.num_rows), num_inputs, packed + tile.first_row * scratch.stride);
  });
  return {x, packed, scratch.stride};
}

// The tiles' sizes: 0 to 3 are sums, 4 and 5 features, 6 and 7 rows. Sums 0 and 1 are of the first features, sums 0 and 2 of
// the first rows.
inline TileSizes MatmulTileSizes(const int (&features)[2], const int (&rows)[2]) {
  TileSizes sizes;
  for (int f = 0; f < 2; ++f) {
    for (int r = 0; r < 2; ++r) sizes.Set(2 * f + r, features[f], rows[r]);
    sizes.Set(4 + f, features[f], kTileSize);
  }
  for (int r = 0; r < 2; ++r) sizes.Set(6 + r, kTileSize, rows[r]);
  return sizes;
}

// One or two tiles of features and of rows.
struct TileOperands {
  const uint16_t* weight;
  int64_t weight_stride, num_inputs;
  int features[2], rows[2];
  const uint16_t* packed[2];
  const char* prefetch = nullptr;
  int64_t prefetch_lines = 0;  // for each 32 inputs
};

// The sums of two tiles of features, 32 × rows, for each of two tiles of rows.
struct alignas(64) TileSums {
  float sums[2][kPairedFeatures * kTileSize];
};

// Add the products of all inputs to the sums.
template <bool has_second_features, bool has_second_rows>
SIMD INLINE void AddProductsOfTiles(const TileOperands& tiles) {
  const int64_t row_bytes[2] = {4 * tiles.rows[0], 4 * tiles.rows[1]};
  const auto add = [&](const uint16_t* weight, int64_t stride, int64_t input) SIMD {
    _tile_loadd(6, tiles.packed[0] + input * tiles.rows[0], row_bytes[0]);
    _tile_loadd(4, weight, 2 * stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (has_second_rows) {
      _tile_loadd(7, tiles.packed[1] + input * tiles.rows[1], row_bytes[1]);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (has_second_features) {
      _tile_loadd(5, weight + kTileSize * stride, 2 * stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (has_second_rows) _tile_dpbf16ps(3, 5, 7);
    }
  };
  const char* prefetch = tiles.prefetch;
  int64_t input = 0;
  for (; input + kTileInputs <= tiles.num_inputs; input += kTileInputs) {
    for (int64_t line = 0; line < tiles.prefetch_lines; ++line, prefetch += kCacheLine) Prefetch(prefetch);
    add(tiles.weight + input, tiles.weight_stride, input);
  }
  if (input < tiles.num_inputs) {
    // The bytes after the weight's rows may be any, and their products with zeros not a number.
    alignas(64) uint16_t padded[kPairedFeatures * kTileInputs];
    const int count = static_cast<int>(tiles.num_inputs - input);
    for (int f = 0; f < (has_second_features ? kTileSize + tiles.features[1] : tiles.features[0]); ++f) {
      const auto last = BFloat16::LoadVector(tiles.weight + f * tiles.weight_stride + input, count);
      Store(last, reinterpret_cast<float*>(padded + f * kTileInputs));
    }
    CompilerBarrier();
    add(padded, kTileInputs, input);
  }
}

template <bool has_second_features, bool has_second_rows>
SIMD INLINE void StoreSumsOfTiles(const TileOperands& tiles, TileSums* to) {
  const int64_t row_bytes[2] = {4 * tiles.rows[0], 4 * tiles.rows[1]};
  _tile_stored(0, to->sums[0], row_bytes[0]);
  if constexpr (has_second_features) _tile_stored(2, to->sums[0] + kTileSize * tiles.rows[0], row_bytes[0]);
  if constexpr (has_second_rows) {
    _tile_stored(1, to->sums[1], row_bytes[1]);
    if constexpr (has_second_features) _tile_stored(3, to->sums[1] + kTileSize * tiles.rows[1], row_bytes[1]);
  }
}

SIMD INLINE void StoreBoth(Floats first, Floats second, float* to) {
  Store(first, to);
  Store(second, to + kFloatLanes);
}
SIMD INLINE void StoreBoth(Floats first, Floats second, uint16_t* to) {
  Store(RoundedPairs(first, second), reinterpret_cast<float*>(to));
}

// Store the sums [num_features, num_rows] of up to 32 features and 16 rows as rows.
template <class Result>
SIMD void StoreTransposed(const float* sums, int num_features, int num_rows, Rows<Result> y) {
  Floats words[2][kTileSize];
  if (num_features == kPairedFeatures && num_rows == kTileSize) {
    UNROLL for (int half = 0; half < 2; ++half) {
      UNROLL for (int f = 0; f < kTileSize; ++f) words[half][f] = Load(sums + (half * kTileSize + f) * kTileSize);
      Transpose(words[half]);
    }
    UNROLL for (int r = 0; r < kTileSize; ++r) StoreBoth(words[0][r], words[1][r], y[r]);
    return;
  }
  const Lanes rows = FirstLanes(num_rows);
  for (int first = 0; first < num_features; first += kTileSize) {
    const Lanes features = FirstLanes(num_features - first);
    if (num_rows == 1) {
      Store(Load(sums + first, features), y[0] + first, features);
      continue;
    }
    for (int f = 0; f < kTileSize; ++f) words[0][f] = Load(sums + (first + f) * num_rows, rows);
    Transpose(words[0]);
    for (int r = 0; r < num_rows; ++r) Store(words[0][r], y[r] + first, features);
  }
}

// Compute the sums of one or two tiles of features and of rows, and store them. add(tiles) is given TileOperands and whether
// there are second features and rows, as types; it adds the products.
template <class Result, class Add>
SIMD INLINE void ComputeTiles(const TileOperands& tiles, Rows<Result> y, const Add& add) {
  TileSums sums;
  const auto compute = [&](auto has_second_features, auto has_second_rows) SIMD {
    ZeroSums();
    add(tiles, has_second_features, has_second_rows);
    StoreSumsOfTiles<has_second_features.value, has_second_rows.value>(tiles, &sums);
  };
  if (tiles.features[1] > 0) {
    tiles.rows[1] > 0 ? compute(std::true_type(), std::true_type()) : compute(std::true_type(), std::false_type());
  } else {
    tiles.rows[1] > 0 ? compute(std::false_type(), std::true_type()) : compute(std::false_type(), std::false_type());
  }
  for (int r = 0; r < 2 && tiles.rows[r] > 0; ++r) {
    StoreTransposed(sums.sums[r], tiles.features[0] + tiles.features[1], tiles.rows[r], y.From(r * kTileSize));
  }
}

// Sets the sizes of the tiles when they change.
class TileSizesInUse {
 public:
  SIMD INLINE void Set(const TileOperands& tiles) {
    const int sizes[4] = {tiles.features[0], tiles.features[1], tiles.rows[0], tiles.rows[1]};
    if (std::memcmp(sizes, sizes_, sizeof(sizes)) == 0) return;
    std::memcpy(sizes_, sizes, sizeof(sizes));
    MatmulTileSizes(tiles.features, tiles.rows).Load();
  }

 private:
  int sizes_[4] = {};
};

// Call job(tiles, row, feature) for each two tiles of features and of rows, with their sizes and rows set.
template <class Job>
SIMD INLINE void ForEachTilePair(const PackedRows& x, int64_t num_rows, int64_t num_features, int64_t num_inputs, const Job& job) {
  const uint16_t* const packed = IsPackedForm(num_rows, num_inputs) ? x.rows[0] : x.packed;
  const auto size_of_tile = [](int64_t rest) { return static_cast<int>(std::clamp<int64_t>(rest, 0, kTileSize)); };
  TileSizesInUse sizes;
  for (int64_t row = 0; row < num_rows; row += kPairedRows) {
    for (int64_t feature = 0; feature < num_features; feature += kPairedFeatures) {
      TileOperands tiles;
      for (int n = 0; n < 2; ++n) {
        tiles.features[n] = size_of_tile(num_features - feature - n * kTileSize);
        tiles.rows[n] = size_of_tile(num_rows - row - n * kTileSize);
        tiles.packed[n] = packed + (row + n * kTileSize) * x.stride;
      }
      sizes.Set(tiles);
      job(tiles, row, feature);
    }
  }
  _tile_release();
}

// Whether instructions prefetch a weight faster than the processor. It sees that each feature's inputs are read in order, but
// not if they are few. With few rows the instructions delay the tiles' loads, the more so the more tiles of rows there are.
inline bool TilesPrefetch(int64_t num_rows, int64_t feature_bytes) {
  return num_rows > kFewPairs * kPairedRows || feature_bytes * CeilDivide(num_rows, kTileSize) <= kShortFeatureBytes;
}

// Multiply all rows of a group with a block of features of its weight, and prefetch the block at `next_weight` unless it is
// null.
template <class Type, class Result>
SIMD void MultiplyBlock(const PackedRows& x, int64_t num_rows, const uint16_t* weight, int64_t num_inputs, Rows<Result> y,
                        int64_t num_features, const uint16_t* next_weight) {
  const int64_t num_steps = CeilDivide(num_rows, kPairedRows) * CeilDivide(num_features, kPairedFeatures) *
                            CeilDivide(num_inputs, kTileInputs);
  const int64_t block_bytes = num_features * num_inputs * sizeof(*weight);
  const bool prefetches = next_weight != nullptr && TilesPrefetch(num_rows, num_inputs * sizeof(*weight));
  const int64_t lines = prefetches ? CeilDivide(block_bytes, kCacheLine * num_steps) : 0;
  const char* prefetch = reinterpret_cast<const char*>(next_weight);
  const char* const prefetch_end = prefetch + block_bytes;
  ForEachTilePair(x, num_rows, num_features, num_inputs, [&](TileOperands& tiles, int64_t row, int64_t feature) SIMD {
    tiles.weight = weight + feature * num_inputs;
    tiles.weight_stride = tiles.num_inputs = num_inputs;
    tiles.prefetch = prefetch;
    tiles.prefetch_lines = prefetch < prefetch_end ? lines : 0;
    prefetch += lines * kCacheLine * (num_inputs / kTileInputs);
    Rows<Result> to = y.From(row);
    to.data += feature;
    ComputeTiles(tiles, to, [](const TileOperands& tiles, auto has_second_features, auto has_second_rows) SIMD {
      AddProductsOfTiles<has_second_features.value, has_second_rows.value>(tiles);
    });
  });
}

#endif

}  // namespace
