// Encodes a tensor as lane-planar, band by band: chooses shifts, counts escapes and writes the blocks.
#include <algorithm>
#include <atomic>
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

// Whether so many blocks of all may have more escapes than room.
bool AreFew(int64_t overflowing, size_t blocks) { return overflowing * kBlocksPerOverflow <= static_cast<int64_t>(blocks); }

bool HoldsMost(const std::vector<int32_t>& escapes, int width) {
  const auto over = std::count_if(escapes.begin(), escapes.end(), [&](int32_t n) { return n > Room(width); });
  return AreFew(over, escapes.size());
}

// The narrowest width that holds the escapes of all but a few blocks.
int ChooseWidth(const std::vector<int32_t>& escapes) {
  for (int width : lane_planar::kBlockWidths) {
    if (HoldsMost(escapes, width)) return width;
  }
  return lane_planar::kMaxBlockWords;
}

// Entries that find no room in their blocks, before each block.
std::vector<int64_t> CountSpilled(const std::vector<int32_t>& escapes, int width) {
  std::vector<int64_t> before(escapes.size() + 1);
  for (size_t b = 0; b < escapes.size(); ++b) before[b + 1] = before[b] + std::max(0, escapes[b] - Room(width));
  if (before.back() >= UINT32_MAX) {
    throw std::overflow_error("overflow would hold " + std::to_string(before.back()) + " entries; 32 bits reach " +
                              std::to_string(UINT32_MAX - 1) + ": split the tensor along M");
  }
  return before;
}

// Calls use(block, tile) for a band's tiles, shifted; `shift` is the band's.
template <typename F>
void ForEachTile(const Rows& band, int64_t block_row, const int8_t* shift, F&& use) {
  alignas(64) uint16_t tile[kTileSize];
  const int64_t columns = layout::CeilDiv(band.k, kBlock);
  for (int64_t bc = 0; bc < columns; ++bc) {
    LoadTile(band, bc, shift, tile);
    use(block_row * columns + bc, tile);
  }
}

struct Choices {
  std::vector<int8_t> shift;     // of the rows of whole bands
  std::vector<int32_t> escapes;  // of the blocks

  explicit Choices(const Bands& w)
      : shift(static_cast<size_t>(layout::RoundUp(w.m, kBlock))),
        escapes(shift.size() / kBlock * static_cast<size_t>(layout::CeilDiv(w.k, kBlock))) {}
  int8_t* of_band(int64_t block_row) { return shift.data() + block_row * kBlock; }
};

// Chooses shifts and counts escapes; `use(block, tile)` also gets every tile.
template <typename F>
void Choose(const Bands& w, const For& parallel_for, BufferPool& pool, Choices& choices, F&& use) {
  ForEachBand(w, parallel_for, [&](int64_t block_row, const Matrix& any) {
    WithRows(any, pool, [&](const Rows& band) {
      int8_t* shift = choices.of_band(block_row);
      ChooseShifts(band, shift);
      ForEachTile(band, block_row, shift, [&](int64_t b, const uint16_t* tile) {
        choices.escapes[static_cast<size_t>(b)] = Kernels().lane_planar.count_escapes(tile);
        use(b, tile);
      });
    });
  });
}

// Of some bands of rows from all over the matrix.
Choices ChooseForSample(const Bands& w, const For& parallel_for, BufferPool& pool) {
  constexpr int64_t kEvery = 16;
  const Bands sample = {layout::CeilDiv(w.m, kEvery * kBlock) * kBlock, w.k,
                        [&](int64_t block_row, const auto& use) { return w.with(block_row * kEvery, use); }};
  Choices choices(sample);
  Choose(sample, parallel_for, pool, choices, [](int64_t, const uint16_t*) {});
  return choices;
}

}  // namespace

// Most matrices are read once: a sample tells the width, and few blocks have overflow entries, which wait in a list of
// their band. Where either is not so, shifts and escapes are known before blocks are written.
EncodedLanePlanar EncodeLanePlanar(const Bands& w, const For& parallel_for) {
  const LanePlanarKernels& kernels = Kernels().lane_planar;
  EncodedLanePlanar out;
  const int64_t rows = out.block_rows = layout::CeilDiv(w.m, kBlock);
  const int64_t columns = out.block_columns = layout::CeilDiv(w.k, kBlock);
  BufferPool pool;
  Choices choices(w);
  std::vector<std::vector<uint32_t>> spilled(static_cast<size_t>(rows));
  const auto allocate = [&](int width) {
    out.block_words = width;
    out.blocks = {};  // not both at once
    out.blocks = Allocate<uint32_t>(rows * columns * width);
  };
  const auto encode = [&](const uint16_t* tile, int64_t b, uint32_t* overflow) {
    uint32_t* block = out.blocks.data.get() + b * out.block_words;
    block[lane_planar::kOverflowWord] = 0;
    return kernels.encode_block(tile, static_cast<uint32_t>(b + 1), out.block_words, block, overflow);
  };

  const std::vector<int32_t> sampled = ChooseForSample(w, parallel_for, pool).escapes;
  const int guess = ChooseWidth(sampled);
  std::atomic<bool> at_once = HoldsMost(sampled, guess);
  std::atomic<int64_t> overflowing = 0;
  if (at_once) allocate(guess);
  Choose(w, parallel_for, pool, choices, [&](int64_t b, const uint16_t* tile) {
    if (!at_once) return;
    uint32_t entries[2 * kTileSize];
    const int64_t count = encode(tile, b, entries);
    if (count == 0) return;
    if (!AreFew(++overflowing, choices.escapes.size())) at_once = false;  // the sample was none, and lists would grow
    std::vector<uint32_t>& list = spilled[static_cast<size_t>(b / columns)];
    list.insert(list.end(), entries, entries + 2 * count);
  });

  const int width = ChooseWidth(choices.escapes);
  const std::vector<int64_t> before = CountSpilled(choices.escapes, width);
  out.shift = Allocate<int8_t>(rows * kBlock);
  std::copy(choices.shift.begin(), choices.shift.end(), out.shift.data.get());
  out.overflow = Allocate<uint32_t>(2 * before.back());
  uint32_t* overflow = out.overflow.data.get();
  if (at_once && width == guess) {
    for (const std::vector<uint32_t>& list : spilled) overflow = std::copy(list.begin(), list.end(), overflow);
  } else {
    spilled.clear();
    allocate(width);
    ForEachBand(w, parallel_for, [&](int64_t block_row, const Matrix& any) {
      WithRows(any, pool, [&](const Rows& band) {
        ForEachTile(band, block_row, choices.of_band(block_row),
                    [&](int64_t b, const uint16_t* tile) { encode(tile, b, overflow + 2 * before[static_cast<size_t>(b)]); });
      });
    });
  }
  for (size_t b = 0; b < choices.escapes.size(); ++b) {
    if (before[b + 1] > before[b]) {
      out.blocks.data.get()[static_cast<int64_t>(b) * width + lane_planar::kOverflowWord] = static_cast<uint32_t>(before[b] + 1);
    }
  }
  return out;
}

}  // namespace jaxzip
