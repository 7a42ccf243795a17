// FragDecoder: decodes one FragTile (64 positions) into scratch, the fastest way of each instruction-set level.
#pragma once
#include "isa/frag.h"

#if defined(__AVX512VBMI2__)
#include "isa/decode_frag_avx512.h"
#elif defined(__AVX2__)
#include "isa/decode_frag_avx2.h"
#else

namespace jaxzip {
namespace {

struct FragDecoder {
  Arrange arrange;
  FragDecoder(uint8_t, Arrange a) : arrange(a) {}
  inline void operator()(const Payload& p, int64_t frag, uint64_t, const uint8_t* sm, const uint16_t* full,
                         uint16_t* out) const {
    DecodeFragExact(p, frag, sm, full, arrange, out);
  }
};

}  // namespace
}  // namespace jaxzip

#endif
