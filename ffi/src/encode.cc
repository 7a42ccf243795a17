// Encodes a tensor: chooses the window, writes bitmaps and counts, sums offsets, then writes the values.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "allocate.h"
#include "bands.h"
#include "codec.h"
#include "dispatch.h"

namespace jaxzip {
namespace {

using Histogram = std::array<int64_t, 256>;

// Counts along the contiguous direction. Four tables, since equal neighbours would wait for each other's store.
void CountExponents(const uint16_t* p, int64_t n, int64_t stride, uint32_t (*counts)[256]) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int j = 0; j < 4; ++j) ++counts[j][p[(i + j) * stride] >> 7 & 0xff];
  }
  for (; i < n; ++i) ++counts[0][p[i * stride] >> 7 & 0xff];
}

Histogram ExponentHistogram(const Matrix& w, const For& parallel_for) {
  const bool along_k = std::abs(w.col_stride) <= std::abs(w.row_stride);
  const int64_t lines = along_k ? w.m : w.k, length = along_k ? w.k : w.m;
  const int64_t line_stride = along_k ? w.row_stride : w.col_stride, stride = along_k ? w.col_stride : w.row_stride;
  // Pieces short enough that 32-bit counts cannot overflow.
  constexpr int64_t kPiece = int64_t{1} << 20;
  const int64_t pieces = layout::CeilDiv(length, kPiece), lines_per_unit = std::max<int64_t>(1, kPiece / length);
  std::mutex mutex;
  Histogram total{};
  parallel_for(layout::CeilDiv(lines, lines_per_unit) * pieces, [&](int64_t unit) {
    uint32_t counts[4][256] = {};
    const int64_t piece = unit % pieces * kPiece, first = unit / pieces * lines_per_unit;
    for (int64_t l = first; l < std::min(lines, first + lines_per_unit); ++l) {
      const uint16_t* p = w.data + l * line_stride + piece * stride;
      const int64_t n = std::min(kPiece, length - piece);
      stride == 1 ? CountExponents(p, n, 1, counts) : CountExponents(p, n, stride, counts);
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int e = 0; e < 256; ++e) {
      total[e] += int64_t{counts[0][e]} + counts[1][e] + counts[2][e] + counts[3][e];
    }
  });
  return total;
}

// Start of the window of largest coverage, the lowest among equals.
int BestWindow(const Histogram& h) {
  int best = layout::kMinWindowStart;
  int64_t best_count = -1;
  for (int s = layout::kMinWindowStart; s <= layout::kMaxWindowStart; ++s) {
    int64_t count = 0;
    for (int e = s; e < s + layout::kWindow; ++e) count += h[e];
    if (count > best_count) {
      best_count = count;
      best = s;
    }
  }
  return best;
}

// A 64x64 tile to encode: in place where the matrix allows, else copied and padded into `copy`.
struct Tile {
  const uint16_t* data;
  int64_t stride;
  bool transposed;
};
Tile TileAt(const Matrix& band, int64_t block_column, uint16_t pad, uint16_t* copy) {
  using layout::kBlock;
  const int64_t c0 = block_column * kBlock, cols = std::min<int64_t>(kBlock, band.k - c0);
  const uint16_t* p = band.data + c0 * band.col_stride;
  if (band.m == kBlock && cols == kBlock) {
    if (band.col_stride == 1) return {p, band.row_stride, false};
    if (band.row_stride == 1) return {p, band.col_stride, true};
  }
  std::fill_n(copy, layout::kBlockSize, pad);
  for (int64_t r = 0; r < band.m; ++r) {
    for (int64_t c = 0; c < cols; ++c) copy[r * kBlock + c] = p[r * band.row_stride + c * band.col_stride];
  }
  return {copy, kBlock, false};
}

Encoded EncodeBands(const Bands& w, const Histogram& histogram, const For& parallel_for) {
  using namespace layout;
  const KernelTable& kernels = Kernels();
  const int64_t blocks = NumBlocks(w.m, w.k), blocks_per_row = CeilDiv(w.k, kBlock);
  Encoded out;
  out.start_exp = static_cast<uint8_t>(BestWindow(histogram) - 1);
  // Padding is +2^e with the window's first exponent: one byte each, where a zero would take two.
  const uint16_t pad = static_cast<uint16_t>((out.start_exp + 1) << 7);
  for (auto& b : out.bitmap) b = Allocate<uint64_t>(blocks * kFragsPerBlock);
  out.tile_offsets = Allocate<uint32_t>(2 * (blocks + 1));
  out.band_offsets = Allocate<int32_t>(2 * blocks * kBandsPerBlock);

  // Lengths go where the offsets will be: a block's own in the slot after it.
  ForEachBand(w, parallel_for, [&](int64_t block_row, const Matrix& band) {
    alignas(64) uint16_t copy[kBlockSize];
    for (int64_t b = block_row * blocks_per_row; b < (block_row + 1) * blocks_per_row; ++b) {
      uint64_t* bitmaps[3];
      for (int i = 0; i < 3; ++i) bitmaps[i] = out.bitmap[i].data.get() + b * kFragsPerBlock;
      int32_t in_window[kBandsPerBlock] = {};
      const Tile t = TileAt(band, b - block_row * blocks_per_row, pad, copy);
      kernels.encode_bitmaps(t.data, t.stride, t.transposed, out.start_exp, bitmaps, in_window);
      int32_t at[2] = {0, 0};
      int32_t* bands = out.band_offsets.data.get() + 2 * b * kBandsPerBlock;
      for (int band = 0; band < kBandsPerBlock; ++band) {
        bands[2 * band] = at[0];
        bands[2 * band + 1] = at[1];
        at[0] += in_window[band];
        at[1] += kBandRows * kBlock - in_window[band];
      }
      uint32_t* next = out.tile_offsets.data.get() + 2 * (b + 1);
      next[0] = static_cast<uint32_t>(RoundUp(at[0], kSignMantissaAlign));
      next[1] = static_cast<uint32_t>(RoundUp(at[1], kFullAlign));
    }
  });
  uint64_t total[2] = {0, 0};
  uint32_t* offsets = out.tile_offsets.data.get();
  offsets[0] = offsets[1] = 0;
  for (int64_t b = 1; b <= blocks; ++b) {
    for (int c = 0; c < 2; ++c) {
      total[c] += offsets[2 * b + c];
      offsets[2 * b + c] = static_cast<uint32_t>(total[c]);
    }
  }
  for (int c = 0; c < 2; ++c) {
    if (total[c] > UINT32_MAX) {
      throw std::overflow_error(std::string(c ? "full" : "sign_mantissa") + " would hold " +
                                std::to_string(total[c]) + " values; 32-bit offsets reach " +
                                std::to_string(UINT32_MAX) + ": split the tensor along M");
    }
  }

  out.sign_mantissa = Allocate<uint8_t>(static_cast<int64_t>(total[0]));
  out.full = Allocate<uint16_t>(static_cast<int64_t>(total[1]));
  ForEachBand(w, parallel_for, [&](int64_t block_row, const Matrix& band) {
    // Values are gathered here first: the kernels write whole vectors, past the end of what they keep.
    alignas(64) uint16_t copy[kBlockSize];
    alignas(64) uint8_t sign_mantissa[kBlockSize + kFragSize];
    alignas(64) uint16_t full[kBlockSize + kFragSize];
    for (int64_t b = block_row * blocks_per_row; b < (block_row + 1) * blocks_per_row; ++b) {
      const uint64_t* bitmaps[3];
      int64_t in_window = 0;
      for (int i = 0; i < 3; ++i) bitmaps[i] = out.bitmap[i].data.get() + b * kFragsPerBlock;
      for (int f = 0; f < kFragsPerBlock; ++f) {
        in_window += __builtin_popcountll(bitmaps[0][f] | bitmaps[1][f] | bitmaps[2][f]);
      }
      const Tile t = TileAt(band, b - block_row * blocks_per_row, pad, copy);
      kernels.encode_values(t.data, t.stride, t.transposed, bitmaps, sign_mantissa, full);
      const int64_t sm_len = RoundUp(in_window, kSignMantissaAlign), full_len = RoundUp(kBlockSize - in_window, kFullAlign);
      std::fill(sign_mantissa + in_window, sign_mantissa + sm_len, uint8_t{0});
      std::fill(full + (kBlockSize - in_window), full + full_len, uint16_t{0});
      std::memcpy(out.sign_mantissa.data.get() + offsets[2 * b], sign_mantissa, static_cast<size_t>(sm_len));
      std::memcpy(out.full.data.get() + offsets[2 * b + 1], full, static_cast<size_t>(full_len) * 2);
    }
  });
  return out;
}

}  // namespace

Encoded EncodeTcaTbe(const Matrix& w, const For& parallel_for) {
  return EncodeBands(BandsOf(w), ExponentHistogram(w, parallel_for), parallel_for);
}

Encoded EncodeTcaTbe(const Bands& bands, const For& parallel_for) {
  const For serial = [](int64_t units, const std::function<void(int64_t)>& body) {
    for (int64_t u = 0; u < units; ++u) body(u);
  };
  std::mutex mutex;
  Histogram total{};
  ForEachBand(bands, parallel_for, [&](int64_t, const Matrix& rows) {
    const Histogram part = ExponentHistogram(rows, serial);
    std::lock_guard<std::mutex> lock(mutex);
    for (int e = 0; e < 256; ++e) total[e] += part[e];
  });
  return EncodeBands(bands, total, parallel_for);
}

}  // namespace jaxzip
