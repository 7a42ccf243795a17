// Encodes one 64x64 tile with AVX-512 and VBMI2.
#pragma once
#include <immintrin.h>

#include "isa/arrange.h"
#include "isa/tile_io.h"
#include "jaxzip/layout.h"

namespace jaxzip {
namespace {

// Low and high bytes of a FragTile's 64 elements, in position order.
struct FragSplitter {
  __m512i index[2];
  explicit FragSplitter(bool transposed) {
    static constexpr SplitTable kSplit[2] = {MakeSplitTable(Arrange::kRowMajor), MakeSplitTable(Arrange::kTransposed)};
    for (int b = 0; b < 2; ++b) index[b] = _mm512_loadu_si512(kSplit[transposed].byte[b]);
  }
  inline void operator()(const uint16_t* frag, __m512i* lo, __m512i* hi) const {
    const __m512i a = _mm512_load_si512(frag), b = _mm512_load_si512(frag + 32);
    *lo = _mm512_permutex2var_epi8(a, index[0], b);
    *hi = _mm512_permutex2var_epi8(a, index[1], b);
  }
};

void EncodeBitmaps(const uint16_t* src, int64_t stride, bool transposed, uint8_t start_exp,
                   uint64_t* const bitmaps[3], int32_t in_window[4]) {
  alignas(64) uint16_t frags[layout::kBlockSize];
  LoadTile(src, stride, transposed, frags);
  const FragSplitter split(transposed);
  const __m512i start = _mm512_set1_epi8(static_cast<char>(start_exp));
  for (int f = 0; f < layout::kFragsPerBlock; ++f) {
    __m512i lo, hi;
    split(frags + f * layout::kFragSize, &lo, &hi);
    // exponent = hi << 1 | lo >> 7, in bytes: select bit 0 from the shifted low bytes.
    const __m512i e = _mm512_ternarylogic_epi64(_mm512_set1_epi8(1), _mm512_srli_epi16(lo, 7),
                                                _mm512_add_epi8(hi, hi), 0xCA);
    const __m512i code = _mm512_sub_epi8(e, start);
    const __mmask64 in = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(code, _mm512_set1_epi8(1)),
                                                _mm512_set1_epi8(layout::kWindow));
    bitmaps[0][f] = _mm512_mask_test_epi8_mask(in, code, _mm512_set1_epi8(1));
    bitmaps[1][f] = _mm512_mask_test_epi8_mask(in, code, _mm512_set1_epi8(2));
    bitmaps[2][f] = _mm512_mask_test_epi8_mask(in, code, _mm512_set1_epi8(4));
    in_window[f / layout::kFragsPerBand] += __builtin_popcountll(in);
  }
}

void EncodeValues(const uint16_t* src, int64_t stride, bool transposed, const uint64_t* const bitmaps[3],
                  uint8_t* sign_mantissa, uint16_t* full) {
  alignas(64) uint16_t frags[layout::kBlockSize];
  LoadTile(src, stride, transposed, frags);
  const FragSplitter split(transposed);
  static constexpr JoinTable kJoin = MakeJoinTable(Arrange::kRowMajor);
  const __m512i join0 = _mm512_loadu_si512(kJoin.half[0]), join1 = _mm512_loadu_si512(kJoin.half[1]);
  for (int f = 0; f < layout::kFragsPerBlock; ++f) {
    __m512i lo, hi;
    split(frags + f * layout::kFragSize, &lo, &hi);
    const uint64_t any = bitmaps[0][f] | bitmaps[1][f] | bitmaps[2][f], none = ~any;
    const __m512i sm = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x7f), lo, hi, 0xCA);
    // Compress to a register and store it whole: compressing straight to memory is slow on AMD.
    _mm512_storeu_si512(sign_mantissa, _mm512_maskz_compress_epi8(any, sm));
    sign_mantissa += __builtin_popcountll(any);
    if (none) {
      const __mmask32 n0 = static_cast<uint32_t>(none), n1 = static_cast<uint32_t>(none >> 32);
      _mm512_storeu_si512(full, _mm512_maskz_compress_epi16(n0, _mm512_permutex2var_epi8(lo, join0, hi)));
      full += __builtin_popcount(n0);
      _mm512_storeu_si512(full, _mm512_maskz_compress_epi16(n1, _mm512_permutex2var_epi8(lo, join1, hi)));
      full += __builtin_popcount(n1);
    }
  }
}

}  // namespace
}  // namespace jaxzip
