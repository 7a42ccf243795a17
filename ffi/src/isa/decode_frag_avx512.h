// Decodes one FragTile with AVX-512 and VBMI2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa/frag.h"

namespace jaxzip {
namespace {

// A whole FragTile at a time: the bitmaps are mask registers, vpexpandb spreads the packed bytes over the
// positions, and one two-source byte permute per 32 elements interleaves the halves in any order.
struct FragDecoder {
  __m512i start, join0, join1, even, one, two, four, sign, low7;
  FragDecoder(uint8_t start_exp, Arrange a) {
    static constexpr JoinTable kJoin[3] = {MakeJoinTable(Arrange::kRowMajor), MakeJoinTable(Arrange::kTransposed),
                                           MakeJoinTable(Arrange::kMatmul)};
    start = _mm512_set1_epi8(static_cast<char>(start_exp));
    join0 = _mm512_loadu_si512(kJoin[static_cast<int>(a)].half[0]);
    join1 = _mm512_loadu_si512(kJoin[static_cast<int>(a)].half[1]);
    alignas(64) uint8_t e[64];
    for (int i = 0; i < 64; ++i) e[i] = static_cast<uint8_t>(2 * i);
    even = Opaque(_mm512_load_si512(e));
    one = Opaque(_mm512_set1_epi8(1));
    two = Opaque(_mm512_set1_epi8(2));
    four = Opaque(_mm512_set1_epi8(4));
    sign = Opaque(_mm512_set1_epi8(static_cast<char>(0x80)));
    low7 = Opaque(_mm512_set1_epi8(0x7f));
  }

  // Reads kFastSignMantissa and kFastFull values whatever their number; at most kFastFull fallbacks.
  JAXZIP_INLINE void operator()(const Payload& p, int64_t frag, uint64_t any_bits, const uint8_t* sm_ptr,
                                const uint16_t* full_ptr, uint16_t* out) const {
    const auto load_mask = [&](int i) {
      uint64_t bits;
      std::memcpy(&bits, p.bitmap[i] + 2 * frag, 8);
      return _cvtu64_mask64(bits);
    };
    const __mmask64 k1 = load_mask(0), k2 = load_mask(1), k3 = load_mask(2);
    const __mmask64 any = _cvtu64_mask64(any_bits), none = _knot_mask64(any);
    __m512i e = _mm512_mask_add_epi8(start, k1, start, one);
    e = _mm512_mask_add_epi8(e, k2, e, two);
    e = _mm512_mask_add_epi8(e, k3, e, four);
    const __m512i sm = _mm512_maskz_expand_epi8(any, Opaque(_mm512_loadu_si512(sm_ptr)));
    // There is no byte shift: shift words, and let the select drop the bit that came from the neighbour.
    __m512i hi = _mm512_ternarylogic_epi64(sign, sm, _mm512_srli_epi16(e, 1), 0xCA);
    __m512i lo = _mm512_ternarylogic_epi64(low7, sm, _mm512_slli_epi16(e, 7), 0xCA);
    const __m512i f = _mm512_loadu_si512(full_ptr);
    const __m512i rank = _mm512_maskz_expand_epi8(none, Opaque(even));
    lo = _mm512_mask_permutexvar_epi8(lo, none, rank, f);
    hi = _mm512_mask_permutexvar_epi8(hi, none, _mm512_or_si512(rank, one), f);
    _mm512_store_si512(out, _mm512_permutex2var_epi8(lo, join0, hi));
    _mm512_store_si512(out + 32, _mm512_permutex2var_epi8(lo, join1, hi));
  }

 private:
  // Hides a value's origin: constants stay in registers or on the stack instead of being built anew from scalars,
  // and vpexpandb keeps to its register form, much the faster one on AMD.
  static JAXZIP_INLINE __m512i Opaque(__m512i v) {
    asm("" : "+v"(v));
    return v;
  }
};

}  // namespace
}  // namespace jaxzip
