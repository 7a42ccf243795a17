// The lane-planar storage layout: sizes and places of everything in a 64x64 block, shared by kernels and encoders.
//
//   block (u32 words)      0            1024          1408    1409      1410
//                          | lower bytes   | codes         | ends | overflow | u16 escape entries ... |
//                          | 4 tiles x 256 | 4 tiles x 96  |
//
// A weight's lower byte is stored as it is. Of its upper byte the sign and the two last bits, which belong to the exponent, are its
// code; the five bits between are a constant for all but the escapes.
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

constexpr int kLowerWords = 256;         // per tile: [2 vectors][32 lanes][4 words]
constexpr int kCodeWords = 96;           // per tile: [32 lanes][2 words], then [32 lanes][1 word]
constexpr int kCodeStart = kTiles * kLowerWords;
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
constexpr uint32_t kUpperBytes = 0x83838383u;  // of four upper bytes: what a code holds

// A weight's position is that of its lower byte among the block's. An entry has those of its bits that tell places in a pair of tiles
// apart (`ends` tell the tile) | high five exponent bits << 11. What finds no room in the block is an overflow entry.
constexpr int kPositionBits = 12, kEntryPositionBits = 11;

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

// What is at a position: (k-step, lane, register, half) of a tile.
struct Place {
  int tile, j, lane, r, h;
};
JAXZIP_HOST_DEVICE constexpr Place place_of(int position) {
  return {position >> 10, (position >> 9 & 1) << 1 | (position >> 3 & 1), position >> 4 & 31, (position >> 2 & 1) << 1 | (position & 1),
          position >> 1 & 1};
}

// A lane's three code words hold the codes of its eight words of lower bytes, of a byte each: words 0 to 2 as they are, 3 to 5 rotated
// left by 3; of 6 and 7 the exponent's bits are in words 0 and 1, the signs in word 2.
JAXZIP_HOST_DEVICE inline void add_code(uint32_t (&codes)[3], int word, uint32_t upper) {
  upper &= kUpperBytes;
  const uint32_t signs = upper & 0x80808080u, exponents = upper & 0x03030303u;
  if (word < 3)
    codes[word] |= upper;
  else if (word < 6)
    codes[word - 3] |= upper << 3 | upper >> 29;
  else {
    codes[word - 6] |= exponents << 5;
    codes[2] |= signs >> (word - 5);
  }
}

// Exponents 0 (zero, subnormal) and 255 (infinity, NaN) keep their code under a shift.
JAXZIP_HOST_DEVICE constexpr uint32_t unshift_exponent(uint32_t e, int shift) {
  return e == 0 || e == 255 ? e : static_cast<uint32_t>(static_cast<int>(e) - shift);
}

}  // namespace jaxzip::lane_planar
