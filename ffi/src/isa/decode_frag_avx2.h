// Decodes one FragTile with AVX2 and BMI2.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa/frag.h"
#include "isa/vec128.h"

namespace jaxzip {
namespace {

// For each mask of eight positions: which of the packed bytes each position takes; 0x80, which selects none, for the others.
struct SpreadTable {
  uint64_t of[256];
};
constexpr SpreadTable MakeSpreadTable() {
  SpreadTable t{};
  for (int mask = 0; mask < 256; ++mask) {
    uint64_t rank = 0;
    for (int i = 0; i < 8; ++i) t.of[mask] |= (mask >> i & 1 ? rank++ : 0x80) << 8 * i;
  }
  return t;
}
constexpr SpreadTable kSpread = MakeSpreadTable();

// Where each position of a FragTile lies once arranged.
struct PlaceTable {
  uint8_t of[64];
};
constexpr PlaceTable MakePlaceTable(Arrange a) {
  PlaceTable t{};
  for (int p = 0; p < 64; ++p) t.of[p] = static_cast<uint8_t>(ArrangeIndex(a, p >> 3, p & 7));
  return t;
}
constexpr PlaceTable kPlaces[3] = {MakePlaceTable(Arrange::kRowMajor), MakePlaceTable(Arrange::kTransposed),
                                   MakePlaceTable(Arrange::kMatmul)};

// Four rows at a time: byte shuffles spread the packed bytes, which no AVX2 instruction does by itself, and the
// bitmaps become masks of bytes. In each half of a vector lie two rows, columns 0..3 of both before 4..7, so that
// interleaving low and high bytes gives the order that the matrix product wants.
struct FragDecoder {
  __m256i byte_of, bit_of, second_row, low7, odd, half_start;
  Arrange arrange;
  FragDecoder(uint8_t start_exp, Arrange a) : arrange(a) {
    byte_of = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 2, 2, 2, 2, 3, 3,
                               3, 3);
    bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x0804020108040201ull));
    bit_of = _mm256_blend_epi32(bit_of, _mm256_slli_epi16(bit_of, 4), 0xCC);
    second_row = _mm256_setr_epi64x(0, 0x0808080808080808, 0, 0x0808080808080808);
    low7 = _mm256_set1_epi8(0x7f);
    odd = _mm256_set1_epi8(start_exp & 1 ? -1 : 0);
    half_start = _mm256_set1_epi8(static_cast<char>(start_exp >> 1));
  }

  // Reads up to kFastSignMantissa and kFastFull values whatever their number.
  JAXZIP_INLINE void operator()(const Payload& p, int64_t frag, uint64_t any, const uint8_t* sm, const uint16_t* full,
                                uint16_t* out) const {
    __m256i lo[2], hi[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const uint32_t in = static_cast<uint32_t>(any >> 32 * h);
      const uint32_t mask[4] = {in & 0xff, in >> 8 & 0xff, in >> 16 & 0xff, in >> 24};
      const uint8_t* row[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        row[r] = sm;
        sm += __builtin_popcount(mask[r]);
      }
      const __m256i packed = FourRows(row[0], row[1], row[2], row[3]);
      const __m256i from =
          FourRows(&kSpread.of[mask[0]], &kSpread.of[mask[1]], &kSpread.of[mask[2]], &kSpread.of[mask[3]]);
      const __m256i s =
          _mm256_shuffle_epi32(_mm256_shuffle_epi8(packed, _mm256_add_epi8(from, second_row)), 0xD8);
      const __m256i b1 = Bits(p.bitmap[0] + 2 * frag + h), b2 = Bits(p.bitmap[1] + 2 * frag + h);
      const __m256i b3 = Bits(p.bitmap[2] + 2 * frag + h);
      // The exponent is start + code; what is above its lowest bit goes to the high byte: no carry leaves that, since
      // start <= 248. Masks are -1 where a bit is set.
      const __m256i above = _mm256_sub_epi8(
          _mm256_sub_epi8(_mm256_sub_epi8(half_start, b2), _mm256_and_si256(b1, odd)), _mm256_add_epi8(b3, b3));
      lo[h] = _mm256_or_si256(_mm256_and_si256(low7, s), _mm256_andnot_si256(low7, _mm256_xor_si256(b1, odd)));
      hi[h] = _mm256_or_si256(_mm256_andnot_si256(low7, s), above);
    }
    if (arrange == Arrange::kMatmul) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        Store(out + 16 * h, _mm256_unpacklo_epi8(lo[h], hi[h]));
        Store(out + 32 + 16 * h, _mm256_unpackhi_epi8(lo[h], hi[h]));
      }
    } else {
      alignas(32) uint16_t rows[64];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i left = _mm256_unpacklo_epi8(lo[h], hi[h]), right = _mm256_unpackhi_epi8(lo[h], hi[h]);
        const __m256i even = _mm256_unpacklo_epi64(left, right), odd_rows = _mm256_unpackhi_epi64(left, right);
        Store(rows + 32 * h, _mm256_permute2x128_si256(even, odd_rows, 0x20));
        Store(rows + 32 * h + 16, _mm256_permute2x128_si256(even, odd_rows, 0x31));
      }
      if (arrange == Arrange::kRowMajor) {
        std::memcpy(out, rows, sizeof rows);
      } else {
        Transpose8x8(rows, 8, out, 8);
      }
    }
    // Most FragTiles have a few fallbacks: as many turns for each, so that their number is not mispredicted.
    const uint8_t* place = kPlaces[static_cast<int>(arrange)].of;
    uint16_t none_left;
    uint64_t none = ~any;
#pragma GCC unroll 4
    for (int i = 0; i < kTurns; ++i) {
      uint16_t* to = out + place[_tzcnt_u64(none) & 63];
      to = none ? to : &none_left;
      std::memcpy(to, full + i, 2);
      none = _blsr_u64(none);
    }
    for (full += kTurns; __builtin_expect(none != 0, 0); none = _blsr_u64(none)) {
      std::memcpy(out + place[_tzcnt_u64(none)], full++, 2);
    }
  }

 private:
  static constexpr int kTurns = 4;

  static JAXZIP_INLINE __m256i FourRows(const void* r0, const void* r1, const void* r2, const void* r3) {
    const auto two = [](const void* a, const void* b) __attribute__((always_inline)) {
      const __m128i low = _mm_loadl_epi64(static_cast<const __m128i*>(a));
      return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), static_cast<const __m64*>(b)));
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(two(r0, r1)), two(r2, r3), 1);
  }
  JAXZIP_INLINE __m256i Bits(const uint32_t* half_bitmap) const {
    int32_t bits;
    std::memcpy(&bits, half_bitmap, 4);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  }
  static JAXZIP_INLINE void Store(uint16_t* to, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), v); }
};

}  // namespace
}  // namespace jaxzip
