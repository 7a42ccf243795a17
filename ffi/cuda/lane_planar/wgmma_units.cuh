// What is done with an encoded block in shared memory: a warp of its own puts the block's escapes into a patch plane, and each warp
// that multiplies reads the words of its tile.
#pragma once
#include "weights.cuh"
#include "wgmma.cuh"

namespace jaxzip::lane_planar {

// Where a lane finds its words of a tile, from the block's start.
template <class Weights>
struct TileWords;

template <>
struct TileWords<LanePlanar> {
  uint32_t lower, codes, last_codes;
  __device__ __forceinline__ TileWords(int tile, int lane)
      : lower(ptx::keep((tile * kLowerWords + 4 * lane) * 4)),
        codes(ptx::keep((kCodeStart + tile * kCodeWords + 2 * lane) * 4)),
        last_codes(ptx::keep((kCodeStart + tile * kCodeWords + 64 + lane) * 4)) {}
  __device__ __forceinline__ void read(uint32_t (&w)[LanePlanar::kRegisters], uint32_t block) const {
    ptx::load_shared_words<4>(w, block + lower);
    ptx::load_shared_words<4>(w + 4, block + lower + 512);
    ptx::load_shared_words<2>(w + 8, block + codes);
    ptx::load_shared_words<1>(w + 10, block + last_codes);
  }
};

template <>
struct TileWords<Raw> {
  uint32_t start;
  __device__ __forceinline__ TileWords(int tile, int lane) : start(ptx::keep((tile * 512 + lane * 4) * 4)) {}
  __device__ __forceinline__ void read(uint32_t (&w)[Raw::kRegisters], uint32_t block) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) ptx::load_shared_words<4>(w + 4 * j, block + start + j * 512);
  }
};

// What a patch plane holds.
struct Patch {
  uint32_t at;  // where this lane put a byte
  bool rare;    // there were more than a byte a lane
};

// Puts the escapes of a warp's tile into its patch plane and takes them back. A lane takes one entry; more, and overflow entries, are
// rare.
struct Patches {
  uint32_t plane;              // shared address, of a whole number of planes
  uint32_t first_of, last_of;  // byte selectors: entries of the block before the tile's first, and up to its last
  uint32_t unused;             // an address that nobody reads, for lanes without an entry
  uint32_t entry_at;           // this lane's first entry, if it is the block's
  int tile, lane;

  __device__ __forceinline__ Patches(uint32_t plane, uint32_t unused, int tile, int lane)
      : plane(plane), first_of(0x4440 | (tile ? tile - 1 : 4)), last_of(0x4440 | tile), unused(unused),
        entry_at(ptx::keep(kEntryStart * 4 + 2 * lane)), tile(tile), lane(lane) {}

  __device__ __forceinline__ uint32_t scatter(uint32_t at, bool active) const {
    const uint32_t entry = ptx::load_shared_u16(at);  // past the block's end where there is none
    const uint32_t to = active ? plane | (entry & (kTileElements - 1)) : unused;
    ptx::store_shared_u8(to, plane_byte(entry));
    return to;
  }
  // `words` is the block's shared address; `overflow(first)` puts its overflow entries, of which that is the first. The plane holds constants
  // before.
  template <class Overflow>
  __device__ __forceinline__ Patch put(uint32_t words, const Overflow& overflow) const {
    uint32_t header[2];  // ends, overflow
    ptx::load_shared_words<2>(header, words + kHeaderStart * 4);
    const uint32_t first = __byte_perm(header[0], 0, first_of), count = __byte_perm(header[0], 0, last_of) - first;
    const uint32_t entries = words + entry_at + 2 * first;
    const Patch patch = {scatter(entries, lane < count), header[1] || count > 32};
    if (patch.rare) {
#pragma unroll 1
      for (uint32_t i = 32; i < count; i += 32) scatter(entries + 2 * i, i + lane < count);
      if (header[1]) overflow(header[1] - 1);
    }
    return patch;
  }
  // After every lane has read the plane.
  __device__ __forceinline__ void take_back(const Patch& patch) const {
    ptx::store_shared_u8(patch.at, kConstantHigh >> 8);
    if (patch.rare) fill();
  }
  // A loop, so that it is a branch and not instructions without effect.
  __device__ __forceinline__ void fill() const {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) ptx::store_shared(plane + i * 512 + lane * 16, kPlaneWord, kPlaneWord, kPlaneWord, kPlaneWord);
  }
};

}  // namespace jaxzip::lane_planar
