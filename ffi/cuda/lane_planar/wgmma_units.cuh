// What a warp of the wgmma matmul holds of one unit, a 16x64 tile: it loads units ahead of their use, and turns them into A operands.
//
// All offsets from a block's start are computed once; an address is then one 64-bit addition.
#pragma once
#include "weights.cuh"

namespace jaxzip::lane_planar {

template <class Weights>
struct Unit;

template <>
struct Unit<LanePlanar> {
  uint32_t words[LanePlanar::kRegisters];
  uint2 header;   // ends and overflow
  uint2 entries;  // four of the block's

  struct Offsets {
    uint32_t sign_mantissa, codes, last_codes, entries;
    __device__ __forceinline__ Offsets(int block_words, int tile, int lane)
        : sign_mantissa((tile * kSignMantissaWords + 4 * lane) * 4), codes((kCodeStart + tile * kCodeWords + 2 * lane) * 4),
          last_codes((kCodeStart + tile * kCodeWords + 64 + lane) * 4),
          entries((kEntryStart + min(2 * lane, block_words - kEntryStart - 2)) * 4) {}
  };

  __device__ __forceinline__ void clear() {}
  __device__ __forceinline__ void load(const char* block, const Offsets& o) {
    const auto at = [&](uint32_t offset) { return reinterpret_cast<const uint32_t*>(block + offset); };
    ptx::load_stream<4>(words, at(o.sign_mantissa));
    ptx::load_stream<4>(words + 4, at(o.sign_mantissa) + 128);
    ptx::load_stream<2>(words + 8, at(o.codes));
    ptx::load_stream<1>(words + 10, at(o.last_codes));
    // The other warps of the group want these too and find them in L1.
    header = __ldg(reinterpret_cast<const uint2*>(block + kHeaderStart * 4));
    entries = __ldg(reinterpret_cast<const uint2*>(block + o.entries));
  }
};

template <>
struct Unit<Raw> {
  uint32_t words[Raw::kRegisters];

  struct Offsets {
    uint32_t start;
    __device__ __forceinline__ Offsets(int, int tile, int lane) : start((tile * 512 + lane * 4) * 4) {}
  };
  __device__ __forceinline__ void load(const char* block, const Offsets& o) {
#pragma unroll
    for (int j = 0; j < 4; ++j) ptx::load_stream<4>(words + 4 * j, reinterpret_cast<const uint32_t*>(block + o.start) + j * 128);
  }
};

// A warp's patch plane and the escapes that it holds at the moment. A lane takes one entry of the tile; more, and overflow
// entries, are rare.
struct Patches {
  PatchPlane<1> plane;
  uint32_t biased;       // the plane's address less the tile's positions
  uint32_t first_of, last_of;  // byte selectors: entries of the block before the tile's first, and up to its last
  uint32_t patched = 0;
  bool active = false, rare = false;

  __device__ __forceinline__ Patches(uint32_t base, int tile, int lane)
      : plane{base, lane}, biased(base - tile * (2 * kTileElements)), first_of(0x4440 | (tile ? tile - 1 : 4)), last_of(0x4440 | tile) {}

  __device__ __forceinline__ void scatter(const Unit<LanePlanar>& u, uint32_t index, uint32_t last) {
    const uint32_t x = __shfl_sync(~0u, u.entries.x, index >> 2), y = __shfl_sync(~0u, u.entries.y, index >> 2);
    const uint32_t entry = static_cast<uint32_t>((static_cast<uint64_t>(y) << 32 | x) >> ((index << 4) & 48));
    const uint32_t code = entry & 0xF000u;
    patched = biased + 2 * (entry & 0xFFFu);
    active = index < last;
    if (active) ptx::store_shared_u16(patched, code ? (code + (kHighCodeBias << 12)) >> 2 : 0);
  }

  // `block` is the index that overflow entries give.
  __device__ __forceinline__ void put(const Unit<LanePlanar>& u, const Matrix& w, uint32_t block, int tile) {
    const uint32_t first = __byte_perm(u.header.x, 0, first_of), last = __byte_perm(u.header.x, 0, last_of);
    scatter(u, first + plane.lane, last);
    rare = u.header.y || last - first > 32;
    if (rare) {
#pragma unroll 1
      for (uint32_t at = first + 32; at < last; at += 32) scatter(u, at + plane.lane, last);
      if (u.header.y)
        scatter_overflow(w.overflow, w.overflow_length, u.header.y - 1, block, plane.base, tile * kTileElements, kTileElements);
    }
    __syncwarp();
  }
  // After every lane has read the plane.
  __device__ __forceinline__ void take_back() {
    __syncwarp();
    if (active) ptx::store_shared_u16(patched, kConstantHigh);
    if (rare) plane.fill();
    __syncwarp();
  }
};

}  // namespace jaxzip::lane_planar
