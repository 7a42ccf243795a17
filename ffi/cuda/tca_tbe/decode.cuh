// Decoding of TCA-TBE by one warp, a BlockTile at a time, into the A registers of mma.m16n8k16.
//
// A block's runs of sign_mantissa and full are contiguous and start on 16 bytes: they are copied to shared memory one or more
// blocks ahead (Ring). Its bitmaps go to registers: lane `h` of a band holds half-FragTile h, 32 positions.
//
// A band is then decoded in two steps. First each lane turns its half-FragTile into 16 words, one a pair of positions, with
// both exponents in place (the plane), and adds what the fallbacks need; then each lane reads its four words of a
// TensorCoreTile at once, fetches two sign+mantissa bytes for each, and joins them:
//   rank  = elements inside the window before the pair's second position
//   bytes = sign_mantissa[rank - 1], sign_mantissa[rank]     (right where the element is inside the window)
//   pair  = spread(bytes) ^ plane                            spread: sign to bit 15, mantissa to bits 6..0
// A fallback's code is 0, and its plane half is full ^ spread(the byte read in vain), so that no lane needs a branch.
#pragma once
#include "jaxzip/kernels.h"
#include "jaxzip/layout.h"
#include "ptx.cuh"

namespace jaxzip::tca_tbe {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr uint32_t kSpreadMask = 0x807F807Fu;
constexpr int kBands = layout::kBandsPerBlock;
constexpr int kTiles = 4;                     // TensorCoreTiles a band
constexpr int kFullStaged = 368;              // fallbacks of a block in shared memory, 9%; those past it are read from memory
constexpr int kStages = 2;
constexpr int kEarly = 2;  // fallbacks of a half-FragTile whose loads go out first
constexpr int kGuard = 16;                    // bytes before sign_mantissa: "rank - 1" of rank 0
constexpr int kStageBytes = kGuard + layout::kBlockSize + 2 * kFullStaged;
// The plane: word (tile t, half h, pair j, FragTile f) at 136 t + 68 h + 4 j + f, free of bank conflicts both ways.
constexpr int kPlaneTile = 136 * 4, kPlaneHalf = 68 * 4;
constexpr int kPlaneBytes = kTiles * kPlaneTile;
constexpr int kRankBytes = 2 * 32 * 4;        // of the band: `any` words, then addresses, both [tile][half][FragTile]
constexpr int kScratchBytes = kPlaneBytes + kRankBytes + 16;  // and a barrier for each of two stages

// A payload that was checked when it was built; offsets are clamped all the same, so that nothing is read out of bounds.
struct Source {
  const uint32_t* bitmap[3];
  const uint8_t* sign_mantissa;
  const uint16_t* full;
  const uint2* tile_offsets;
  const uint8_t* start_exp;
  int64_t sign_mantissa_len, full_len;
};

inline Source MakeSource(const Payload& p) {
  return {{p.bitmap[0], p.bitmap[1], p.bitmap[2]}, p.sign_mantissa, p.full, reinterpret_cast<const uint2*>(p.tile_offsets),
          p.start_exp, p.sign_mantissa_len, p.full_len};
}

// Where each of 32 consecutive blocks starts, one a lane.
struct Offsets {
  uint2 mine;
  int first;
  __device__ __forceinline__ void load(const Source& s, int block, int last, int lane) {
    first = block;
    mine = s.tile_offsets[min(block + lane, last)];  // the array has an entry past the last block
  }
  __device__ __forceinline__ uint2 at(int block) const {
    return {__shfl_sync(kAllLanes, mine.x, block - first), __shfl_sync(kAllLanes, mine.y, block - first)};
  }
  __device__ __forceinline__ bool holds(int block) const { return block + 1 - first < 32; }
};

__device__ __forceinline__ int run_length(int64_t said, int64_t there_are, int64_t room) {
  return static_cast<int>(max(int64_t{0}, min(min(said, there_are), room)));
}

// Stages and their barriers: stage `i` is filled for the `use`-th time.
struct Ring {
  uint32_t stages, barriers;
  __device__ __forceinline__ Ring(uint32_t stages, uint32_t scratch, int lane)
      : stages(stages), barriers(scratch + kPlaneBytes + kRankBytes) {
#ifdef JAXZIP_BULK_COPIES
    if (lane == 0)
      for (int i = 0; i < kStages; ++i) barrier_init(barriers + 8 * i, 1);
    __syncwarp();
#endif
  }
  __device__ __forceinline__ uint32_t stage(int block) const { return stages + block % kStages * kStageBytes; }

  // Starts the copies of this warp's `block`-th block, whose runs begin at `from` and end at `to`.
  __device__ __forceinline__ void copy(const Source& s, int block, uint2 from, uint2 to, int lane) const {
    const int64_t low = from.x & ~15u, full = from.y & ~7u;
    const int low_bytes = run_length(to.x - low, s.sign_mantissa_len - low, layout::kBlockSize) & ~15;
    const int full_bytes = 2 * run_length(to.y - full, s.full_len - full, kFullStaged) & ~15;
    const uint32_t low_to = stage(block) + kGuard, full_to = low_to + layout::kBlockSize;
#ifdef JAXZIP_BULK_COPIES
    if (lane == 0) {
      const uint32_t barrier = barriers + block % kStages * 8;
      barrier_expect(barrier, low_bytes + full_bytes);
      if (low_bytes) bulk_copy(low_to, s.sign_mantissa + low, low_bytes, barrier);
      if (full_bytes) bulk_copy(full_to, s.full + full, full_bytes, barrier);
    }
#else
#pragma unroll
    for (int i = lane * 16; i < layout::kBlockSize; i += 512)
      if (i < low_bytes) copy_async_16(low_to + i, s.sign_mantissa + low + i);
#pragma unroll
    for (int i = lane * 16; i < 2 * kFullStaged; i += 512)
      if (i < full_bytes) copy_async_16(full_to + i, reinterpret_cast<const uint8_t*>(s.full + full) + i);
#endif
  }
  // Waits for it. Without bulk copies the caller's wait for its thread's copies does that.
  __device__ __forceinline__ void wait(int block) const {
#ifdef JAXZIP_BULK_COPIES
    barrier_wait(barriers + block % kStages * 8, block / kStages & 1);
#endif
  }
};

// The bitmaps of a block, and where those of the next one are.
struct Bitmaps {
  uint32_t b[kBands][3];
  const uint32_t* from[3];
  __device__ __forceinline__ void aim(const Source& s, int block, int lane) {
#pragma unroll
    for (int i = 0; i < 3; ++i) from[i] = s.bitmap[i] + int64_t{block} * (kBands * 32) + lane;
  }
  __device__ __forceinline__ void load_band(int band) {
#pragma unroll
    for (int i = 0; i < 3; ++i) b[band][i] = load_stream(from[i] + band * 32);
  }
};

// What a lane knows of a block: for each band how many elements inside the window come before its half-FragTile.
struct Ranks {
  uint32_t before[kBands];
  uint32_t inside;  // of the whole block
  __device__ __forceinline__ void count(const Bitmaps& bits, int lane) {
    uint32_t own[2], sum[2];  // two bands a word: at most 1024 each
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto any = [&](int band) { return bits.b[band][0] | bits.b[band][1] | bits.b[band][2]; };
      own[i] = sum[i] = __popc(any(2 * i)) | __popc(any(2 * i + 1)) << 16;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t below = __shfl_up_sync(kAllLanes, sum[i], step);
        if (lane >= step) sum[i] += below;
      }
    inside = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t total = __shfl_sync(kAllLanes, sum[i], 31), mine = sum[i] - own[i];
      before[2 * i] = inside + (mine & 0xFFFF);
      before[2 * i + 1] = inside + (total & 0xFFFF) + (mine >> 16);
      inside += (total & 0xFFFF) + (total >> 16);
    }
  }
};

// The highest of `missing`, which loses it. Nothing is missing: `found` is false and `p` is 32.
struct Fallback {
  uint32_t p;
  bool found;
  __device__ __forceinline__ void next(uint32_t& missing) {
    const uint32_t shift = highest_bit_shift(missing);
    found = missing != 0;
    p = 31 - shift;
    missing ^= shift_right(0x80000000u, shift);
  }
  __device__ __forceinline__ void place(uint32_t plane, uint32_t byte, uint32_t value) const {
    if (found) store_half(plane + p * 8 - (p & 1) * 6, value ^ ((byte * 257) & 0x807F));
  }
};

// First step: this lane's half-FragTile to the plane. `exponent` is start_exp << 7 in both halves. `fallbacks` are the
// block's in memory, null where all are staged.
__device__ __forceinline__ void fill_plane(const uint32_t (&b)[3], uint32_t before, int band, uint32_t exponent, uint32_t stage,
                                           uint32_t scratch, const uint16_t* fallbacks, int64_t fallbacks_left, int lane) {
  const int tile = lane >> 3, frag = lane >> 1 & 3, half = lane & 1;
  const uint32_t any = b[0] | b[1] | b[2];
  const uint32_t low = stage + kGuard + before;
  const uint32_t rank_at = scratch + kPlaneBytes + 4 * (tile * 8 + half * 4 + frag);
  store_word(rank_at, any);
  store_word(rank_at + 128, low);

  // Fallbacks, from the highest position down. In the window and before position p are p less the fallbacks before p. The first
  // ones' loads go out now, their words are placed below, on top of the plane.
  const bool staged = fallbacks == nullptr;
  const int count = __popc(~any);
  const int index = band * (layout::kBandRows * layout::kBlock) + lane * 32 - static_cast<int>(before) + count - 1;
  uint32_t missing = staged ? ~any : 0;
  uint32_t bytes = low - count;  // plus p + (p & 1): where an even position's byte is, one before the odd one's
  uint32_t value_at = stage + kGuard + layout::kBlockSize + 2 * min(index, kFullStaged - 1);
  Fallback early[kEarly];
  uint32_t early_byte[kEarly], early_value[kEarly];
#pragma unroll
  for (int i = 0; i < kEarly; ++i) {
    early[i].next(missing);
    early_byte[i] = load_byte(bytes + i + early[i].p + (early[i].p & 1));
    early_value[i] = load_half(value_at - 2 * i);
  }

  // Codes as nibbles (the fourth bit is rubbish): word r holds the positions p with p % 4 == r, at bit 4 (p / 4).
  const uint32_t even = choose<0x55555555u>(b[0], b[1] << 1), odd = choose<0x55555555u>(b[0] >> 1, b[1]);
  const uint32_t n0 = choose<0x33333333u>(even, b[2] << 2), n2 = choose<0x33333333u>(even >> 2, b[2]);
  const uint32_t n1 = choose<0x33333333u>(odd, b[2] << 1), n3 = choose<0x33333333u>(odd >> 2, b[2] >> 1);
  // Pairs of neighbours, one in each 16-bit half.
  const uint32_t pairs[4] = {__byte_perm(n0, n1, 0x5410), __byte_perm(n0, n1, 0x7632), __byte_perm(n2, n3, 0x5410),
                             __byte_perm(n2, n3, 0x7632)};
  const uint32_t plane = scratch + tile * kPlaneTile + half * kPlaneHalf + frag * 4;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int nibble = (j >> 1) & 3;
    const uint32_t word = pairs[(j & 1) * 2 + (j >> 3)] >> (nibble & 2 ? 8 : 0);
    const uint32_t e = nibble & 1 ? multiply_add<8>(word & 0x00700070u, exponent) : multiply_add<128>(word & 0x00070007u, exponent);
    store_word(plane + 16 * j, e);
  }

#pragma unroll
  for (int i = 0; i < kEarly; ++i) early[i].place(plane, early_byte[i], early_value[i]);
  Fallback one;
  for (bytes += kEarly, value_at -= 2 * kEarly; missing; ++bytes, value_at -= 2) {
    one.next(missing);
    one.place(plane, load_byte(bytes + one.p + (one.p & 1)), load_half(value_at));
  }
  if (!staged) {
    missing = ~any;
    bytes = low - count;
    for (int i = index; missing; --i, ++bytes) {
      one.next(missing);
      one.place(plane, load_byte(bytes + one.p + (one.p & 1)), i < fallbacks_left ? fallbacks[i] : 0);
    }
  }
}

// Second step: the four A registers of TensorCoreTile `tile`.
struct Reader {
  uint32_t plane, ranks, mask;
  __device__ __forceinline__ Reader(uint32_t scratch, int lane) {
    const int half = lane >> 4, pair = lane & 15;
    plane = scratch + half * kPlaneHalf + pair * 16;
    ranks = scratch + kPlaneBytes + half * 16;
    mask = (2u << (2 * pair)) - 1;
  }
  __device__ __forceinline__ void operator()(int tile, uint32_t (&a)[4]) const {
    const uint4 e = load_16(plane + tile * kPlaneTile), any = load_16(ranks + tile * 32), low = load_16(ranks + 128 + tile * 32);
    const uint32_t exponents[4] = {e.x, e.y, e.z, e.w}, inside[4] = {any.x, any.y, any.z, any.w}, base[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const uint32_t at = base[f] + __popc(inside[f] & mask);
      const uint32_t second = load_byte(at), first = load_byte(at - 1);
      a[f] = (__byte_perm(first, second, 0x4400) & kSpreadMask) ^ exponents[f];
    }
  }
};

}  // namespace jaxzip::tca_tbe
