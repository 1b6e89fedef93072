// Attention of up to 16 rows to a page with AMX: see attention.h.

#pragma once

#include "amx.h"
#include "running_softmax.h"

namespace {

#ifdef HAS_AMX

static_assert(kPageSize == 4 * kTileSize);  // the scores of a page are four tiles

// Tile 4 has queries or weights, tiles 5 and 6 have keys or values.
inline TileSizes AttentionTileSizes(int num_rows) {
  TileSizes sizes;
  for (int tile = 0; tile < 5; ++tile) sizes.Set(tile, num_rows, kTileSize);
  for (int tile = 5; tile < 7; ++tile) sizes.Set(tile, kTileSize, kTileSize);
  return sizes;
}

// Add to the sums the products of rows, `row_bytes` apart, with four tiles that lie side by side and whose rows are `bytes`
// apart. num_words is a multiple of 16.
SIMD INLINE void AddToFourTiles(const float* rows, int64_t row_bytes, int64_t num_words, const float* words, int64_t bytes) {
  for (int64_t word = 0; word < num_words; word += kTileSize) {
    const float* const tile = words + word * (bytes / 4);
    _tile_loadd(4, rows + word, row_bytes);
    _tile_loadd(5, tile, bytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, tile + kTileSize, bytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, tile + 2 * kTileSize, bytes);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, tile + 3 * kTileSize, bytes);
    _tile_dpbf16ps(3, 4, 6);
  }
}
SIMD INLINE void StoreFourTiles(float* to, int64_t bytes) {
  _tile_stored(0, to, bytes);
  _tile_stored(1, to + kTileSize, bytes);
  _tile_stored(2, to + 2 * kTileSize, bytes);
  _tile_stored(3, to + 3 * kTileSize, bytes);
}

// Process one page for up to 16 rows. See AttendTile.
SIMD void AttendWithTiles(int64_t num_rows, const float* q, int64_t num_words, const float* transposed_keys,
                          const float* packed_values, int64_t num_columns, float scale, const int32_t* begin,
                          const int32_t* end, RunningSoftmax* softmax, float* accumulator) {
  alignas(64) float scores[kTileSize * kPageSize];
  alignas(64) uint16_t weights[kTileSize * kPageSize];
  AttentionTileSizes(static_cast<int>(num_rows)).Load();
  ZeroSums();
  AddToFourTiles(q, 4 * num_words, num_words, transposed_keys, 4 * kPageSize);
  StoreFourTiles(scores, 4 * kPageSize);
  for (int r = 0; r < num_rows; ++r) {
    Floats of_row[kPageVectors];
    UNROLL for (int v = 0; v < kPageVectors; ++v) {
      const Floats products = Load(scores + r * kPageSize + v * kFloatLanes);
      of_row[v] = KeepRange(products * Set(scale), v * kFloatLanes, begin[r], end[r]);
    }
    const float rescale = AddScores(of_row, &softmax[r], weights + r * kPageSize);
    if (rescale == 1.0f) continue;
    for (int64_t column = 0; column < num_columns; column += kFloatLanes) {
      float* const sum = accumulator + r * num_columns + column;
      Store(Load(sum) * Set(rescale), sum);
    }
  }
  CompilerBarrier();
  for (int64_t column = 0; column < num_columns; column += 4 * kTileSize) {
    float* const sums = accumulator + column;
    const int64_t bytes = 4 * num_columns;
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + kTileSize, bytes);
    _tile_loadd(2, sums + 2 * kTileSize, bytes);
    _tile_loadd(3, sums + 3 * kTileSize, bytes);
    AddToFourTiles(reinterpret_cast<const float*>(weights), 2 * kPageSize, kPageSize / 2, packed_values + column, bytes);
    StoreFourTiles(sums, bytes);
  }
  _tile_release();
}

#endif

}  // namespace
