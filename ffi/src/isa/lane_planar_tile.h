// Lane-planar: what decoder and encoder share: where positions lie, and 64x64 tiles in and out of strided matrices.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda/lane_planar/layout.h"
#include "isa/lines.h"
#include "isa/vec128.h"

namespace jaxzip {
namespace {

constexpr int kLpBlock = lane_planar::kBlock;
constexpr int kLpTileElements = kLpBlock * kLpBlock;
constexpr int kLpPositionMask = (1 << lane_planar::kPositionBits) - 1;
constexpr uint32_t kLpSigns = lane_planar::kUpperBytes & 0x80808080u;
constexpr uint32_t kLpExponents = lane_planar::kUpperBytes & ~kLpSigns;
constexpr uint32_t kLpHigh = ~lane_planar::kUpperBytes;  // of four upper bytes: the high exponent bits

// row * 64 + column in a 16x64 tile, of each position in it.
struct LpPlaces {
  uint16_t of[lane_planar::kTileElements];
};
constexpr LpPlaces MakeLpPlaces() {
  LpPlaces places{};
  for (int p = 0; p < lane_planar::kTileElements; ++p) {
    const lane_planar::Place at = lane_planar::place_of(p);
    places.of[p] = static_cast<uint16_t>(lane_planar::fragment_row(at.lane, at.r) * kLpBlock +
                                         lane_planar::fragment_column(at.j, at.lane, at.r, at.h));
  }
  return places;
}
constexpr LpPlaces kLpPlaces = MakeLpPlaces();

// dst[j * dst_stride + i] = src[i * src_stride + j], 64x64. Lines of either side are read and written whole: in a large
// matrix they often lie a power of two apart, and then fall out of the cache before long. kStream: see StreamLines.
template <bool kStream>
inline void TransposeTile(const uint16_t* src, int64_t src_stride, uint16_t* dst, int64_t dst_stride) {
  alignas(64) uint16_t tile[kLpTileElements], lines[8 * kLpBlock];
  if (src_stride != kLpBlock) {
    CopyLines(src, src_stride, tile, kLpBlock, kLpBlock, kLpBlock);
    src = tile;
  }
  for (int j = 0; j < kLpBlock; j += 8) {
    for (int i = 0; i < kLpBlock; i += 8) Transpose8x8(src + i * kLpBlock + j, kLpBlock, lines + i, kLpBlock);
    if (kStream) {
      StreamLines(lines, dst + j * dst_stride, dst_stride);
    } else {
      CopyLines(lines, kLpBlock, dst + j * dst_stride, dst_stride, 8, kLpBlock);
    }
  }
}

}  // namespace
}  // namespace jaxzip
