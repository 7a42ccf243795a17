// Lane-planar: what decoder and encoder share: where positions lie, and 64x64 tiles in and out of strided matrices.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda/lane_planar/layout.h"
#include "isa/vec128.h"

namespace jaxzip {
namespace {

constexpr int kLpBlock = lane_planar::kBlock;
constexpr int kLpTileElements = kLpBlock * kLpBlock;
constexpr int kLpPositionMask = (1 << lane_planar::kPositionBits) - 1;
constexpr uint32_t kLpSignMantissa = 0x807F807Fu;  // of two weights
constexpr uint32_t kLpCode = 0x03800380u;          // the low three exponent bits of two weights

// Register p of a lane keeps its two codes in code word p / 5 at bit kLpCodeBit[p % 5] of each half, register 15 its
// bit b at bit 0 of word b; a weight has them at bit 7.
constexpr int kLpCodeBit[5] = {7, 4, 1, 10, 13};
constexpr int kLpLast = 15;

// row * 64 + column in a 16x64 tile, of each position in it.
struct LpPlaces {
  uint16_t of[lane_planar::kTileElements];
};
constexpr LpPlaces MakeLpPlaces() {
  LpPlaces places{};
  for (int p = 0; p < lane_planar::kTileElements; ++p) {
    const int j = p >> 8, g = p >> 5 & 7, t = p >> 3 & 3, r = p >> 1 & 3, h = p & 1;
    places.of[p] = static_cast<uint16_t>((g + 8 * (r & 1)) * kLpBlock + 16 * j + 2 * t + 8 * (r >> 1) + h);
  }
  return places;
}
constexpr LpPlaces kLpPlaces = MakeLpPlaces();

// dst[j * 64 + i] = src[i * 64 + j], 64x64. Neither may be part of a large matrix: lines a power of two apart fall out
// of the cache before they are full.
inline void TransposeDense(const uint16_t* src, uint16_t* dst) {
  for (int i = 0; i < kLpBlock; i += 8) {
    for (int j = 0; j < kLpBlock; j += 8) {
      Transpose8x8(src + i * kLpBlock + j, kLpBlock, dst + j * kLpBlock + i, kLpBlock);
    }
  }
}

// `lines` lines of `length` elements from one matrix to another.
inline void CopyLines(const uint16_t* src, int64_t src_stride, uint16_t* dst, int64_t dst_stride, int64_t lines,
                      int64_t length) {
  if (length == kLpBlock) {
    for (int64_t i = 0; i < lines; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, 2 * kLpBlock);
  } else {
    for (int64_t i = 0; i < lines; ++i) {
      std::memcpy(dst + i * dst_stride, src + i * src_stride, static_cast<size_t>(length) * 2);
    }
  }
}

}  // namespace
}  // namespace jaxzip
