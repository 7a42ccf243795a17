// Where a kernel's weights come from: lane-planar blocks with their escapes, or raw bf16 in the same fragment order.
//
// A source says how many registers a lane holds of one 16x64 tile, loads them, and turns them into A operands. `Raw` is
// the control: the same kernel, tiling and summation order over uncompressed weights must give the same bits.
#pragma once
#include "layout.h"
#include "ptx.cuh"

namespace jaxzip::lane_planar {

// An entry's byte of a patch plane: its high exponent bits in their place, other bits where the plane's are not read.
__device__ __forceinline__ uint32_t plane_byte(uint32_t entry) { return entry >> (kEntryPositionBits - 2); }

struct LanePlanar {
  static constexpr int kRegisters = 11;  // 8 of lower bytes, 3 of codes
  static constexpr bool kHasEscapes = true;
  static constexpr int kPlaneBytes = kTileElements;  // shared memory per tile that a warp decodes

  static __device__ __forceinline__ void load(uint32_t (&w)[kRegisters], const uint32_t* block, int tile, int lane) {
    const uint32_t* lower = block + tile * kLowerWords + 4 * lane;
    const uint32_t* codes = block + kCodeStart + tile * kCodeWords;
    ptx::load_stream<4>(w, lower);
    ptx::load_stream<4>(w + 4, lower + 128);
    ptx::load_stream<2>(w + 8, codes + 2 * lane);
    ptx::load_stream<1>(w + 10, codes + 64 + lane);
  }

  // The A operand of k-step j; `high` are the patch plane's words of its vector (k-steps 0 and 1, or 2 and 3).
  static __device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t (&w)[kRegisters], const uint32_t (&high)[4], int j) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int word = 2 * j + q;
      const uint32_t upper = ptx::select_bits<kUpperBytes>(code_in_place(w, word), high[word & 3]);
      a[2 * q] = __byte_perm(w[word], upper, 0x6240);
      a[2 * q + 1] = __byte_perm(w[word], upper, 0x7351);
    }
  }
  // The code of a word of lower bytes, among bits of others.
  static __device__ __forceinline__ uint32_t code_in_place(const uint32_t (&w)[kRegisters], int word) {
    if (word < 3) return w[8 + word];
    if (word < 6) return __funnelshift_r(w[5 + word], w[5 + word], 3);
    return ptx::select_bits<0x80808080u>(w[10] << (word - 5), w[2 + word] >> 5);
  }
};

struct Raw {
  static constexpr int kRegisters = 16;
  static constexpr bool kHasEscapes = false;
  static constexpr int kPlaneBytes = 0;
  static constexpr int kBlockWords = kBlock * kBlock / 2;

  static __device__ __forceinline__ void load(uint32_t (&w)[kRegisters], const uint32_t* block, int tile, int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) ptx::load_stream<4>(w + 4 * j, block + tile * 512 + j * 128 + 4 * lane);
  }
  static __device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t (&w)[kRegisters], const uint32_t (&)[4], int j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = w[4 * j + r];
  }
};

// A patch plane has a byte for each weight of a tile, at its position: its upper byte, of which only the high exponent bits are read.

// Of an overflow entry: its position, and its high exponent bits in their place.
__device__ __forceinline__ uint32_t position_of(uint32_t entry) { return entry & ((1u << kPositionBits) - 1); }
__device__ __forceinline__ uint32_t high_of(uint32_t entry) { return entry >> kPositionBits << 10 & kHighMask; }

// Calls use(position, high exponent bits in place) for the block's overflow entries, a lane each; by a whole warp.
template <class Use>
__device__ __forceinline__ void for_each_overflow(const OverflowEntry* entries, uint32_t length, uint32_t first, uint32_t block,
                                                  const Use& use) {
#pragma unroll 1
  for (uint32_t i = first + (threadIdx.x & 31);; i += 32) {
    OverflowEntry e = {0, 0};
    if (i < length) e = entries[i];
    const bool mine = e.block == block + 1;
    if (mine) use(position_of(e.entry), high_of(e.entry));
    if (!__all_sync(~0u, mine)) break;
  }
}

// Puts an overflow entry into a patch plane whose positions are `positions` from `first_position` on, if it is one of these.
__device__ __forceinline__ void put_overflow(uint32_t plane, uint32_t position, uint32_t high, uint32_t first_position, uint32_t positions) {
  if (position - first_position < positions) ptx::store_shared_u8(plane + position - first_position, high >> 8);
}

// What found no room in a block, or has no code: rare, so out of line.
static __device__ __noinline__ void scatter_overflow(const OverflowEntry* entries, uint32_t length, uint32_t first,
                                                     uint32_t block, uint32_t plane, uint32_t first_position,
                                                     uint32_t positions) {
  for_each_overflow(entries, length, first, block,
                    [&](uint32_t position, uint32_t high) { put_overflow(plane, position, high, first_position, positions); });
}

// A warp's patch plane: a byte per weight of its tiles, the constant high exponent bits except where a block's entries
// put others. Escapes cost no branch: entries are scattered before the tiles are decoded and taken back after.
template <int kTilesPerWarp>
struct PatchPlane {
  static constexpr uint32_t kPositions = kTilesPerWarp * kTileElements;
  uint32_t base;  // shared address
  int lane;

  __device__ __forceinline__ void fill() const {
#pragma unroll
    for (int i = 0; i < 2 * kTilesPerWarp; ++i)
      ptx::store_shared(base + i * 512 + lane * 16, kPlaneWord, kPlaneWord, kPlaneWord, kPlaneWord);
  }

  // `words` are this lane's 8 bytes of header and entries, `ends` the header's, `tile` the warp's first tile.
  template <bool kRestore>
  __device__ __forceinline__ void scatter(uint2 words, uint32_t ends, int tile) const {
    const uint32_t first = tile ? __byte_perm(ends, 0, 0x4440 | (tile - 1)) : 0, last = __byte_perm(ends, 0, 0x4440 | (tile + kTilesPerWarp - 1));
    const uint32_t middle = ends >> 8 & 255, index = 4 * (lane - 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t entry = ((i < 2 ? words.x : words.y) >> (16 * (i & 1))) & 0xFFFFu;
      uint32_t position = entry & (kTilesPerWarp == 1 ? kTileElements - 1 : 2 * kTileElements - 1);
      if (kTilesPerWarp == 4 && index + i >= middle) position += 2 * kTileElements;
      // Lane 0's index, less than 0, is past all ends.
      if (index + i - first < last - first) ptx::store_shared_u8(base + position, kRestore ? kConstantHigh >> 8 : plane_byte(entry));
    }
  }
};

}  // namespace jaxzip::lane_planar
