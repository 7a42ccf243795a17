// The layout constants of TCA-TBE: the only copy in C++, exported to Python as `_cpu.layout()`.
#pragma once
#include <cstdint>

namespace jaxzip::layout {

inline constexpr int kFrag = 8;                        // a FragTile is 8x8
inline constexpr int kFragSize = kFrag * kFrag;
inline constexpr int kTensorCore = 16;                 // a TensorCoreTile is 16x16: four FragTiles
inline constexpr int kBandRows = 16;                   // a band is 16x64: four TensorCoreTiles
inline constexpr int kBlock = 64;                      // a BlockTile is 64x64: four bands
inline constexpr int kBlockSize = kBlock * kBlock;
inline constexpr int kBandsPerBlock = kBlock / kBandRows;
inline constexpr int kFragsPerBand = kBandRows * kBlock / kFragSize;
inline constexpr int kFragsPerBlock = kFragsPerBand * kBandsPerBlock;
inline constexpr int kWindow = 7;                      // exponents in the window
inline constexpr int kMinWindowStart = 1;
inline constexpr int kMaxWindowStart = 249;
inline constexpr int kMaxStartExp = kMaxWindowStart - 1;
inline constexpr int kSignMantissaAlign = 16;          // elements; 16 bytes
inline constexpr int kFullAlign = 8;                   // elements; 16 bytes

static inline constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
// Sizes of a matrix beyond which products of them might overflow.
inline constexpr int64_t kMaxSize = int64_t{1} << 31;
static inline constexpr bool ValidSizes(int64_t m, int64_t k) { return m >= 1 && k >= 1 && m <= kMaxSize && k <= kMaxSize; }
static inline constexpr int64_t NumBlocks(int64_t m, int64_t k) { return CeilDiv(m, kBlock) * CeilDiv(k, kBlock); }

// FragTile `f` of a BlockTile covers rows 8*FragRow(f).. and columns 8*FragCol(f)..: inside each
// TensorCoreTile the order is (m0,k0) (m1,k0) (m0,k1) (m1,k1).
static inline constexpr int FragRow(int f) { return f / kFragsPerBand * 2 + (f & 1); }
static inline constexpr int FragCol(int f) { return f % kFragsPerBand / 4 * 2 + (f >> 1 & 1); }
static inline constexpr int FragIndex(int row, int col) {
  return row / 2 * kFragsPerBand + col / 2 * 4 + (col & 1) * 2 + (row & 1);
}

}  // namespace jaxzip::layout
