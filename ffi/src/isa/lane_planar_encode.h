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

void CountEscapes(const uint16_t* tile, int32_t* coded, int32_t* uncoded) {
  using namespace lane_planar;
  constexpr uint16_t kUnit = 1 << 10, kLowest = kHighCodeBias * kUnit, kHighest = (kHighCodeBias + 15) * kUnit;
  uint16_t escapes = 0, without = 0;  // of 4096 elements
  for (int i = 0; i < kLpTileElements; ++i) {
    const uint16_t high = tile[i] & kHighMask;
    escapes = static_cast<uint16_t>(escapes + (high != kConstantHigh));
    without = static_cast<uint16_t>(without + ((high != 0 && high <= kLowest) || high > kHighest));
  }
  *coded = escapes - without;
  *uncoded = without;
}

// Spreads the bits of a byte, two to each byte of a word: bit 2 t + h goes to 8 t + h.
inline uint32_t SpreadPairs(uint32_t bits) {
  bits = (bits | bits << 12) & 0x000F000Fu;
  return (bits | bits << 6) & 0x03030303u;
}

// Rows g and g + 8 of a 16x64 tile into their words; escapes[j]: a bit for each of their positions in k-step j.
inline void EncodeRowPair(const uint16_t* row0, const uint16_t* row1, int g, uint32_t* sign_mantissa, uint32_t* codes,
                          uint32_t escapes[4]) {
  using namespace lane_planar;
  U32x4 word[3] = {};
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    U32x4 sm[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const U32x4 a[2] = {LoadVec<U32x4>(row0 + 32 * v + 8 * i), LoadVec<U32x4>(row1 + 32 * v + 8 * i)};
      sm[i] = (a[0] & kLpSignMantissa) | SwapBytes(a[1] & kLpSignMantissa);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int p = 8 * v + 2 * i + half, bit = kLpCodeBit[p % 5];
        const U32x4 code = a[half] & kLpCode;
        if (p == kLpLast) {
#pragma GCC unroll 3
          for (int b = 0; b < 3; ++b) word[b] |= code >> (7 + b) & 0x00010001u;
        } else {
          word[p / 5] |= bit <= 7 ? code >> (7 - bit) : code << (bit - 7);
        }
      }
      const auto odd = [](U32x4 x) { return (U16x8)((x & (kHighMask | kHighMask << 16)) ^ (kConstantHigh | kConstantHigh << 16)); };
      const uint32_t mask = NonzeroMask(odd(a[0]), odd(a[1]));  // (row, t, half) of q = i & 1
      const uint32_t spread = SpreadPairs(mask & 0xFF) | SpreadPairs(mask >> 8) << 2;
      escapes[2 * v + (i >> 1)] = i & 1 ? escapes[2 * v + (i >> 1)] | spread << 4 : spread;
    }
    Transpose4x4(sm);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) StoreVec(sign_mantissa + 128 * v + 16 * g + 4 * t, sm[t]);
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
    uint32_t escapes[8][4];
    for (int g = 0; g < 8; ++g) {
      EncodeRowPair(top + g * kLpBlock, top + (g + 8) * kLpBlock, g, block + i * kSignMantissaWords,
                    block + kCodeStart + i * kCodeWords, escapes[g]);
    }
    for (int j = 0; j < 4; ++j) {
      for (int g = 0; g < 8; ++g) {
        for (uint32_t left = escapes[g][j]; left; left &= left - 1) {
          const int in_tile = j << 8 | g << 5 | __builtin_ctz(left);
          const uint32_t position = static_cast<uint32_t>(i * kTileElements + in_tile);
          const uint32_t high = top[kLpPlaces.of[in_tile]] >> 10 & 31;
          const bool has_code = high == 0 || high - kHighCodeBias - 1 < 15;
          if (has_code && used < room) {
            entries[used++] = static_cast<uint16_t>(position | (high ? high - kHighCodeBias : 0) << kPositionBits);
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
