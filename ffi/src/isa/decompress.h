// Decodes one row of BlockTiles into a dense matrix.
#pragma once
#include "isa/decode_band.h"
#include "isa/tile_io.h"

namespace jaxzip {
namespace {

void DecompressRows(const Payload& p, int64_t block_row, uint16_t* out, int64_t stride, bool transposed,
                    Fault* fault) {
  using namespace layout;
  alignas(64) uint16_t frags[kBlockSize], edge[kBlockSize];
  const int64_t blocks = CeilDiv(p.k, kBlock);
  BandStream stream(p, block_row * blocks, transposed ? Arrange::kTransposed : Arrange::kRowMajor);
  const int64_t rows = p.m - block_row * kBlock < kBlock ? p.m - block_row * kBlock : kBlock;
  for (int64_t bc = 0; bc < blocks; ++bc) {
    for (int band = 0; band < kBandsPerBlock; ++band) {
      if (!stream.Next(fault)) return;
      for (int f = 0; f < kFragsPerBand; ++f) stream.Decode(f, frags + (band * kFragsPerBand + f) * kFragSize);
    }
    const int64_t cols = p.k - bc * kBlock < kBlock ? p.k - bc * kBlock : kBlock;
    const int64_t outer = transposed ? cols : rows, inner = transposed ? rows : cols;
    uint16_t* dst = transposed ? out + bc * kBlock * stride : out + bc * kBlock;
    if (outer == kBlock && inner == kBlock) {
      StoreTile<true>(frags, dst, stride, transposed);
    } else {
      StoreTile<false>(frags, edge, kBlock, transposed);
      for (int64_t o = 0; o < outer; ++o) {
        std::memcpy(dst + o * stride, edge + o * kBlock, static_cast<size_t>(inner) * 2);
      }
    }
  }
  StreamFence();
}

}  // namespace
}  // namespace jaxzip
