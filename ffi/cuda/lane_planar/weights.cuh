// Where a kernel's weights come from: lane-planar blocks with their escapes, or raw bf16 in the same fragment order.
//
// A source says how many registers a lane holds of one 16x64 tile, loads them, and turns them into A operands. `Raw` is
// the control: the same kernel, tiling and summation order over uncompressed weights must give the same bits.
#pragma once
#include "layout.h"
#include "ptx.cuh"

namespace jaxzip::lane_planar {

// The five high exponent bits of an entry (or overflow entry), in their place in a bf16.
__device__ __forceinline__ uint32_t high_of_code(uint32_t code) { return code ? (code + kHighCodeBias) << 10 : 0; }

struct LanePlanar {
  static constexpr int kRegisters = 11;  // 8 of sign+mantissa, 3 of codes
  static constexpr bool kHasEscapes = true;
  static constexpr int kPlaneBytes = kTileElements;  // shared memory per tile that a warp decodes

  static __device__ __forceinline__ void load(uint32_t (&w)[kRegisters], const uint32_t* block, int tile, int lane) {
    const uint32_t* sign_mantissa = block + tile * kSignMantissaWords + 4 * lane;
    const uint32_t* codes = block + kCodeStart + tile * kCodeWords;
    ptx::load_stream<4>(w, sign_mantissa);
    ptx::load_stream<4>(w + 4, sign_mantissa + 128);
    ptx::load_stream<2>(w + 8, codes + 2 * lane);
    ptx::load_stream<1>(w + 10, codes + 64 + lane);
  }

  // The A operand of k-step j; `plane` is this lane's place in the tile's patch plane.
  static __device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t (&w)[kRegisters], uint32_t plane, int j) {
    uint32_t high[2];
    ptx::load_shared(high, plane + j * (kTileElements / 4));
    decode(a, w, high, j);
  }
  // The same with the plane's bytes given: each is the upper byte of a weight without sign and code. A word has those of two
  // registers, where sign and mantissa lie in the packed word: the odd register's byte-swapped.
  static __device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t (&w)[kRegisters], const uint32_t (&high)[2], int j) {
    constexpr uint32_t kHighPair = kHighMask | kHighMask << 16, kCodePair = 0x03800380u;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t packed = w[2 * j + (r >> 1)];
      const uint32_t others = r & 1 ? __byte_perm(ptx::select_bits<(kHighPair >> 8)>(high[r >> 1], packed), 0, 0x2301)
                                    : ptx::select_bits<kHighPair>(high[r >> 1], packed);
      a[r] = ptx::select_bits<kCodePair>(code_in_place(w, 4 * j + r), others);
    }
  }
  // The lower three exponent bits of register p in their place, among bits of others.
  static __device__ __forceinline__ uint32_t code_in_place(const uint32_t (&w)[kRegisters], int p) {
    if (p == 15) return ((w[8] << 7) & 0x00800080u) | ((w[9] << 8) & 0x01000100u) | ((w[10] << 9) & 0x02000200u);
    const uint32_t c = w[8 + p / 5];
    const int field = p % 5;
    return field == 0 ? c : field == 1 ? c << 3 : field == 2 ? c << 6 : field == 3 ? c >> 3 : c >> 6;
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
  static __device__ __forceinline__ void decode(uint32_t (&a)[4], const uint32_t (&w)[kRegisters], uint32_t, int j) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = w[4 * j + r];
  }
};

// A patch plane has a byte for each weight of a tile, its upper byte without sign and code: position, with the last two bits (register
// parity, half) turned into the place in the decoder's word.
__device__ __forceinline__ uint32_t plane_offset(uint32_t position) {
  return (position & ~3u) | __byte_perm(0x02000301u, 0, (position & 3u) | 0x4440u);
}

// Calls use(position, high exponent bits in place) for the block's overflow entries, a lane each; by a whole warp.
template <class Use>
__device__ __forceinline__ void for_each_overflow(const OverflowEntry* entries, uint32_t length, uint32_t first, uint32_t block,
                                                  const Use& use) {
#pragma unroll 1
  for (uint32_t i = first + (threadIdx.x & 31);; i += 32) {
    OverflowEntry e = {0, 0};
    if (i < length) e = entries[i];
    const bool mine = e.block == block + 1;
    if (mine) use(e.entry & ((1u << kPositionBits) - 1), (e.entry >> kPositionBits << 10) & kHighMask);
    if (!__all_sync(~0u, mine)) break;
  }
}

// What found no room in a block, or has no code: rare, so out of line. Positions count from `first_position`.
static __device__ __noinline__ void scatter_overflow(const OverflowEntry* entries, uint32_t length, uint32_t first,
                                                     uint32_t block, uint32_t plane, uint32_t first_position,
                                                     uint32_t positions) {
  for_each_overflow(entries, length, first, block, [&](uint32_t position, uint32_t high) {
    if (position - first_position < positions) ptx::store_shared_u8(plane + plane_offset(position - first_position), high >> 8);
  });
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

  // `words` are this lane's 8 bytes of header and entries, `count` the block's entries, `tile` the warp's first tile.
  template <bool kRestore>
  __device__ __forceinline__ void scatter(uint2 words, uint32_t count, int tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t entry = ((i < 2 ? words.x : words.y) >> (16 * (i & 1))) & 0xFFFFu;
      bool active = static_cast<uint32_t>(4 * (lane - 1) + i) < count;
      uint32_t position = entry & 0xFFFu;
      if (kTilesPerWarp < kTiles) {
        position -= tile * kTileElements;
        active = active && position < kPositions;
      }
      if (active) ptx::store_shared_u8(base + plane_offset(position), kRestore ? kConstantHigh >> 8 : high_of_code(entry >> 12) >> 8);
    }
  }
};

}  // namespace jaxzip::lane_planar
