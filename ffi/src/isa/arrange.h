// The orders in which a decoded FragTile is laid out in scratch, and the byte-permute tables that make them.
#pragma once
#include <cstdint>

#include "jaxzip/layout.h"

namespace jaxzip {
namespace {

enum class Arrange {
  kRowMajor,    // row * 8 + col
  kTransposed,  // col * 8 + row
  // For the matrix product: columns 0..3 of the eight rows, then columns 4..7. A 32-bit lane then holds two
  // neighbours in k, which one shift and one mask turn into two fp32 vectors of 8 rows.
  kMatmul,
};

constexpr int ArrangeIndex(Arrange a, int row, int col) {
  return a == Arrange::kRowMajor     ? row * 8 + col
         : a == Arrange::kTransposed ? col * 8 + row
                                     : (col >> 2) * 32 + row * 4 + (col & 3);
}

// Byte i of table h picks byte i of the h-th half of the arranged tile out of the concatenation (64 low
// bytes, 64 high bytes), both in position order.
struct JoinTable {
  uint8_t half[2][64];
};
constexpr JoinTable MakeJoinTable(Arrange a) {
  JoinTable t{};
  for (int row = 0; row < 8; ++row) {
    for (int col = 0; col < 8; ++col) {
      const int d = ArrangeIndex(a, row, col), p = row * 8 + col;
      t.half[d / 32][d % 32 * 2] = static_cast<uint8_t>(p);
      t.half[d / 32][d % 32 * 2 + 1] = static_cast<uint8_t>(64 + p);
    }
  }
  return t;
}

// The way back: byte p of `byte[b]` picks byte b of the element at position p out of a tile's 128 bytes.
struct SplitTable {
  uint8_t byte[2][64];
};
constexpr SplitTable MakeSplitTable(Arrange a) {
  SplitTable t{};
  for (int p = 0; p < 64; ++p) {
    const int d = ArrangeIndex(a, p / 8, p % 8);
    t.byte[0][p] = static_cast<uint8_t>(2 * d);
    t.byte[1][p] = static_cast<uint8_t>(2 * d + 1);
  }
  return t;
}

}  // namespace
}  // namespace jaxzip
