// Walks one BlockTile band by band, decoding it into scratch and checking its offsets on the way.
#pragma once
#include "isa/decode_frag.h"

namespace jaxzip {
namespace {

inline void SetFault(Fault* fault, const char* field, int64_t index, int64_t expected, int64_t found) {
  fault->field = field;
  fault->index = index;
  fault->expected = expected;
  fault->found = found;
}

// Memory safety rests on one comparison per FragTile with the ends of the arrays. That the offsets agree with
// the bitmaps, which a kernel jumping to a band relies on, falls out of having walked there.
class BlockDecoder {
 public:
  BlockDecoder(const Payload& p, Arrange arrange)
      : p_(p), start_(*p.start_exp), arrange_(arrange), decode_(start_, arrange) {}

  bool Begin(int64_t block, Fault* fault) {
    block_ = block;
    for (int c = 0; c < 2; ++c) {
      const int64_t length = c ? p_.full_len : p_.sign_mantissa_len;
      begin_[c] = p_.tile_offsets[2 * block + c];
      next_[c] = p_.tile_offsets[2 * block + 2 + c];
      if (begin_[c] > next_[c] || next_[c] > length) {
        SetFault(fault, c ? "tile_offsets[full]" : "tile_offsets[sign_mantissa]", block + 1,
                 begin_[c] > next_[c] ? begin_[c] : length, next_[c]);
        return false;
      }
      pos_[c] = begin_[c];
    }
    return true;
  }

  // Bands in order 0..3; `out` takes kFragsPerBand FragTiles.
  bool Band(int band, uint16_t* out, Fault* fault) {
    using namespace layout;
    for (int c = 0; c < 2; ++c) {
      const int64_t found = p_.band_offsets[(block_ * kBandsPerBlock + band) * 2 + c];
      if (found != pos_[c] - begin_[c]) {
        SetFault(fault, c ? "band_offsets[full]" : "band_offsets[sign_mantissa]", block_ * kBandsPerBlock + band,
                 pos_[c] - begin_[c], found);
        return false;
      }
    }
    int64_t sm = pos_[0], full = pos_[1];
    const int64_t frag0 = block_ * kFragsPerBlock + band * kFragsPerBand;
    for (int f = 0; f < kFragsPerBand; ++f, out += kFragSize) {
      const FragBits bits = LoadBits(p_, frag0 + f);
      const int in_window = __builtin_popcountll(bits.any), fallback = kFragSize - in_window;
      if (__builtin_expect(sm + kFastSignMantissa <= p_.sign_mantissa_len && full + kFastFull <= p_.full_len &&
                               fallback <= kFastFull, 1)) {
        decode_(bits, p_.sign_mantissa + sm, p_.full + full, out);
      } else if (sm + in_window <= p_.sign_mantissa_len && full + fallback <= p_.full_len) {
        DecodeFragExact(bits, start_, p_.sign_mantissa + sm, p_.full + full, arrange_, out);
      } else {
        const bool c = sm + in_window <= p_.sign_mantissa_len;
        SetFault(fault, c ? "full" : "sign_mantissa", frag0 + f, c ? full + fallback : sm + in_window,
                 c ? p_.full_len : p_.sign_mantissa_len);
        return false;
      }
      sm += in_window;
      full += fallback;
    }
    pos_[0] = sm;
    pos_[1] = full;
    if (band == kBandsPerBlock - 1) {
      const int64_t end[2] = {begin_[0] + RoundUp(sm - begin_[0], kSignMantissaAlign),
                              begin_[1] + RoundUp(full - begin_[1], kFullAlign)};
      for (int c = 0; c < 2; ++c) {
        if (end[c] != next_[c]) {
          SetFault(fault, c ? "tile_offsets[full]" : "tile_offsets[sign_mantissa]", block_ + 1, end[c], next_[c]);
          return false;
        }
      }
    }
    return true;
  }

 private:
  const Payload& p_;
  uint8_t start_;
  Arrange arrange_;
  FragDecoder decode_;
  int64_t block_ = 0, begin_[2], next_[2], pos_[2];
};

}  // namespace
}  // namespace jaxzip
