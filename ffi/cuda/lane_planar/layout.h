// The lane-planar storage layout: sizes and places of everything in a 64x64 block, shared by kernels and encoders.
//
//   block (u32 words)      0            1024          1408    1409      1410
//                          | sign+mantissa | exponent codes | ends | overflow | u16 escape entries ... |
//                          | 4 tiles x 256 | 4 tiles x 96   |
//
// jaxzip/formats/lane_planar.py is the reference; tests hold the two equal.
#pragma once
#include <cstdint>

// Encoders on the host include this as plain C++.
#if defined(__CUDACC__)
#define JAXZIP_HOST_DEVICE __host__ __device__
#else
#define JAXZIP_HOST_DEVICE
#endif

namespace jaxzip::lane_planar {

constexpr int kBlock = 64;      // rows and columns of a block
constexpr int kTileRows = 16;   // a warp tile is 16 rows x 64 k: one A operand of four k-steps of 16
constexpr int kTiles = kBlock / kTileRows;
constexpr int kTileElements = kTileRows * kBlock;

constexpr int kSignMantissaWords = 256;  // per tile: [2 vectors][32 lanes][4 words]
constexpr int kCodeWords = 96;           // per tile: [32 lanes][2 words], then [32 lanes][1 word]
constexpr int kCodeStart = kTiles * kSignMantissaWords;
constexpr int kHeaderStart = kCodeStart + kTiles * kCodeWords;  // ends: 4 x u8, entries before the end of tile 0..3
constexpr int kOverflowWord = kHeaderStart + 1;                 // 1 + first overflow entry of the block, 0 for none
constexpr int kEntryStart = kHeaderStart + 2;
constexpr int kBlockWidths[] = {1424, 1440, 1456, 1464, 1472};  // words of a block; one for a whole matrix
constexpr int kMaxBlockWords = 1472;  // so that one 8-byte load a lane fetches header and entries
constexpr int kRawBlockWords = kBlock * kBlock / 2;  // of the control: bf16 in fragment order, nothing else
constexpr int kMaxEntries = 2 * (kMaxBlockWords - kEntryStart);

// Exponents are stored shifted by their row's `shift`, so that the window is 120..127: high five bits 01111.
constexpr uint32_t kHighMask = 0x7C00u;
constexpr uint32_t kConstantHigh = 0x3C00u;
constexpr uint32_t kPlaneWord = 0x3C3C3C3Cu;  // of a patch plane: four upper bytes of kConstantHigh

// An entry is position (12 bits: tile, k-step, lane, register, half) | code << 12; the code stands for the five high
// exponent bits: 0 for 0, else code + 3. Anything else, and what finds no room in the block, is an overflow entry.
constexpr int kPositionBits = 12;
constexpr int kHighCodeBias = 3;

struct OverflowEntry {
  uint32_t block;  // 1 + rb * k_blocks + kb; 0 is padding
  uint32_t entry;  // position | high five bits << 12
};

// Everything a kernel needs to know of one encoded matrix.
struct Matrix {
  const uint32_t* blocks;           // [m_blocks][k_blocks][block_words]
  const OverflowEntry* overflow;
  const int8_t* shift;              // [m_blocks * 64]
  uint32_t overflow_length;
  int block_words;
  int m, k;                         // logical shape
  JAXZIP_HOST_DEVICE int m_blocks() const { return (m + kBlock - 1) / kBlock; }
  JAXZIP_HOST_DEVICE int k_blocks() const { return (k + kBlock - 1) / kBlock; }
};

// Row (in a tile) and column (in a block) of half h of register r of lane l in k-step j: the A operand of
// mma.m16n8k16 and of wgmma.
JAXZIP_HOST_DEVICE constexpr int fragment_row(int lane, int r) { return (lane >> 2) + 8 * (r & 1); }
JAXZIP_HOST_DEVICE constexpr int fragment_column(int j, int lane, int r, int h) {
  return 16 * j + 2 * (lane & 3) + 8 * (r >> 1) + h;
}

// Exponents 0 (zero, subnormal) and 255 (infinity, NaN) keep their code under a shift.
JAXZIP_HOST_DEVICE constexpr uint32_t unshift_exponent(uint32_t e, int shift) {
  return e == 0 || e == 255 ? e : static_cast<uint32_t>(static_cast<int>(e) - shift);
}

}  // namespace jaxzip::lane_planar
