// Walks BlockTiles band by band, decoding them into scratch and checking their offsets on the way.
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

// Decodes the bands of consecutive BlockTiles in storage order. Next() counts where each FragTile's values begin and
// checks all there is to check; Decode() may then be called for the band's FragTiles in any order, so that a
// caller can weave it into other work.
//
// Memory safety rests on the comparison of those positions with the ends of the arrays. That the offsets agree
// with the bitmaps, which a kernel jumping to a band relies on, falls out of having counted up to them.
class BandStream {
 public:
  BandStream(const Payload& p, int64_t first_block, Arrange arrange)
      : p_(p), arrange_(arrange), decode_(*p.start_exp, arrange), band_(first_block * layout::kBandsPerBlock - 1) {}

  // Goes to the next band. False on a fault, after which the stream must not be used.
  bool Next(Fault* fault) {
    using namespace layout;
    ++band_;
    const int64_t block = band_ / kBandsPerBlock;
    if (band_ % kBandsPerBlock == 0) {
      for (int c = 0; c < 2; ++c) end_[c] = begin_[c] = p_.tile_offsets[2 * block + c];
    }
    for (int c = 0; c < 2; ++c) {
      const int64_t found = p_.band_offsets[band_ * 2 + c], expected = end_[c] - begin_[c];
      if (found != expected) {
        SetFault(fault, c ? "band_offsets[full]" : "band_offsets[sign_mantissa]", band_, expected, found);
        return false;
      }
    }

    const int64_t frag0 = band_ * kFragsPerBand;
    int64_t sm = end_[0];
    int most = 0;
    for (int f = 0; f < kFragsPerBand; ++f) {
      const uint64_t any = LoadBits(p_, frag0 + f).any;
      const int in_window = __builtin_popcountll(any);
      most = kFragSize - in_window > most ? kFragSize - in_window : most;
      any_[f] = any;
      sign_mantissa_[f] = sm;
      full_[f] = end_[1] + kFragSize * f - (sm - end_[0]);
      sm += in_window;
    }
    end_[1] += kBandRows * kBlock - (sm - end_[0]);
    end_[0] = sm;
    const int64_t length[2] = {p_.sign_mantissa_len, p_.full_len};
    for (int c = 0; c < 2; ++c) {
      if (end_[c] > length[c]) {
        SetFault(fault, c ? "full length" : "sign_mantissa length", 0, end_[c], length[c]);
        return false;
      }
    }
    fast_ = most <= kFastFull && end_[0] + kFastSignMantissa <= length[0] && end_[1] + kFastFull <= length[1];
    if (band_ % kBandsPerBlock == kBandsPerBlock - 1) {
      const int64_t next[2] = {begin_[0] + RoundUp(end_[0] - begin_[0], kSignMantissaAlign),
                               begin_[1] + RoundUp(end_[1] - begin_[1], kFullAlign)};
      for (int c = 0; c < 2; ++c) {
        if (p_.tile_offsets[2 * block + 2 + c] != next[c]) {
          SetFault(fault, c ? "tile_offsets[full]" : "tile_offsets[sign_mantissa]", block + 1, next[c],
                   p_.tile_offsets[2 * block + 2 + c]);
          return false;
        }
      }
    }
    // Five short streams that stop at page ends are too much for the hardware's prefetchers.
    for (int i = 0; i < 3; ++i) {
      __builtin_prefetch(p_.bitmap[i] + 2 * (frag0 + kAheadFrags));
      __builtin_prefetch(p_.bitmap[i] + 2 * (frag0 + kAheadFrags) + 16);
    }
    for (int i = 0; i < 2; ++i) __builtin_prefetch(p_.full + end_[1] + kAheadFull + 32 * i);
    return true;
  }

  // Decodes FragTile f of the current band.
  JAXZIP_INLINE void Decode(int f, uint16_t* out) const {
    const uint8_t* sm = p_.sign_mantissa + sign_mantissa_[f];
    const uint16_t* full = p_.full + full_[f];
    const int64_t frag = band_ * layout::kFragsPerBand + f;
    __builtin_prefetch(sm + kAheadBytes);
    if (__builtin_expect(fast_, 1)) {
      decode_(p_, frag, any_[f], sm, full, out);
    } else {
      DecodeFragExact(p_, frag, sm, full, arrange_, out);
    }
  }

 private:
  static constexpr int64_t kAheadBytes = 8192, kAheadFrags = 256, kAheadFull = 512;

  const Payload p_;
  Arrange arrange_;
  FragDecoder decode_;
  int64_t band_, begin_[2] = {0, 0}, end_[2] = {0, 0};
  bool fast_ = false;  // no FragTile near the end of the arrays or with too many fallbacks for the fast decoder
  uint64_t any_[layout::kFragsPerBand];
  int64_t sign_mantissa_[layout::kFragsPerBand], full_[layout::kFragsPerBand];
};

}  // namespace
}  // namespace jaxzip
