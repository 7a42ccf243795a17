// Shares decompression, matrix products and row lookups out among threads, a row of BlockTiles at a time.
#include <cstring>

#include "codec.h"
#include "dispatch.h"
#include "fault_sink.h"

namespace jaxzip {
namespace {

int64_t RowsPerPack() { return Kernels().n_block; }

}  // namespace

std::string Describe(const Fault& f) {
  return std::string(f.field) + "[" + std::to_string(f.index) + "]: expected " + std::to_string(f.expected) +
         ", found " + std::to_string(f.found);
}

namespace {

template <typename P, typename F>
Fault Decompress(const P& p, F decompress_rows, uint16_t* out, int64_t row_stride, int64_t col_stride,
                 const For& parallel_for) {
  FaultSink sink;
  parallel_for(layout::CeilDiv(p.m, layout::kBlock), [&](int64_t block_row) {
    Fault fault;
    const int64_t m0 = block_row * layout::kBlock;
    if (col_stride == 1 || p.k == 1) {
      decompress_rows(p, block_row, out + m0 * row_stride, row_stride, false, &fault);
    } else if (row_stride == 1 || p.m == 1) {
      decompress_rows(p, block_row, out + m0 * row_stride, col_stride, true, &fault);
    } else {
      // Neither direction is contiguous: through a dense copy of these 64 rows.
      const int64_t rows = std::min<int64_t>(layout::kBlock, p.m - m0);
      std::vector<uint16_t> dense(static_cast<size_t>(rows * p.k));
      decompress_rows(p, block_row, dense.data(), p.k, false, &fault);
      for (int64_t r = 0; r < rows && !fault.field; ++r) {
        uint16_t* dst = out + (m0 + r) * row_stride;
        for (int64_t c = 0; c < p.k; ++c) dst[c * col_stride] = dense[static_cast<size_t>(r * p.k + c)];
      }
    }
    sink.Report(block_row, fault);
  });
  return sink.Get();
}

}  // namespace

Fault DecompressTcaTbe(const Payload& p, uint16_t* out, int64_t row_stride, int64_t col_stride,
                       const For& parallel_for) {
  return Decompress(p, Kernels().decompress_rows, out, row_stride, col_stride, parallel_for);
}

Fault DecompressLanePlanar(const LanePlanarPayload& p, uint16_t* out, int64_t row_stride, int64_t col_stride,
                           const For& parallel_for) {
  return Decompress(p, Kernels().lane_planar.decompress_rows, out, row_stride, col_stride, parallel_for);
}

int64_t PackedSize(int64_t n, int64_t k) { return n * layout::RoundUp(k, layout::kBlock); }

void PackRows(const void* x, bool x_is_f32, int64_t n, int64_t k, float* packed, const For& parallel_for) {
  const KernelTable& kernels = Kernels();
  // Groups of kMatmulRows first, since each call of matmul_rows sees one of these.
  const int64_t per_call = layout::CeilDiv(kMatmulRows, RowsPerPack());
  const int64_t calls = n / kMatmulRows, rest = n % kMatmulRows;
  parallel_for(calls * per_call + layout::CeilDiv(rest, RowsPerPack()), [&](int64_t unit) {
    const int64_t call0 = unit / per_call * kMatmulRows;
    const int64_t n0 = call0 + unit % per_call * RowsPerPack();
    const int64_t end = std::min(n, call0 + kMatmulRows);
    kernels.pack_x(x, x_is_f32, k, n0, static_cast<int>(std::min<int64_t>(RowsPerPack(), end - n0)),
                   packed + PackedSize(n0, k));
  });
}

Fault Matmul(const Weight& w, const float* packed, int64_t n, void* y, bool y_is_f32, const For& parallel_for) {
  const KernelTable& kernels = Kernels();
  const int64_t block_rows = layout::CeilDiv(w.m, layout::kBlock);
  FaultSink sink;
  parallel_for(block_rows * layout::CeilDiv(n, kMatmulRows), [&](int64_t unit) {
    const int64_t n0 = unit / block_rows * kMatmulRows;
    Fault fault;
    kernels.matmul_rows(w, unit % block_rows, packed + PackedSize(n0, w.k), std::min(kMatmulRows, n - n0),
                        static_cast<char*>(y) + n0 * w.m * (y_is_f32 ? 4 : 2), y_is_f32, w.m, &fault);
    sink.Report(unit, fault);
  });
  return sink.Get();
}

namespace {

uint64_t LoadWord(const uint32_t* bitmap, int64_t frag) {
  uint64_t v;
  std::memcpy(&v, bitmap + 2 * frag, 8);
  return v;
}

Fault TakeRow(const Payload& p, int64_t row, uint16_t* out) {
  using namespace layout;
  const int64_t blocks = CeilDiv(p.k, kBlock);
  const int band = static_cast<int>(row % kBlock / kBandRows), r = static_cast<int>(row % kFrag);
  const int half = static_cast<int>(row % kBandRows / kFrag);
  for (int64_t bc = 0; bc < blocks; ++bc) {
    const int64_t block = row / kBlock * blocks + bc, b = block * kBandsPerBlock + band;
    int64_t sm = int64_t{p.tile_offsets[2 * block]} + p.band_offsets[2 * b];
    int64_t full = int64_t{p.tile_offsets[2 * block + 1]} + p.band_offsets[2 * b + 1];
    for (int f = 0; f < kFragsPerBand; ++f) {
      const int64_t frag = b * kFragsPerBand + f;
      const uint64_t w[3] = {LoadWord(p.bitmap[0], frag), LoadWord(p.bitmap[1], frag), LoadWord(p.bitmap[2], frag)};
      const uint64_t any = w[0] | w[1] | w[2];
      if ((f & 1) == half) {
        const int before = __builtin_popcountll(any & ((uint64_t{1} << 8 * r) - 1));
        int64_t s = sm + before, u = full + 8 * r - before;
        const int in = __builtin_popcountll(any >> 8 * r & 0xff);
        if (s < 0 || s + in > p.sign_mantissa_len) return {"sign_mantissa", frag, s + in, p.sign_mantissa_len};
        if (u < 0 || u + 8 - in > p.full_len) return {"full", frag, u + 8 - in, p.full_len};
        const int64_t col0 = bc * kBlock + FragCol(f) * kFrag;
        for (int c = 0; c < kFrag; ++c) {
          const int bit = 8 * r + c;
          const uint32_t code = (w[0] >> bit & 1) | (w[1] >> bit & 1) << 1 | (w[2] >> bit & 1) << 2;
          uint16_t v;
          if (code) {
            const uint32_t byte = p.sign_mantissa[s++];
            v = static_cast<uint16_t>((byte & 0x80) << 8 | ((*p.start_exp + code) & 0xff) << 7 | (byte & 0x7f));
          } else {
            v = p.full[u++];
          }
          if (col0 + c < p.k) out[col0 + c] = v;
        }
      }
      sm += __builtin_popcountll(any);
      full += kFragSize - __builtin_popcountll(any);
    }
  }
  return {};
}

template <typename P, typename F>
Fault Take(const P& p, F take_row, const int32_t* ids, int64_t n, uint16_t* out, const For& parallel_for) {
  constexpr int64_t kIdsPerUnit = 8;  // a row is a few microseconds: too little to hand out alone
  FaultSink sink;
  parallel_for(layout::CeilDiv(n, kIdsPerUnit), [&](int64_t unit) {
    for (int64_t i = unit * kIdsPerUnit; i < std::min(n, (unit + 1) * kIdsPerUnit); ++i) {
      if (ids[i] >= 0 && ids[i] < p.m) {
        sink.Report(i, take_row(ids[i], out + i * p.k));
      } else {
        std::fill_n(out + i * p.k, p.k, uint16_t{0x7FC0});
      }
    }
  });
  return sink.Get();
}

}  // namespace

Fault TakeTcaTbe(const Payload& p, const int32_t* ids, int64_t n, uint16_t* out, const For& parallel_for) {
  return Take(p, [&p](int64_t row, uint16_t* to) { return TakeRow(p, row, to); }, ids, n, out, parallel_for);
}

Fault TakeLanePlanar(const LanePlanarPayload& p, const int32_t* ids, int64_t n, uint16_t* out,
                     const For& parallel_for) {
  const auto take_row = [&p](int64_t row, uint16_t* to) {
    Fault fault;
    Kernels().lane_planar.decode_row(p, row, to, &fault);
    return fault;
  };
  return Take(p, take_row, ids, n, out, parallel_for);
}

}  // namespace jaxzip
