// Decodes one FragTile (64 positions) into scratch, for each instruction-set level.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa/arrange.h"
#include "jaxzip/kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Left to itself the compiler keeps some of these as calls, and the decoder's state then lives in memory.
#define JAXZIP_INLINE __attribute__((always_inline)) inline

namespace jaxzip {
namespace {

struct FragBits {
  uint64_t b1, b2, b3, any;
};

inline FragBits LoadBits(const Payload& p, int64_t frag) {
  FragBits b;
  std::memcpy(&b.b1, p.bitmap[0] + 2 * frag, 8);
  std::memcpy(&b.b2, p.bitmap[1] + 2 * frag, 8);
  std::memcpy(&b.b3, p.bitmap[2] + 2 * frag, 8);
  b.any = b.b1 | b.b2 | b.b3;
  return b;
}

// Reads exactly popcount(any) and 64 - popcount(any) values: for the end of the arrays, and for levels
// without a faster way. Never inlined, so that the fast path keeps its registers.
__attribute__((noinline)) void DecodeFragExact(const Payload& p, int64_t frag, const uint8_t* sm, const uint16_t* full,
                                               Arrange arrange, uint16_t* out) {
  const FragBits b = LoadBits(p, frag);
  for (int i = 0; i < 64; ++i) {
    const uint32_t code = (b.b1 >> i & 1) | (b.b2 >> i & 1) << 1 | (b.b3 >> i & 1) << 2;
    uint16_t v;
    if (code) {
      const uint32_t s = *sm++;
      v = static_cast<uint16_t>((s & 0x80) << 8 | ((*p.start_exp + code) & 0xff) << 7 | (s & 0x7f));
    } else {
      std::memcpy(&v, full++, 2);
    }
    out[ArrangeIndex(arrange, i >> 3, i & 7)] = v;
  }
}

// How many values a fast decoder may read past the current position in each array.
constexpr int kFastSignMantissa = 64, kFastFull = 32;

#if defined(__AVX512VBMI2__)

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

#elif defined(__AVX2__)

// Eight positions at a time: pdep spreads the packed bytes of one row, and rows without fallbacks, three
// quarters of them, take no branch.
struct FragDecoder {
  uint64_t start;
  Arrange arrange;
  FragDecoder(uint8_t start_exp, Arrange a) : start(0x0101010101010101ull * start_exp), arrange(a) {}

  inline void operator()(const Payload& p, int64_t frag, uint64_t, const uint8_t* sm, const uint16_t* full,
                         uint16_t* out) const {
    const FragBits b = LoadBits(p, frag);
    constexpr uint64_t kOnes = 0x0101010101010101ull;
    const __m128i low7 = _mm_set1_epi8(0x7f);
    alignas(16) uint16_t row16[64];
    for (int r = 0; r < 8; ++r) {
      const uint32_t a = b.any >> 8 * r & 0xff;
      const uint64_t code = _pdep_u64(b.b1 >> 8 * r & 0xff, kOnes) | _pdep_u64(b.b2 >> 8 * r & 0xff, kOnes << 1) |
                            _pdep_u64(b.b3 >> 8 * r & 0xff, kOnes << 2);
      uint64_t packed;
      std::memcpy(&packed, sm, 8);  // at most 8 bytes past the first 56: within kFastSignMantissa
      const __m128i s = _mm_cvtsi64_si128(static_cast<int64_t>(_pdep_u64(packed, _pdep_u64(a, kOnes) * 0xff)));
      const __m128i e = _mm_cvtsi64_si128(static_cast<int64_t>(start + code));  // no carry: start <= 248, code <= 7
      const __m128i lo = _mm_or_si128(_mm_and_si128(s, low7), _mm_andnot_si128(low7, _mm_slli_epi16(e, 7)));
      const __m128i hi = _mm_or_si128(_mm_andnot_si128(low7, s), _mm_and_si128(_mm_srli_epi16(e, 1), low7));
      _mm_store_si128(reinterpret_cast<__m128i*>(row16 + 8 * r), _mm_unpacklo_epi8(lo, hi));
      sm += __builtin_popcount(a);
      for (uint32_t none = ~a & 0xff; none; none &= none - 1) {
        std::memcpy(row16 + 8 * r + __builtin_ctz(none), full++, 2);
      }
    }
    if (arrange == Arrange::kRowMajor) {
      std::memcpy(out, row16, sizeof row16);
    } else if (arrange == Arrange::kMatmul) {
      for (int r = 0; r < 8; ++r) {
        std::memcpy(out + 4 * r, row16 + 8 * r, 8);
        std::memcpy(out + 32 + 4 * r, row16 + 8 * r + 4, 8);
      }
    } else {
      for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 8; ++c) out[c * 8 + r] = row16[r * 8 + c];
      }
    }
  }
};

#else

struct FragDecoder {
  Arrange arrange;
  FragDecoder(uint8_t, Arrange a) : arrange(a) {}
  inline void operator()(const Payload& p, int64_t frag, uint64_t, const uint8_t* sm, const uint16_t* full,
                         uint16_t* out) const {
    DecodeFragExact(p, frag, sm, full, arrange, out);
  }
};

#endif

}  // namespace
}  // namespace jaxzip
