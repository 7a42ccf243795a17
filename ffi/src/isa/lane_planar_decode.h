// Decodes lane-planar blocks: every weight from its fixed place, then the few listed ones once more.
#pragma once
#include "isa/lane_planar_tile.h"
#include "jaxzip/kernels.h"
#include "jaxzip/lane_planar.h"
#include "jaxzip/layout.h"

namespace jaxzip {
namespace {

// Rows g and g + 8 of a 16x64 tile as if none of their weights were listed. base[i]: the constant high exponent bits
// less the row's shift, in both halves; the low bits of a code add to it without a carry into the sign.
inline void DecodeRowPair(const uint32_t* sign_mantissa, const uint32_t* codes, int g, const uint16_t base[2],
                          uint16_t* row0, uint16_t* row1) {
  using namespace lane_planar;
  const U32x4 pairs0 = LoadVec<U32x4>(codes + 8 * g), pairs1 = LoadVec<U32x4>(codes + 8 * g + 4);
  const U32x4 word[3] = {EvenLanes(pairs0, pairs1), OddLanes(pairs0, pairs1), LoadVec<U32x4>(codes + 64 + 4 * g)};
  const U32x4 last = (word[0] & 0x00010001u) << 7 | (word[1] & 0x00010001u) << 8 | (word[2] & 0x00010001u) << 9;
  const U16x8 add[2] = {U16x8{} + base[0], U16x8{} + base[1]};
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    U32x4 sm[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) sm[t] = LoadVec<U32x4>(sign_mantissa + 128 * v + 16 * g + 4 * t);
    Transpose4x4(sm);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int p = 8 * v + 2 * i + half, bit = kLpCodeBit[p % 5];
        const U32x4 code = p == kLpLast ? last
                           : (bit <= 7 ? word[p / 5] << (7 - bit) : word[p / 5] >> (bit - 7)) & kLpCode;
        const U32x4 rest = (half ? SwapBytes(sm[i]) : sm[i]) & kLpSignMantissa;
        StoreVec((half ? row1 : row0) + 32 * v + 8 * i, ((U16x8)code + add[half]) | (U16x8)rest);
      }
    }
  }
}

inline uint16_t LpBase(int shift) { return static_cast<uint16_t>(lane_planar::kConstantHigh - (shift << 7)); }

// Gives a weight that was decoded with the constant its true high exponent bits.
inline void PatchHigh(uint16_t* weight, uint32_t high, int shift) {
  const uint32_t stored = ((static_cast<uint32_t>(*weight >> 7) + static_cast<uint32_t>(shift)) & 7) | high << 3;
  const uint32_t e = stored == 0 || stored == 255 ? stored : stored - static_cast<uint32_t>(shift);
  *weight = static_cast<uint16_t>((*weight & 0x807F) | (e & 0xFF) << 7);
}

inline uint32_t EntryHigh(uint32_t entry) {
  const uint32_t code = entry >> lane_planar::kPositionBits;
  return code ? code + lane_planar::kHighCodeBias : 0;
}

// One block of a payload, its counts and indices checked.
struct LpBlock {
  const uint32_t* words;
  const uint32_t *overflow, *overflow_end;
  uint32_t name;
  int end[lane_planar::kTiles];

  uint16_t Entry(int i) const {
    uint16_t entry;
    std::memcpy(&entry, reinterpret_cast<const char*>(words + lane_planar::kEntryStart) + 2 * i, 2);
    return entry;
  }
  // Whether another overflow entry of the block is left.
  bool More(const uint32_t* at) const { return at < overflow_end && at[0] == name; }
};

inline bool OpenBlock(const LanePlanarPayload& p, int64_t index, LpBlock* block, Fault* fault) {
  using namespace lane_planar;
  block->words = p.blocks + index * p.block_words;
  block->name = static_cast<uint32_t>(index + 1);
  const int room = 2 * (p.block_words - kEntryStart);
  int before = 0;
  for (int i = 0; i < kTiles; ++i) {
    block->end[i] = block->words[kHeaderStart] >> 8 * i & 0xFF;
    if (block->end[i] < before || block->end[i] > room) {
      *fault = {"blocks, entries", index, before, block->end[i]};
      return false;
    }
    before = block->end[i];
  }
  const uint32_t first = block->words[kOverflowWord];
  if (first > static_cast<uint64_t>(p.overflow_length)) {
    *fault = {"blocks, first overflow entry", index, p.overflow_length, first};
    return false;
  }
  block->overflow_end = p.overflow + 2 * p.overflow_length;
  block->overflow = first ? p.overflow + 2 * (static_cast<int64_t>(first) - 1) : block->overflow_end;
  return true;
}

// The 16 rows of one tile; shift: of the block's rows.
inline void DecodeTile(const LpBlock& block, int tile, const int8_t* shift, uint16_t* out, int64_t stride) {
  using namespace lane_planar;
  const int8_t* s = shift + tile * kTileRows;
  for (int g = 0; g < 8; ++g) {
    const uint16_t base[2] = {LpBase(s[g]), LpBase(s[g + 8])};
    DecodeRowPair(block.words + tile * kSignMantissaWords, block.words + kCodeStart + tile * kCodeWords, g, base,
                  out + g * stride, out + (g + 8) * stride);
  }
  for (int i = tile ? block.end[tile - 1] : 0; i < block.end[tile]; ++i) {
    const uint32_t entry = block.Entry(i), place = kLpPlaces.of[entry & (kTileElements - 1)];
    PatchHigh(out + (place >> 6) * stride + (place & 63), EntryHigh(entry), s[place >> 6]);
  }
  for (const uint32_t* at = block.overflow; block.More(at); at += 2) {
    const uint32_t position = at[1] & kLpPositionMask, place = kLpPlaces.of[position & (kTileElements - 1)];
    if (static_cast<int>(position / kTileElements) != tile) continue;
    PatchHigh(out + (place >> 6) * stride + (place & 63), at[1] >> kPositionBits & 31, s[place >> 6]);
  }
}

inline void DecodeBlock(const LpBlock& block, const int8_t* shift, uint16_t* out, int64_t stride) {
  for (int tile = 0; tile < lane_planar::kTiles; ++tile) {
    DecodeTile(block, tile, shift, out + tile * lane_planar::kTileRows * stride, stride);
  }
}

void DecompressLanePlanarRows(const LanePlanarPayload& p, int64_t block_row, uint16_t* out, int64_t stride,
                              bool transposed, Fault* fault) {
  using layout::CeilDiv;
  alignas(64) uint16_t tile[kLpTileElements], turned[kLpTileElements];
  const int64_t blocks = CeilDiv(p.k, kLpBlock), below = p.m - block_row * kLpBlock;
  const int64_t rows = below < kLpBlock ? below : kLpBlock;
  const int8_t* shift = p.shift + block_row * kLpBlock;
  for (int64_t bc = 0; bc < blocks; ++bc) {
    LpBlock block;
    if (!OpenBlock(p, block_row * blocks + bc, &block, fault)) return;
    const int64_t cols = p.k - bc * kLpBlock < kLpBlock ? p.k - bc * kLpBlock : kLpBlock;
    uint16_t* dst = transposed ? out + bc * kLpBlock * stride : out + bc * kLpBlock;
    if (transposed) {
      DecodeBlock(block, shift, tile, kLpBlock);
      if (rows == kLpBlock && cols == kLpBlock) {
        TransposeTile<true>(tile, kLpBlock, dst, stride);
      } else {
        TransposeTile<false>(tile, kLpBlock, turned, kLpBlock);
        CopyLines(turned, kLpBlock, dst, stride, cols, rows);
      }
    } else if (rows == kLpBlock && cols == kLpBlock) {
      DecodeBlock(block, shift, dst, stride);
    } else {
      DecodeBlock(block, shift, tile, kLpBlock);
      CopyLines(tile, kLpBlock, dst, stride, rows, cols);
    }
  }
  if (transposed) StreamFence();
}

void DecodeLanePlanarRow(const LanePlanarPayload& p, int64_t row, uint16_t* out, Fault* fault) {
  using namespace lane_planar;
  const int64_t blocks = layout::CeilDiv(p.k, kLpBlock), block_row = row / kBlock;
  const int tile = static_cast<int>(row % kBlock / kTileRows), r = static_cast<int>(row % kTileRows), g = r & 7;
  const int shift = p.shift[row];
  const uint16_t base[2] = {LpBase(shift), LpBase(shift)};
  for (int64_t bc = 0; bc < blocks; ++bc) {
    LpBlock block;
    if (!OpenBlock(p, block_row * blocks + bc, &block, fault)) return;
    uint16_t pair[2][kLpBlock];
    DecodeRowPair(block.words + tile * kSignMantissaWords, block.words + kCodeStart + tile * kCodeWords, g, base,
                  pair[0], pair[1]);
    uint16_t* found = pair[r >> 3];
    for (int i = tile ? block.end[tile - 1] : 0; i < block.end[tile]; ++i) {
      const uint32_t entry = block.Entry(i), place = kLpPlaces.of[entry & (kTileElements - 1)];
      if (static_cast<int>(place >> 6) == r) PatchHigh(found + (place & 63), EntryHigh(entry), shift);
    }
    for (const uint32_t* at = block.overflow; block.More(at); at += 2) {
      const uint32_t position = at[1] & kLpPositionMask, place = kLpPlaces.of[position & (kTileElements - 1)];
      if (static_cast<int>(position / kTileElements) == tile && static_cast<int>(place >> 6) == r) {
        PatchHigh(found + (place & 63), at[1] >> kPositionBits & 31, shift);
      }
    }
    const int64_t cols = p.k - bc * kLpBlock < kLpBlock ? p.k - bc * kLpBlock : kLpBlock;
    std::memcpy(out + bc * kLpBlock, found, static_cast<size_t>(cols) * 2);
  }
}

}  // namespace
}  // namespace jaxzip
