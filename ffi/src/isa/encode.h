// Encodes one 64x64 tile, bitmaps first, values once the offsets are known: the fastest way of each instruction-set level.
#pragma once
#include "jaxzip/kernels.h"
#include "jaxzip/layout.h"

#if defined(__AVX512VBMI2__)
#include "isa/encode_avx512.h"
#elif defined(__AVX2__)
#include "isa/encode_avx2.h"
#else

namespace jaxzip {
namespace {

inline uint16_t ElementAt(const uint16_t* src, int64_t stride, bool transposed, int f, int p) {
  const int64_t r = layout::FragRow(f) * 8 + p / 8, c = layout::FragCol(f) * 8 + p % 8;
  return transposed ? src[c * stride + r] : src[r * stride + c];
}

void EncodeBitmaps(const uint16_t* src, int64_t stride, bool transposed, uint8_t start_exp,
                   uint64_t* const bitmaps[3], int32_t in_window[4]) {
  for (int f = 0; f < layout::kFragsPerBlock; ++f) {
    uint64_t b[3] = {0, 0, 0};
    for (int p = 0; p < layout::kFragSize; ++p) {
      const uint32_t v = ElementAt(src, stride, transposed, f, p);
      const uint32_t code = (v >> 7 & 0xff) - start_exp;
      const uint64_t c = code - 1 < layout::kWindow ? code : 0;
      for (int i = 0; i < 3; ++i) b[i] |= (c >> i & 1) << p;
    }
    for (int i = 0; i < 3; ++i) bitmaps[i][f] = b[i];
    in_window[f / layout::kFragsPerBand] += __builtin_popcountll(b[0] | b[1] | b[2]);
  }
}

void EncodeValues(const uint16_t* src, int64_t stride, bool transposed, const uint64_t* const bitmaps[3],
                  uint8_t* sign_mantissa, uint16_t* full) {
  for (int f = 0; f < layout::kFragsPerBlock; ++f) {
    const uint64_t any = bitmaps[0][f] | bitmaps[1][f] | bitmaps[2][f];
    for (int p = 0; p < layout::kFragSize; ++p) {
      // Both are written, one is kept: no branch to mispredict.
      const uint16_t v = ElementAt(src, stride, transposed, f, p);
      const uint32_t in = any >> p & 1;
      *sign_mantissa = static_cast<uint8_t>((v >> 8 & 0x80) | (v & 0x7f));
      *full = v;
      sign_mantissa += in;
      full += 1 - in;
    }
  }
}

}  // namespace
}  // namespace jaxzip

#endif
