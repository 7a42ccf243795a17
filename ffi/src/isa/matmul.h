// The fused matrix product: a band of 16x64 weights at a time is decoded (or, for a dense weight, copied) into
// L1 scratch and multiplied into the accumulators of up to kMatmulRows rows of x.
//
// Each output is two fp32 partial sums, over k mod 8 in {0, 1, 4, 5} and in {2, 3, 6, 7}, each in a fixed order
// of k, added at the end. That order depends neither on the number of rows nor on how work is shared out.
#pragma once
#include "isa/decode_band.h"
#include "isa/lane_planar_decode.h"
#include "isa/vec.h"
#include "jaxzip/kernels.h"

namespace jaxzip {
namespace {

constexpr int kBandSums = 2 * layout::kBandRows;         // floats of accumulator per band and row of x
constexpr int kVecs = kBandSums / kLanes;                // the same in vectors
constexpr int kGroups = layout::kBlock / layout::kFrag;  // groups of 8 k per band

// Where k (mod 8) lies in a packed group: the pairs (0,2) (1,3) (4,6) (5,7), one for each step of the loop.
constexpr int kPackOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};

void PackX(const void* x, bool is_f32, int64_t k, int64_t n0, int count, float* packed) {
  const int64_t groups = layout::RoundUp(k, layout::kBlock) / 8;
  for (int n = 0; n < count; ++n) {
    const float* xf = static_cast<const float*>(x) + (n0 + n) * k;
    const uint16_t* xb = static_cast<const uint16_t*>(x) + (n0 + n) * k;
    for (int64_t g = 0; g < groups; ++g) {
      float* out = packed + (g * count + n) * 8;
      const bool inside = 8 * g + 8 <= k;
      for (int i = 0; i < 8; ++i) {
        const int64_t c = 8 * g + kPackOrder[i];
        out[i] = inside || c < k ? (is_f32 ? xf[c] : WidenBf16(xb[c])) : 0.0f;
      }
    }
  }
}

// sums[n][kBandSums] += band * x for kRows rows of x. tile: FragTiles in kMatmul order; x: [kGroups][kRows][8].
// meanwhile(g), called once for each of the kGroups groups, is independent work for the idle half of the core.
template <int kRows, typename F>
JAXZIP_INLINE void MultiplyBand(const uint16_t* tile, const float* x, float* sums, F&& meanwhile) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[n][v] = Load(sums + n * kBandSums + v * kLanes);
  }
  for (int g = 0; g < kGroups; ++g, tile += 2 * layout::kFragSize, x += kRows * 8) {
    meanwhile(g);
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      Vec b[kRows];  // before the weights, which then need one register at a time
#pragma GCC unroll 8
      for (int n = 0; n < kRows; ++n) b[n] = BroadcastPair(x + n * 8 + step * 2);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const int lane = v * kLanes;
        const uint16_t* p = tile + lane / 16 * layout::kFragSize + (step >> 1) * 32 + lane % 16 * 2;
        const Vec w = step & 1 ? LoadOdd(p) : LoadEven(p);
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) acc[n][v] = MulAdd(w, b[n], acc[n][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) Store(sums + n * kBandSums + v * kLanes, acc[n][v]);
  }
}

template <int kRows, typename F>
JAXZIP_INLINE void MultiplyBandDispatch(int rows, const uint16_t* tile, const float* x, float* sums, F&& meanwhile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return MultiplyBandDispatch<kRows - 1>(rows, tile, x, sums, meanwhile);
  }
  MultiplyBand<kRows>(tile, x, sums, meanwhile);
}

// FragTile `f` of a band of a dense weight, as decoding would lay it out; outside the matrix it holds zeros.
inline void CopyFrag(const Weight& w, int64_t row0, int64_t col0, int f, uint16_t* tile) {
  const int64_t r0 = row0 + layout::FragRow(f) * 8, c0 = col0 + layout::FragCol(f) * 8;
  uint16_t* out = tile + f * layout::kFragSize;
  if (r0 + 8 <= w.m && c0 + 8 <= w.k && (w.col_stride == 1 || w.row_stride == 1)) {
    alignas(16) uint16_t turned[layout::kFragSize];
    const uint16_t* rows = w.dense + r0 * w.row_stride + c0 * w.col_stride;
    int64_t stride = w.row_stride;
    if (w.col_stride != 1) {
      Transpose8x8(rows, w.col_stride, turned, 8);
      rows = turned;
      stride = 8;
    }
    for (int r = 0; r < 8; ++r) {
      std::memcpy(out + ArrangeIndex(Arrange::kMatmul, r, 0), rows + r * stride, 8);
      std::memcpy(out + ArrangeIndex(Arrange::kMatmul, r, 4), rows + r * stride + 4, 8);
    }
    return;
  }
  for (int r = 0; r < 8; ++r) {
    for (int c = 0; c < 8; ++c) {
      const bool inside = r0 + r < w.m && c0 + c < w.k;
      out[ArrangeIndex(Arrange::kMatmul, r, c)] =
          inside ? w.dense[(r0 + r) * w.row_stride + (c0 + c) * w.col_stride] : 0;
    }
  }
}

// Padding may decode as anything, and NaN times the zeros that x is padded with is NaN.
inline void ClearColumns(int64_t first, uint16_t* tile) {
  for (int f = 0; f < layout::kFragsPerBand; ++f) {
    for (int c = 0; c < 8; ++c) {
      if (layout::FragCol(f) * 8 + c < first) continue;
      for (int r = 0; r < 8; ++r) tile[f * layout::kFragSize + ArrangeIndex(Arrange::kMatmul, r, c)] = 0;
    }
  }
}

// Where the bands of a row of BlockTiles come from, in storage order: Next() goes to a band, Fill() for each of its
// FragTiles in turn decodes it.
class TbeBands {
 public:
  TbeBands(const Weight& w, int64_t block_row)
      : stream_(*w.tbe, block_row * layout::CeilDiv(w.k, layout::kBlock), Arrange::kMatmul) {}
  bool Next(Fault* fault) { return stream_.Next(fault); }
  JAXZIP_INLINE void Fill(int f, uint16_t* tile) const { stream_.Decode(f, tile + f * layout::kFragSize); }

 private:
  BandStream stream_;
};

class LanePlanarBands {
 public:
  LanePlanarBands(const Weight& w, int64_t block_row)
      : p_(*w.lane_planar), block_(block_row * layout::CeilDiv(w.k, layout::kBlock) - 1),
        shift_(p_.shift + block_row * layout::kBlock) {}
  bool Next(Fault* fault) {
    band_ = (band_ + 1) % layout::kBandsPerBlock;
    if (band_ == 0 && !OpenBlock(p_, ++block_, &opened_, fault)) return false;
    PrefetchNextBlock(opened_, band_);
    return true;
  }
  // A pair of rows lies in every FragTile, so the whole band is there only after the last call.
  JAXZIP_INLINE void Fill(int f, uint16_t* tile) const {
    if (f & 1) {
      if (f == layout::kFragsPerBand - 1) Patch(tile);
      return;
    }
    const int g = f / 2;
    DecodeRowPair(TileLower(opened_, band_), TileCodes(opened_, band_), g, shift_ + band_ * layout::kBandRows,
                  [tile, g](int half, int c, U16x8 v) {
                    uint16_t* to = tile + layout::FragIndex(half, c) * layout::kFragSize + 4 * g;
                    std::memcpy(to, &v, 8);
                    std::memcpy(to + 32, reinterpret_cast<const char*>(&v) + 8, 8);
                  });
  }

 private:
  __attribute__((noinline)) void Patch(uint16_t* tile) const {
    const int8_t* shift = shift_ + band_ * layout::kBandRows;
    ForEachListed(opened_, band_, [&](uint32_t place, uint32_t high) {
      const int row = static_cast<int>(place >> 6), column = place & 63;
      const int frag = layout::FragIndex(row / layout::kFrag, column / layout::kFrag);
      const int at = ArrangeIndex(Arrange::kMatmul, row % layout::kFrag, column % layout::kFrag);
      PatchHigh(tile + frag * layout::kFragSize + at, high, shift[row]);
    });
  }

  const LanePlanarPayload p_;
  int64_t block_;
  const int8_t* shift_;
  int band_ = -1;
  LpBlock opened_{};
};

class DenseBands {
 public:
  DenseBands(const Weight& w, int64_t block_row) : w_(w), block_row_(block_row) {}
  bool Next(Fault*) {
    ++band_;
    return true;
  }
  JAXZIP_INLINE void Fill(int f, uint16_t* tile) const {
    CopyFrag(w_, block_row_ * layout::kBlock + band_ % layout::kBandsPerBlock * layout::kBandRows,
             band_ / layout::kBandsPerBlock * layout::kBlock, f, tile);
  }

 private:
  const Weight& w_;
  int64_t block_row_, band_ = -1;
};

template <typename Bands>
bool AccumulateRows(const Weight& w, int64_t block_row, const float* packed, int64_t n_count, float* sums,
                    Fault* fault) {
  using namespace layout;
  alignas(64) uint16_t tiles[2][kFragsPerBand * kFragSize];
  const int64_t blocks = CeilDiv(w.k, kBlock), padded_k = blocks * kBlock, bands = blocks * kBandsPerBlock;
  Bands source(w, block_row);
  if (!source.Next(fault)) return false;
  for (int f = 0; f < kFragsPerBand; ++f) source.Fill(f, tiles[0]);
  for (int64_t i = 0; i < bands; ++i) {
    const int64_t bc = i / kBandsPerBlock;
    uint16_t *tile = tiles[i & 1], *next = tiles[(i + 1) & 1];
    if ((bc + 1) * kBlock > w.k) ClearColumns(w.k - bc * kBlock, tile);
    // The next band is decoded while the first rows of x are multiplied with this one: the two keep different
    // parts of the core busy.
    const bool more = i + 1 < bands;
    if (more && !source.Next(fault)) return false;
    for (int64_t n0 = 0; n0 < n_count; n0 += kMaxRows) {
      const int rows = static_cast<int>(n_count - n0 < kMaxRows ? n_count - n0 : kMaxRows);
      const float* x = packed + n0 * padded_k + bc * kBlock * rows;
      float* s = sums + (i % kBandsPerBlock * n_count + n0) * kBandSums;
      if (more && n0 == 0) {
        MultiplyBandDispatch<kMaxRows>(rows, tile, x, s, [&source, next](int g) __attribute__((always_inline)) {
          source.Fill(2 * g, next);
          source.Fill(2 * g + 1, next);
        });
      } else {
        MultiplyBandDispatch<kMaxRows>(rows, tile, x, s, [](int) {});
      }
    }
  }
  return true;
}

void MatmulRows(const Weight& w, int64_t block_row, const float* packed, int64_t n_count, void* y, bool y_is_f32,
                int64_t y_row_stride, Fault* fault) {
  using namespace layout;
  alignas(64) float sums[kBandsPerBlock * kMatmulRows * kBandSums];
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(kBandsPerBlock * n_count * kBandSums));
  const bool ok = w.tbe           ? AccumulateRows<TbeBands>(w, block_row, packed, n_count, sums, fault)
                  : w.lane_planar ? AccumulateRows<LanePlanarBands>(w, block_row, packed, n_count, sums, fault)
                                  : AccumulateRows<DenseBands>(w, block_row, packed, n_count, sums, fault);
  if (!ok) return;
  const int64_t rows = w.m - block_row * kBlock < kBlock ? w.m - block_row * kBlock : kBlock;
  for (int64_t n = 0; n < n_count; ++n) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* s = sums + (r / kBandRows * n_count + n) * kBandSums + r % kBandRows * 2;
      const int64_t at = n * y_row_stride + block_row * kBlock + r;
      const float v = s[0] + s[1];
      if (y_is_f32) {
        static_cast<float*>(y)[at] = v;
      } else {
        static_cast<uint16_t*>(y)[at] = RoundToBf16(v);
      }
    }
  }
}

}  // namespace
}  // namespace jaxzip
