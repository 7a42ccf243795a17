// Encodes one 64x64 tile as a lane-planar block, and counts before what will not fit into it.
#pragma once
#include "isa/lane_planar_tile.h"
#include "jaxzip/lane_planar.h"

namespace jaxzip {
namespace {

constexpr uint16_t kLpExponent = 0x7F80;

bool HasSubnormals(const uint16_t* row, int64_t k) {
  uint16_t any = 0;
  for (int64_t c = 0; c < k; ++c) {
    any = static_cast<uint16_t>(any | ((row[c] & kLpExponent) == 0 && (row[c] & 0x7F) != 0));
  }
  return any != 0;
}

void LoadShiftedTile(const uint16_t* src, int64_t stride, const int8_t* shift, uint16_t* tile) {
  for (int i = 0; i < kLpBlock; ++i) {
    const uint16_t add = static_cast<uint16_t>(shift[i] << 7);
    for (int c = 0; c < kLpBlock; ++c) {
      const uint16_t v = src[i * stride + c], e = v & kLpExponent;
      // Zeros, subnormals, infinities and NaN keep their exponent.
      const uint16_t moved = e == 0 || e == kLpExponent ? v : static_cast<uint16_t>(v + add);
      tile[i * kLpBlock + c] = static_cast<uint16_t>((v & 0x807F) | (moved & kLpExponent));
    }
  }
}

int32_t CountEscapes(const uint16_t* tile) {
  using namespace lane_planar;
  uint16_t escapes = 0;  // of 4096 elements
  for (int i = 0; i < kLpTileElements; ++i) {
    escapes = static_cast<uint16_t>(escapes + ((tile[i] & kHighMask) != kConstantHigh));
  }
  return escapes;
}

// Adds the codes of word p of four lanes: add_code of layout.h. upper: bits of kUpperBytes only.
JAXZIP_INLINE void AddCodes(U32x4 codes[3], int p, U32x4 upper) {
  if (p < 3) {
    codes[p] |= upper;
  } else if (p < 6) {
    codes[p - 3] |= upper << 3 | upper >> 29;
  } else {
    codes[p - 6] |= (upper & kLpExponents) << 5;
    codes[2] |= (upper & kLpSigns) >> (p - 5);
  }
}

// Rows g and g + 8 of a 16x64 tile into their words; escapes[v]: a bit for each of their positions in vector v.
inline void EncodeRowPair(const uint16_t* row0, const uint16_t* row1, int g, uint32_t* lower, uint32_t* codes,
                          uint64_t escapes[2]) {
  using namespace lane_planar;
  U32x4 word[3] = {};
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    U32x4 low[4], escaped[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int p = 4 * v + i;
      const U16x8 a = LoadVec<U16x8>(row0 + 8 * p), b = LoadVec<U16x8>(row1 + 8 * p);
      const U32x4 upper = (U32x4)(a >> 8 | (b & 0xFF00));
      low[i] = (U32x4)((a & 0xFF) | b << 8);
      escaped[i] = (upper & kLpHigh) ^ kPlaneWord;
      AddCodes(word, p, upper & kUpperBytes);
    }
    Transpose4x4(low);
    Transpose4x4(escaped);
    escapes[v] = 0;
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      StoreVec(lower + 128 * v + 16 * g + 4 * t, low[t]);
      escapes[v] |= uint64_t{NonzeroMask(escaped[t])} << 16 * t;
    }
  }
  StoreVec(codes + 8 * g, UnpackLo(word[0], word[1]));
  StoreVec(codes + 8 * g + 4, UnpackHi(word[0], word[1]));
  StoreVec(codes + 64 + 4 * g, word[2]);
}

int64_t EncodeBlock(const uint16_t* tile, uint32_t name, int block_words, uint32_t* block, uint32_t* overflow) {
  using namespace lane_planar;
  uint16_t entries[kMaxEntries];
  const int room = 2 * (block_words - kEntryStart);
  int used = 0;
  int64_t spilled = 0;
  uint32_t ends = 0;
  for (int i = 0; i < kTiles; ++i) {
    const uint16_t* top = tile + i * kTileElements;
    uint64_t escapes[8][2];
    for (int g = 0; g < 8; ++g) {
      EncodeRowPair(top + g * kLpBlock, top + (g + 8) * kLpBlock, g, block + i * kLowerWords,
                    block + kCodeStart + i * kCodeWords, escapes[g]);
    }
    for (int v = 0; v < 2; ++v) {
      for (int g = 0; g < 8; ++g) {
        for (uint64_t left = escapes[g][v]; left; left &= left - 1) {
          const int in_tile = v << 9 | g << 6 | __builtin_ctzll(left);
          const uint32_t position = static_cast<uint32_t>(i * kTileElements + in_tile);
          const uint32_t high = top[kLpPlaces.of[in_tile]] >> 10 & 31;
          if (used < room) {
            const uint32_t entry = (position & ((1u << kEntryPositionBits) - 1)) | high << kEntryPositionBits;
            entries[used++] = static_cast<uint16_t>(entry);
          } else {
            overflow[2 * spilled] = name;
            overflow[2 * spilled++ + 1] = position | high << kPositionBits;
          }
        }
      }
    }
    ends |= static_cast<uint32_t>(used) << 8 * i;
  }
  block[kHeaderStart] = ends;
  char* list = reinterpret_cast<char*>(block + kEntryStart);
  std::memcpy(list, entries, static_cast<size_t>(used) * 2);
  std::memset(list + 2 * used, 0, static_cast<size_t>(room - used) * 2);
  return spilled;
}

}  // namespace
}  // namespace jaxzip
