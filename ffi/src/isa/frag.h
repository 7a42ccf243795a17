// One FragTile of a payload: its bitmaps, and the decoder that reads no more values than there are.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa/arrange.h"
#include "jaxzip/kernels.h"

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

}  // namespace
}  // namespace jaxzip
