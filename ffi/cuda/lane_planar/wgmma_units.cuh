// What a warp of the wgmma matmul does with a 16x64 tile whose block lies in shared memory: escapes to its patch plane, words to
// registers.
#pragma once
#include "weights.cuh"
#include "wgmma.cuh"

namespace jaxzip::lane_planar {

// Where a lane finds its words of a tile, from the block's start.
template <class Weights>
struct TileWords;

template <>
struct TileWords<LanePlanar> {
  uint32_t sign_mantissa, codes, last_codes;
  __device__ __forceinline__ TileWords(int tile, int lane)
      : sign_mantissa(ptx::keep((tile * kSignMantissaWords + 4 * lane) * 4)),
        codes(ptx::keep((kCodeStart + tile * kCodeWords + 2 * lane) * 4)),
        last_codes(ptx::keep((kCodeStart + tile * kCodeWords + 64 + lane) * 4)) {}
  __device__ __forceinline__ void read(uint32_t (&w)[LanePlanar::kRegisters], uint32_t block) const {
    ptx::load_shared_words<4>(w, block + sign_mantissa);
    ptx::load_shared_words<4>(w + 4, block + sign_mantissa + 512);
    ptx::load_shared_words<2>(w + 8, block + codes);
    ptx::load_shared_words<1>(w + 10, block + last_codes);
  }
};

template <>
struct TileWords<Raw> {
  uint32_t start;
  __device__ __forceinline__ TileWords(int tile, int lane) : start((tile * 512 + lane * 4) * 4) {}
  __device__ __forceinline__ void read(uint32_t (&w)[Raw::kRegisters], uint32_t block) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) ptx::load_shared_words<4>(w + 4 * j, block + start + j * 512);
  }
};

// A warp's patch plane and the escapes that it holds at the moment. A lane takes one entry of the tile; more, and overflow
// entries, are rare.
struct Patches {
  PatchPlane<1> plane;
  uint32_t biased;             // the plane's address less the tile's positions
  uint32_t first_of, last_of;  // byte selectors: entries of the block before the tile's first, and up to its last
  uint32_t patched = 0;
  uint32_t unused;  // an address that nobody reads, for lanes without an entry
  bool rare = false;

  __device__ __forceinline__ Patches(uint32_t base, uint32_t unused, int tile, int lane)
      : plane{base, lane}, biased(ptx::keep(base - tile * (2 * kTileElements))),
        first_of(ptx::keep(0x4440 | (tile ? tile - 1 : 4))), last_of(ptx::keep(0x4440 | tile)), unused(unused) {}

  __device__ __forceinline__ void scatter(uint32_t entries, uint32_t index, uint32_t last) {
    const uint32_t entry = ptx::load_shared_u16(entries + 2 * index);  // past the block's end where it is not active
    const uint32_t code = entry & 0xF000u;
    patched = index < last ? biased + 2 * (entry & 0xFFFu) : unused;
    ptx::store_shared_u16(patched, code ? (code + (kHighCodeBias << 12)) >> 2 : 0);
  }

  // `words` is the block's shared address, `block()` the index that overflow entries give.
  template <class BlockIndex>
  __device__ __forceinline__ void put(uint32_t words, const Matrix& w, const BlockIndex& block, int tile) {
    uint32_t header[2];  // ends, overflow
    ptx::load_shared_words<2>(header, words + kHeaderStart * 4);
    const uint32_t first = __byte_perm(header[0], 0, first_of), last = __byte_perm(header[0], 0, last_of);
    scatter(words + kEntryStart * 4, first + plane.lane, last);
    rare = header[1] || last - first > 32;
    if (rare) {
#pragma unroll 1
      for (uint32_t at = first + 32; at < last; at += 32) scatter(words + kEntryStart * 4, at + plane.lane, last);
      if (header[1])
        scatter_overflow(w.overflow, w.overflow_length, header[1] - 1, block(), plane.base, tile * kTileElements, kTileElements);
    }
    __syncwarp();
  }
  // After every lane has read the plane.
  __device__ __forceinline__ void take_back() {
    ptx::store_shared_u16(patched, kConstantHigh);
    if (rare) fill();
  }
  // A loop, so that it is a branch and not instructions without effect.
  __device__ __forceinline__ void fill() const {
#pragma unroll 1
    for (int i = 0; i < 4; ++i)
      ptx::store_shared(plane.base + i * 512 + plane.lane * 16, kConstantPair, kConstantPair, kConstantPair, kConstantPair);
  }
};

}  // namespace jaxzip::lane_planar
