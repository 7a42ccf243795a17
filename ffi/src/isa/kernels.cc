// The kernel table of one instruction-set level; compiled once per level with JAXZIP_ISA set to its name.
#include "isa/decompress.h"
#include "isa/encode.h"
#include "isa/lane_planar_decode.h"
#include "isa/lane_planar_encode.h"
#include "isa/matmul.h"

namespace jaxzip {
namespace {

void CountBands(const Payload& p, int64_t block, int32_t in_window[4]) {
  for (int band = 0; band < layout::kBandsPerBlock; ++band) {
    int32_t n = 0;
    for (int f = 0; f < layout::kFragsPerBand; ++f) {
      n += __builtin_popcountll(
          LoadBits(p, block * layout::kFragsPerBlock + band * layout::kFragsPerBand + f).any);
    }
    in_window[band] = n;
  }
}

}  // namespace

#define JAXZIP_STR2(x) #x
#define JAXZIP_STR(x) JAXZIP_STR2(x)
#define JAXZIP_CAT2(a, b) a##b
#define JAXZIP_CAT(a, b) JAXZIP_CAT2(a, b)

extern const KernelTable JAXZIP_CAT(kKernels_, JAXZIP_ISA);
const KernelTable JAXZIP_CAT(kKernels_, JAXZIP_ISA) = {
    JAXZIP_STR(JAXZIP_ISA), kMaxRows,      DecompressRows, PackX,
    MatmulRows,             EncodeBitmaps, EncodeValues,   CountBands,
    {DecompressLanePlanarRows, DecodeLanePlanarRow, HasSubnormals, TransposeTile<false>, LoadShiftedTile,
     CountEscapes, EncodeBlock},
};

}  // namespace jaxzip
