// Decodes lane-planar blocks: every weight from its fixed place, then the few listed ones once more.
#pragma once
#include "isa/decode_frag.h"
#include "isa/lane_planar_tile.h"
#include "jaxzip/kernels.h"
#include "jaxzip/lane_planar.h"
#include "jaxzip/layout.h"

namespace jaxzip {
namespace {

constexpr int kPrefetchDistance = 4 * lane_planar::kMaxBlockWords;  // bytes: about a block

inline uint16_t LpBase(int shift) { return static_cast<uint16_t>(lane_planar::kConstantHigh - (shift << 7)); }

// Upper bytes, without their high exponent bits, of word p of four lanes; see add_code in layout.h.
JAXZIP_INLINE U32x4 UpperWord(const U32x4 codes[3], int p) {
  if (p < 3) return codes[p] & lane_planar::kUpperBytes;
  if (p < 6) return (codes[p - 3] >> 3 | codes[p - 3] << 29) & lane_planar::kUpperBytes;
  return (codes[2] << (p - 5) & kLpSigns) | (codes[p - 6] >> 5 & kLpExponents);
}

// Rows g and g + 8 of a 16x64 tile as if none of their weights were listed: calls store(half, p, vector) for the eight
// weights from column 8 p on of row g + 8 half. shift: of the tile's rows. What a row's constant exponent bits are less
// its shift adds to a code without a carry into the sign.
template <typename F>
JAXZIP_INLINE void DecodeRowPair(const uint32_t* lower, const uint32_t* codes, int g, const int8_t* shift, F&& store) {
  using namespace lane_planar;
  const U32x4 pairs0 = LoadVec<U32x4>(codes + 8 * g), pairs1 = LoadVec<U32x4>(codes + 8 * g + 4);
  const U32x4 word[3] = {EvenLanes(pairs0, pairs1), OddLanes(pairs0, pairs1), LoadVec<U32x4>(codes + 64 + 4 * g)};
  const U16x8 add[2] = {U16x8{} + LpBase(shift[g]), U16x8{} + LpBase(shift[g + 8])};
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    U32x4 bytes[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) bytes[t] = LoadVec<U32x4>(lower + 128 * v + 16 * g + 4 * t);
    Transpose4x4(bytes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const U16x8 low = (U16x8)bytes[i], high = (U16x8)UpperWord(word, 4 * v + i);
      store(0, 4 * v + i, ((low & 0xFF) | high << 8) + add[0]);
      store(1, 4 * v + i, (low >> 8 | (high & 0xFF00)) + add[1]);
    }
  }
}

// Gives a weight that was decoded with the constant its true high exponent bits.
inline void PatchHigh(uint16_t* weight, uint32_t high, int shift) {
  const uint32_t stored = ((static_cast<uint32_t>(*weight >> 7) + static_cast<uint32_t>(shift)) & 7) | high << 3;
  const uint32_t e = stored == 0 || stored == 255 ? stored : stored - static_cast<uint32_t>(shift);
  *weight = static_cast<uint16_t>((*weight & 0x807F) | (e & 0xFF) << 7);
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

// Calls patch(place, high) for every listed weight of a tile, `place` as in kLpPlaces.
template <typename F>
inline void ForEachListed(const LpBlock& block, int tile, F&& patch) {
  using namespace lane_planar;
  for (int i = tile ? block.end[tile - 1] : 0; i < block.end[tile]; ++i) {
    const uint32_t entry = block.Entry(i);
    patch(kLpPlaces.of[entry & (kTileElements - 1)], entry >> kEntryPositionBits);
  }
  for (const uint32_t* at = block.overflow; block.More(at); at += 2) {
    const uint32_t position = at[1] & kLpPositionMask;
    if (static_cast<int>(position / kTileElements) != tile) continue;
    patch(kLpPlaces.of[position & (kTileElements - 1)], at[1] >> kPositionBits & 31);
  }
}

inline const uint32_t* TileLower(const LpBlock& block, int tile) {
  return block.words + tile * lane_planar::kLowerWords;
}
inline const uint32_t* TileCodes(const LpBlock& block, int tile) {
  return block.words + lane_planar::kCodeStart + tile * lane_planar::kCodeWords;
}

// Asks for a quarter of the next block while a tile of this one is decoded: the hardware's prefetchers stop at page
// ends, of which there is more than one a block.
inline void PrefetchNextBlock(const LpBlock& block, int tile) {
  constexpr int kQuarter = lane_planar::kMaxBlockWords, kLine = 64;  // bytes
  const char* next = reinterpret_cast<const char*>(block.words) + kPrefetchDistance + tile * kQuarter;
#pragma GCC unroll 23
  for (int i = 0; i < kQuarter; i += kLine) __builtin_prefetch(next + i);
}

// The 16 rows of one tile; shift: of the block's rows.
inline void DecodeTile(const LpBlock& block, int tile, const int8_t* shift, uint16_t* out, int64_t stride) {
  const int8_t* s = shift + tile * lane_planar::kTileRows;
  PrefetchNextBlock(block, tile);
  for (int g = 0; g < 8; ++g) {
    uint16_t* const row[2] = {out + g * stride, out + (g + 8) * stride};
    DecodeRowPair(TileLower(block, tile), TileCodes(block, tile), g, s,
                  [&](int half, int p, U16x8 v) { StoreVec(row[half] + 8 * p, v); });
  }
  ForEachListed(block, tile, [&](uint32_t place, uint32_t high) {
    PatchHigh(out + (place >> 6) * stride + (place & 63), high, s[place >> 6]);
  });
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
  const int tile = static_cast<int>(row % kBlock / kTileRows), r = static_cast<int>(row % kTileRows);
  const int8_t* shift = p.shift + row / kTileRows * kTileRows;
  for (int64_t bc = 0; bc < blocks; ++bc) {
    LpBlock block;
    if (!OpenBlock(p, block_row * blocks + bc, &block, fault)) return;
    uint16_t pair[2][kLpBlock];
    DecodeRowPair(TileLower(block, tile), TileCodes(block, tile), r & 7, shift,
                  [&](int half, int p, U16x8 v) { StoreVec(pair[half] + 8 * p, v); });
    uint16_t* found = pair[r >> 3];
    ForEachListed(block, tile, [&](uint32_t place, uint32_t high) {
      if (static_cast<int>(place >> 6) == r) PatchHigh(found + (place & 63), high, shift[r]);
    });
    const int64_t cols = p.k - bc * kLpBlock < kLpBlock ? p.k - bc * kLpBlock : kLpBlock;
    std::memcpy(out + bc * kLpBlock, found, static_cast<size_t>(cols) * 2);
  }
}

}  // namespace
}  // namespace jaxzip
