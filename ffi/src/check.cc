// Checks everything that a kernel later trusts: offsets against the bitmaps and the lengths of the arrays.
#include <mutex>

#include "codec.h"
#include "dispatch.h"

namespace jaxzip {

Fault CheckTcaTbe(const Payload& p, const For& parallel_for) {
  using namespace layout;
  if (*p.start_exp > kMaxStartExp) return {"start_exp", 0, kMaxStartExp, *p.start_exp};
  const int64_t blocks = NumBlocks(p.m, p.k);
  for (int c = 0; c < 2; ++c) {
    if (p.tile_offsets[c]) {
      return {c ? "tile_offsets[full]" : "tile_offsets[sign_mantissa]", 0, 0, p.tile_offsets[c]};
    }
  }

  constexpr int64_t kBlocksPerUnit = 256;
  std::mutex mutex;
  int64_t first = blocks + 1;
  Fault found;
  parallel_for(CeilDiv(blocks, kBlocksPerUnit), [&](int64_t unit) {
    auto report = [&](int64_t block, const char* field, int64_t index, int64_t expected, int64_t value) {
      std::lock_guard<std::mutex> lock(mutex);
      if (block >= first) return;
      first = block;
      found = {field, index, expected, value};
    };
    for (int64_t b = unit * kBlocksPerUnit; b < std::min(blocks, (unit + 1) * kBlocksPerUnit); ++b) {
      int32_t in_window[kBandsPerBlock];
      Kernels().count_bands(p, b, in_window);
      int64_t at[2] = {0, 0};
      for (int band = 0; band < kBandsPerBlock; ++band) {
        const int64_t i = b * kBandsPerBlock + band;
        for (int c = 0; c < 2; ++c) {
          if (p.band_offsets[2 * i + c] != at[c]) {
            return report(b, c ? "band_offsets[full]" : "band_offsets[sign_mantissa]", i, at[c],
                          p.band_offsets[2 * i + c]);
          }
        }
        at[0] += in_window[band];
        at[1] += kBandRows * kBlock - in_window[band];
      }
      for (int c = 0; c < 2; ++c) {
        const int64_t next = int64_t{p.tile_offsets[2 * b + c]} +
                             (c ? RoundUp(at[1], kFullAlign) : RoundUp(at[0], kSignMantissaAlign));
        if (p.tile_offsets[2 * b + 2 + c] != next) {
          return report(b, c ? "tile_offsets[full]" : "tile_offsets[sign_mantissa]", b + 1, next,
                        p.tile_offsets[2 * b + 2 + c]);
        }
      }
    }
  });
  if (found.field) return found;
  const int64_t total[2] = {p.tile_offsets[2 * blocks], p.tile_offsets[2 * blocks + 1]};
  if (total[0] > p.sign_mantissa_len) return {"sign_mantissa length", 0, total[0], p.sign_mantissa_len};
  if (total[1] > p.full_len) return {"full length", 0, total[1], p.full_len};
  return {};
}

}  // namespace jaxzip
