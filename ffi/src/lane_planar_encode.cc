// Encodes a tensor as lane-planar: chooses shifts and counts escapes band by band, then writes the blocks.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "allocate.h"
#include "bands.h"
#include "buffer_pool.h"
#include "codec.h"
#include "cuda/lane_planar/layout.h"
#include "dispatch.h"

namespace jaxzip {
namespace {

using lane_planar::kBlock;
constexpr int kTileSize = kBlock * kBlock;
constexpr int kExponents = 256;
constexpr int kWindow = 8, kWindowStart = 120, kMaxShift = 40, kMinShifted = 64, kMaxShifted = 190;
constexpr uint16_t kPadding = kWindowStart << 7;
constexpr int64_t kBlocksPerOverflow = 128;  // at most one block in so many may have more escapes than room

// What to add to a row's exponents so that its best window of 8 becomes 120..127, the lowest among equals; 0 where that
// is more than kMaxShift or a weight lies outside of kMinShifted..kMaxShifted.
int8_t ChooseShift(const uint32_t* count, bool has_subnormals) {
  int lowest = 1, highest = kExponents - 2;
  while (lowest <= highest && !count[lowest]) ++lowest;
  while (highest > lowest && !count[highest]) --highest;
  if (lowest > highest || has_subnormals) return 0;
  const int last = kExponents - 1 - kWindow;
  int start = std::clamp(lowest - kWindow + 1, 1, last), best = start;
  uint64_t covered = 0, most = 0;
  for (int e = start; e < start + kWindow; ++e) covered += count[e];
  for (; start <= std::min(highest, last); ++start) {
    if (covered > most) {
      most = covered;
      best = start;
    }
    covered += count[start + kWindow];
    covered -= count[start];
  }
  const int shift = kWindowStart - best;
  const bool safe = std::abs(shift) <= kMaxShift && lowest >= kMinShifted && highest <= kMaxShifted;
  return static_cast<int8_t>(safe ? shift : 0);
}

// Four tables, since equal neighbours would wait for each other's store.
void CountRow(const uint16_t* p, int64_t n, uint32_t (*counts)[kExponents]) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int j = 0; j < 4; ++j) ++counts[j][p[i + j] >> 7 & 0xff];
  }
  for (; i < n; ++i) ++counts[0][p[i] >> 7 & 0xff];
}

// A band of rows, contiguous along k.
struct Rows {
  const uint16_t* data;
  int64_t m, k, stride;
};

void ChooseShifts(const Rows& band, int8_t* shift) {
  for (int64_t r = 0; r < band.m; ++r) {
    const uint16_t* row = band.data + r * band.stride;
    uint32_t counts[4][kExponents] = {};
    CountRow(row, band.k, counts);
    for (int e = 0; e < kExponents; ++e) counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
    shift[r] = ChooseShift(counts[0], counts[0][0] && Kernels().lane_planar.has_subnormals(row, band.k));
  }
}

// The band's 64x64 tile at a block column, shifted; outside the matrix it holds a weight that never escapes.
void LoadTile(const Rows& band, int64_t block_column, const int8_t* shift, uint16_t* tile) {
  const LanePlanarKernels& kernels = Kernels().lane_planar;
  const int64_t cols = std::min<int64_t>(kBlock, band.k - block_column * kBlock);
  const uint16_t* p = band.data + block_column * kBlock;
  if (band.m == kBlock && cols == kBlock) return kernels.load_tile(p, band.stride, shift, tile);
  alignas(64) uint16_t copy[kTileSize] = {};
  for (int64_t r = 0; r < band.m; ++r) std::copy_n(p + r * band.stride, cols, copy + r * kBlock);
  kernels.load_tile(copy, kBlock, shift, tile);
  for (int64_t r = 0; r < kBlock; ++r) {
    std::fill(tile + r * kBlock + (r < band.m ? cols : 0), tile + (r + 1) * kBlock, kPadding);
  }
}

// Calls use(Rows); a band that is not contiguous along k is brought into scratch first.
template <typename F>
void WithRows(const Matrix& band, BufferPool& pool, F&& use) {
  if (band.col_stride == 1) return use(Rows{band.data, band.m, band.k, band.row_stride});
  // Not a power of two, whose lines would push each other out of the cache.
  const int64_t stride = layout::RoundUp(band.k, kBlock) + kBlock / 2;
  BufferPool::Lease scratch(pool, kBlock * stride);
  int64_t c = 0;
  if (band.row_stride == 1 && band.m == kBlock) {
    for (; c + kBlock <= band.k; c += kBlock) {
      Kernels().lane_planar.transpose_tile(band.data + c * band.col_stride, band.col_stride, scratch.data() + c, stride);
    }
  }
  for (int64_t r = 0; r < band.m; ++r) {
    for (int64_t i = c; i < band.k; ++i) {
      scratch.data()[r * stride + i] = band.data[r * band.row_stride + i * band.col_stride];
    }
  }
  use(Rows{scratch.data(), band.m, band.k, stride});
}

int Room(int block_words) { return 2 * (block_words - lane_planar::kEntryStart); }

// The narrowest width that holds the escapes of all but a few blocks.
int ChooseWidth(const std::vector<int32_t>& escapes) {
  for (int width : lane_planar::kBlockWidths) {
    const auto over = std::count_if(escapes.begin(), escapes.end(), [&](int32_t n) { return n > Room(width); });
    if (over * kBlocksPerOverflow <= static_cast<int64_t>(escapes.size())) return width;
  }
  return lane_planar::kMaxBlockWords;
}

}  // namespace

EncodedLanePlanar EncodeLanePlanar(const Bands& w, const For& parallel_for) {
  const LanePlanarKernels& kernels = Kernels().lane_planar;
  EncodedLanePlanar out;
  const int64_t rows = out.block_rows = layout::CeilDiv(w.m, kBlock);
  const int64_t columns = out.block_columns = layout::CeilDiv(w.k, kBlock);
  out.shift = Allocate<int8_t>(rows * kBlock);
  int8_t* shift = out.shift.data.get();
  BufferPool pool;
  std::vector<int32_t> escapes(static_cast<size_t>(rows * columns));
  ForEachBand(w, parallel_for, [&](int64_t block_row, const Matrix& any) {
    WithRows(any, pool, [&](const Rows& band) {
      alignas(64) uint16_t tile[kTileSize];
      int8_t* own = shift + block_row * kBlock;
      std::memset(own, 0, kBlock);
      ChooseShifts(band, own);
      for (int64_t bc = 0; bc < columns; ++bc) {
        LoadTile(band, bc, own, tile);
        escapes[static_cast<size_t>(block_row * columns + bc)] = kernels.count_escapes(tile);
      }
    });
  });

  const int width = out.block_words = ChooseWidth(escapes);
  std::vector<int64_t> first(escapes.size() + 1);
  for (size_t b = 0; b < escapes.size(); ++b) first[b + 1] = first[b] + std::max(0, escapes[b] - Room(width));
  if (first.back() >= UINT32_MAX) {
    throw std::overflow_error("overflow would hold " + std::to_string(first.back()) + " entries; 32 bits reach " +
                              std::to_string(UINT32_MAX - 1) + ": split the tensor along M");
  }
  out.blocks = Allocate<uint32_t>(rows * columns * width);
  out.overflow = Allocate<uint32_t>(2 * first.back());
  ForEachBand(w, parallel_for, [&](int64_t block_row, const Matrix& any) {
    WithRows(any, pool, [&](const Rows& band) {
      alignas(64) uint16_t tile[kTileSize];
      for (int64_t bc = 0; bc < columns; ++bc) {
        const int64_t b = block_row * columns + bc, at = first[static_cast<size_t>(b)];
        uint32_t* block = out.blocks.data.get() + b * width;
        LoadTile(band, bc, shift + block_row * kBlock, tile);
        const int64_t spilled = kernels.encode_block(tile, static_cast<uint32_t>(b + 1), width, block,
                                                     out.overflow.data.get() + 2 * at);
        block[lane_planar::kOverflowWord] = spilled ? static_cast<uint32_t>(at + 1) : 0;
      }
    });
  });
  return out;
}

}  // namespace jaxzip
