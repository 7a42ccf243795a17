// Encodes one 64x64 tile with AVX2 and BMI2.
#pragma once
#include <immintrin.h>

#include "isa/arrange.h"
#include "isa/tile_io.h"
#include "jaxzip/layout.h"
#include "isa/vec128.h"

namespace jaxzip {
namespace {

// The elements of a FragTile, row by row, in two halves of four rows.
struct FragHalves {
  alignas(32) uint16_t rows[layout::kFragSize];
  FragHalves(const uint16_t* frag, bool transposed) {
    if (transposed) {
      Transpose8x8(frag, layout::kFrag, rows, layout::kFrag);
    } else {
      std::memcpy(rows, frag, sizeof rows);
    }
  }
  // One byte of each element of half h; `byte` makes it in the low byte of 16 bits whose high byte is zero.
  template <typename F>
  __m256i Bytes(int h, F&& byte) const {
    const __m256i* at = reinterpret_cast<const __m256i*>(rows + 32 * h);
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(byte(_mm256_load_si256(at)), byte(_mm256_load_si256(at + 1))),
                                    0xD8);
  }
};

void EncodeBitmaps(const uint16_t* src, int64_t stride, bool transposed, uint8_t start_exp,
                   uint64_t* const bitmaps[3], int32_t in_window[4]) {
  alignas(64) uint16_t frags[layout::kBlockSize];
  LoadTile(src, stride, transposed, frags);
  const __m256i start = _mm256_set1_epi8(static_cast<char>(start_exp)), one = _mm256_set1_epi8(1);
  const __m256i last = _mm256_set1_epi8(layout::kWindow - 1), low_byte = _mm256_set1_epi16(0xff);
  const auto exponent = [low_byte](__m256i v) { return _mm256_and_si256(_mm256_srli_epi16(v, 7), low_byte); };
  const auto bits = [](__m256i v) { return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(v))); };
  for (int f = 0; f < layout::kFragsPerBlock; ++f) {
    const FragHalves halves(frags + f * layout::kFragSize, transposed);
    uint64_t b[3] = {0, 0, 0};
    for (int h = 0; h < 2; ++h) {
      const __m256i code = _mm256_sub_epi8(halves.Bytes(h, exponent), start), less_one = _mm256_sub_epi8(code, one);
      const __m256i in = _mm256_cmpeq_epi8(_mm256_min_epu8(less_one, last), less_one);
      // A mask takes the highest bit of each byte, which a shift of 16 bits fills from within the byte.
      b[0] |= bits(_mm256_and_si256(in, _mm256_slli_epi16(code, 7))) << 32 * h;
      b[1] |= bits(_mm256_and_si256(in, _mm256_slli_epi16(code, 6))) << 32 * h;
      b[2] |= bits(_mm256_and_si256(in, _mm256_slli_epi16(code, 5))) << 32 * h;
    }
    for (int i = 0; i < 3; ++i) bitmaps[i][f] = b[i];
    in_window[f / layout::kFragsPerBand] += __builtin_popcountll(b[0] | b[1] | b[2]);
  }
}

void EncodeValues(const uint16_t* src, int64_t stride, bool transposed, const uint64_t* const bitmaps[3],
                  uint8_t* sign_mantissa, uint16_t* full) {
  alignas(64) uint16_t frags[layout::kBlockSize];
  LoadTile(src, stride, transposed, frags);
  const __m256i low7 = _mm256_set1_epi16(0x7f), sign = _mm256_set1_epi16(0x80);
  const auto signed_mantissa = [low7, sign](__m256i v) {
    return _mm256_or_si256(_mm256_and_si256(v, low7), _mm256_and_si256(_mm256_srli_epi16(v, 8), sign));
  };
  for (int f = 0; f < layout::kFragsPerBlock; ++f) {
    const FragHalves halves(frags + f * layout::kFragSize, transposed);
    const uint64_t any = bitmaps[0][f] | bitmaps[1][f] | bitmaps[2][f];
    alignas(32) uint64_t row[layout::kFrag];
    for (int h = 0; h < 2; ++h) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(row + 4 * h), halves.Bytes(h, signed_mantissa));
    }
    for (int r = 0; r < layout::kFrag; ++r) {
      const uint64_t mask = any >> 8 * r & 0xff;
      const uint64_t packed = _pext_u64(row[r], _pdep_u64(mask, 0x0101010101010101ull) * 0xff);
      std::memcpy(sign_mantissa, &packed, 8);
      sign_mantissa += __builtin_popcountll(mask);
    }
    for (uint64_t none = ~any; none; none = _blsr_u64(none)) *full++ = halves.rows[_tzcnt_u64(none)];
  }
}

}  // namespace
}  // namespace jaxzip
