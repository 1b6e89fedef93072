// The tile registers of AMX: 8 tiles of 16 rows of 64 bytes.
//
// _tile_dpbf16ps(c, a, b) adds to the sums c [M, N], in float32, the products of a [M, K] and b, both bfloat16. The rows of b
// are pairs of its inputs: [K / 2, N, 2]. M, K / 2 and N are at most 16.

#pragma once

#include "simd.h"

namespace {

constexpr int kTileSize = 16;  // rows of a tile, and pairs of inputs in its rows
constexpr int kTileInputs = kWideMultiple;  // in a tile

#ifdef HAS_AMX

// GCC does not know what memory the instructions for tiles read: it must not move a store to that memory after them.
INLINE void CompilerBarrier() { asm volatile("" : : : "memory"); }

// The number of rows, and of 4-byte words in a row, of each tile.
struct alignas(64) TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};

  void Set(int tile, int rows, int words) {
    // An instruction must not name a tile without a size, so those that hold nothing have one.
    num_rows[tile] = static_cast<uint8_t>(std::max(rows, 1));
    row_bytes[tile] = static_cast<uint16_t>(std::max(4 * words, 4));
  }
  SIMD void Load() const {
    CompilerBarrier();
    _tile_loadconfig(this);
  }
};

// Tiles 0 to 3 hold the sums, in products and in attention.
SIMD INLINE void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

#endif

}  // namespace
