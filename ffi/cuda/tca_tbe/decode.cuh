// Decoding of TCA-TBE by one warp, a band (16x64) at a time, into a plane of bf16 in shared memory.
//
// A block's runs of sign_mantissa and full are contiguous and start on 16 bytes: they are copied to shared memory one block
// ahead (Ring), and so are its bitmaps. These go to registers: lane `h` of a band holds half-FragTile h, four rows of 8 positions.
//
// A row's sign+mantissa bytes are the first of the 8 bytes that begin at its rank, so that one byte permutation of these puts four of
// them in place. Its selectors count the elements inside the window before each position, a nibble each; the codes, a nibble each too,
// select exponents from a table of 8 bytes in the same way. A fallback's place then gets its 16 bits on top.
#pragma once
#include "jaxzip/kernels.h"
#include "jaxzip/layout.h"
#include "ptx.cuh"

namespace jaxzip::tca_tbe {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kBands = layout::kBandsPerBlock;
constexpr int kFullStaged = 512;  // fallbacks of a block in shared memory, 12.5%; a block with more fetches them a band at a time
constexpr int kStages = 2;
constexpr int kEarly = 3;  // fallbacks of a half-FragTile whose loads go out first
// A stage has sign_mantissa in whole lines of memory, since other copies take longer and more energy, then fallbacks.
constexpr uint32_t kLine = 128;
constexpr int kFullStart = layout::kBlockSize + kLine, kStageBytes = kFullStart + 2 * kFullStaged;
// The plane: row `r` of FragTile `f` at 144 f + 16 r, free of bank conflicts for all who write and read it.
constexpr int kRowBytes = 16, kFragBytes = 8 * kRowBytes + 16;
constexpr int kPlaneBytes = layout::kFragsPerBand * kFragBytes;
constexpr int kBitmapBytes = layout::kBlockSize / 8;  // one of three
constexpr int kScratchBytes = 3 * kBitmapBytes + kPlaneBytes + 16;  // and a barrier for each of two stages
static_assert(kStages == 2 && kStageBytes % kLine == 0);
constexpr int whole_lines(int bytes) { return (bytes + kLine - 1) / kLine * kLine; }  // so that the next warp's stages begin with one

// A payload that was checked when it was built; offsets are clamped all the same, so that nothing is read out of bounds.
struct Source {
  const uint32_t* bitmap[3];
  const uint8_t* sign_mantissa;
  const uint16_t* full;
  const uint2* tile_offsets;
  const uint8_t* start_exp;
  uint32_t sign_mantissa_len, full_len;  // as far as offsets reach
};

inline Source MakeSource(const Payload& p) {
  const auto reached = [](int64_t length) { return static_cast<uint32_t>(length < UINT32_MAX ? length : UINT32_MAX); };
  return {{p.bitmap[0], p.bitmap[1], p.bitmap[2]}, p.sign_mantissa, p.full, reinterpret_cast<const uint2*>(p.tile_offsets),
          p.start_exp, reached(p.sign_mantissa_len), reached(p.full_len)};
}

// Elements from `start` to `end` inside what there is and `room`, in whole `kUnit`s.
template <uint32_t kUnit>
__device__ __forceinline__ uint32_t run_length(uint32_t start, uint32_t end, uint32_t there_are, uint32_t room) {
  const uint32_t stop = min(end, there_are);
  return stop > start ? min(stop - start, room) & ~(kUnit - 1) : 0;
}

// A block's runs of sign_mantissa and full: where they start, and how many bytes of each to stage, in the low and the high half of a
// word whose highest bit says that `full` has more.
struct Runs {
  uint32_t low, full, bytes;
  __device__ __forceinline__ void load(const Source& s, int block, int next) {
    const uint2 from = s.tile_offsets[block], to = s.tile_offsets[next];
    low = from.x & ~15u, full = from.y & ~7u;
    bytes = run_length<16>(low, to.x, s.sign_mantissa_len, layout::kBlockSize) |
            2 * run_length<8>(full, to.y, s.full_len, kFullStaged) << 16 | (to.y - full > kFullStaged ? 0x80000000u : 0);
  }
  __device__ __forceinline__ uint32_t low_bytes() const { return bytes & 0xFFFF; }
  __device__ __forceinline__ uint32_t full_bytes() const { return bytes >> 16 & 0x7FFF; }
  __device__ __forceinline__ bool has_more() const { return bytes >> 31; }
  // Lane `from`'s, as a sum: its result the compiler knows to be the same in all lanes.
  __device__ __forceinline__ Runs of_lane(int from, int lane) const {
    const auto pick = [&](uint32_t v) { return __reduce_add_sync(kAllLanes, lane == from ? v : 0); };
    Runs r;
    r.low = pick(low), r.full = pick(full), r.bytes = pick(bytes);
    return r;
  }
};

// A warp's stages, filled in turns, and the place of one block's bitmaps.
struct Ring {
  uint32_t stages, bitmaps, barriers;
  __device__ __forceinline__ Ring(uint32_t stages, uint32_t scratch, int lane)
      : stages(stages), bitmaps(scratch), barriers(scratch + 3 * kBitmapBytes + kPlaneBytes) {
#ifdef JAXZIP_BULK_COPIES
    if (lane == 0)
      for (int i = 0; i < kStages; ++i) barrier_init(barriers + 8 * i, 1);
    __syncwarp();
#endif
  }
  __device__ __forceinline__ uint32_t stage(uint32_t turn) const { return stages + turn % kStages * kStageBytes; }
  static __device__ __forceinline__ uint32_t before_run(const Runs& runs) { return runs.low % kLine; }  // in its first line

  __device__ __forceinline__ uint32_t barrier(uint32_t turn) const { return barriers + turn % kStages * 8; }

  // Starts the copies of a block; its bitmaps' place must be free. On its barrier `others` more bytes will come.
  __device__ __forceinline__ void copy(const Source& s, uint32_t turn, int block, const Runs& runs, int lane, uint32_t others = 0) const {
    const uint32_t full_bytes = runs.full_bytes(), low_to = stage(turn), full_to = low_to + kFullStart;
    const uint32_t low = runs.low - before_run(runs);
    const uint32_t low_bytes = runs.low_bytes() ? min(before_run(runs) + runs.low_bytes() + kLine - 1 & ~(kLine - 1), (s.sign_mantissa_len & ~15u) - low) : 0;
    const int64_t word = int64_t{block} * (kBitmapBytes / 4);
#ifdef JAXZIP_BULK_COPIES
    if (elect_one()) {
      barrier_expect(barrier(turn), 3 * kBitmapBytes + low_bytes + full_bytes + others);
#pragma unroll
      for (int i = 0; i < 3; ++i) bulk_copy(bitmaps + i * kBitmapBytes, s.bitmap[i] + word, kBitmapBytes, barrier(turn));
      if (low_bytes) bulk_copy(low_to, s.sign_mantissa + low, low_bytes, barrier(turn));
      if (full_bytes) bulk_copy(full_to, s.full + runs.full, full_bytes, barrier(turn));
    }
#else
#pragma unroll
    for (int i = 0; i < 3; ++i) copy_async_16(bitmaps + i * kBitmapBytes + lane * 16, s.bitmap[i] + word + lane * 4);
#pragma unroll
    for (int i = lane * 16; i < kFullStart; i += 512)
      if (i < low_bytes) copy_async_16(low_to + i, s.sign_mantissa + low + i);
#pragma unroll
    for (int i = lane * 16; i < 2 * kFullStaged; i += 512)
      if (i < full_bytes) copy_async_16(full_to + i, reinterpret_cast<const uint8_t*>(s.full + runs.full) + i);
#endif
  }
  // Waits for them, and for this thread's other asynchronous copies.
  __device__ __forceinline__ void wait(uint32_t turn) const {
    copy_async_wait();
#ifdef JAXZIP_BULK_COPIES
    barrier_wait(barrier(turn), turn / kStages & 1);
#endif
    __syncwarp();
  }
};

// A lane's bitmaps of a block.
struct Bitmaps {
  uint32_t b[kBands][3];
  __device__ __forceinline__ uint32_t any(int band) const { return b[band][0] | b[band][1] | b[band][2]; }
  __device__ __forceinline__ void load(uint32_t from, int lane) {
#pragma unroll
    for (int band = 0; band < kBands; ++band)
#pragma unroll
      for (int i = 0; i < 3; ++i) b[band][i] = load_word(from + i * kBitmapBytes + (band * 32 + lane) * 4);
  }
};

// What a lane knows of a block: for each band how many elements inside the window come before its half-FragTile.
struct Ranks {
  uint32_t before[kBands];
  uint32_t inside;  // of the whole block
  __device__ __forceinline__ void count(const Bitmaps& bits) {
    uint32_t own[2], sum[2];  // two bands a word: at most 1024 each
#pragma unroll
    for (int i = 0; i < 2; ++i) own[i] = sum[i] = __popc(bits.any(2 * i)) | __popc(bits.any(2 * i + 1)) << 16;
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) add_from_below(sum[i], step);
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

// Byte `code` holds the exponent of that code, rotated right by one: its low bit is where a bf16's low byte has it, the others are
// where the high byte has them.
struct Exponents {
  uint32_t low, high;
  __device__ __forceinline__ explicit Exponents(uint32_t start_exp) {
    const auto four = [&](uint32_t first) {
      uint32_t v = 0;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t e = start_exp + first + i & 255;
        v |= (e >> 1 | (e & 1) << 7) << 8 * i;
      }
      return v;
    };
    low = four(0), high = four(4);
  }
};

// The highest bit of `left`, which loses it. Nothing is left: `found` is false.
struct Fallback {
  uint32_t shift;
  bool found;
  __device__ __forceinline__ void next(uint32_t& left) {
    shift = highest_bit_shift(left);
    found = left != 0;
    left ^= shift_right(0x80000000u, shift);
  }
};

// Decodes this lane's half-FragTile to the plane, except for the fallbacks. Its elements inside the window begin at `at`. `meanwhile` is
// done while they are loaded.
template <class Meanwhile>
__device__ __forceinline__ void decode_rows(const uint32_t (&b)[3], uint32_t any, uint32_t at, Exponents exponents, uint32_t to,
                                            Meanwhile&& meanwhile) {
  // Nibble j of word r belongs to position 4 j + r: column r + 4 (j % 2) of row j / 2.
  const uint32_t even = choose<0x55555555u>(b[0], b[1] << 1), odd = choose<0x55555555u>(b[0] >> 1, b[1]);
  const uint32_t even2 = b[2] & 0x55555555u, odd2 = b[2] & 0xAAAAAAAAu;
  const uint32_t code[4] = {choose<0x33333333u>(even, even2 << 2), choose<0x33333333u>(odd, odd2 << 1),
                            choose<0x33333333u>(even >> 2, even2), choose<0x33333333u>(odd >> 2, odd2 >> 1)};
  uint32_t inside[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) inside[r] = any >> r & 0x11111111u;
  const uint32_t first_two = inside[0] + inside[1], four = first_two + inside[2] + inside[3];
  const uint32_t before = four << 4 & 0xF0F0F0F0u;  // in the row and before these four
  const uint32_t rank[4] = {before, before + inside[0], before + first_two, before + first_two + inside[2]};
  const uint32_t of_row = four + (four >> 4) & 0x0F0F0F0Fu;  // a byte a row
  // Two words a row and the first of the next: a third one of its own would only be needed where the next row begins in it.
  uint32_t words[9], shift[4];
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const uint32_t start = row == 0 ? at : __dp4a(of_row, 0x00010101u >> 8 * (3 - row), at), word = start & ~3u;
    shift[row] = start * 8;
    words[2 * row] = load_word(word), words[2 * row + 1] = load_word(word + 4);
    if (row == 3) words[8] = load_word(word + 8);
  }
  meanwhile();
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const uint32_t low = __funnelshift_r(words[2 * row], words[2 * row + 1], shift[row]);
    const uint32_t high = __funnelshift_r(words[2 * row + 1], words[2 * row + 2], shift[row]);
    const uint32_t pick = row | (4 + row) << 4;
    uint32_t pair[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // columns 2 i, 2 i + 4, 2 i + 1, 2 i + 5
      const uint32_t s = select_bytes(low, high, __byte_perm(rank[2 * i], rank[2 * i + 1], pick));
      const uint32_t e = select_bytes(exponents.low, exponents.high, __byte_perm(code[2 * i], code[2 * i + 1], pick));
      const uint32_t high_bytes = choose<0x80808080u>(s, e), low_bytes = choose<0x7F7F7F7Fu>(s, e);
      pair[0][i] = __byte_perm(low_bytes, high_bytes, 0x6240);
      pair[1][i] = __byte_perm(low_bytes, high_bytes, 0x7351);
    }
    store_16(to + row * kRowBytes, pair[0][0], pair[0][1], pair[1][0], pair[1][1]);
  }
}

// Decodes bands of a block. All lanes of the warp together; what they see of the plane is theirs after a __syncwarp().
struct Decoder {
  uint32_t half;  // where this lane's half-FragTile is in the plane
  Exponents exponents;
  uint32_t stage, run;        // of the block; where its sign_mantissa begins
  uint32_t fallbacks;         // as if all positions of the block were fallbacks before this lane's first
  const uint16_t* unstaged;   // the block's fallbacks in global memory, where they are not all staged
  uint32_t unstaged_count;
  uint32_t free;              // shared memory for a band's fallbacks in that case, behind the block's sign_mantissa
  __device__ __forceinline__ Decoder(uint32_t start_exp, uint32_t plane, int lane)
      : half(plane + lane / 2 * kFragBytes + lane % 2 * (4 * kRowBytes)), exponents(start_exp) {}

  __device__ __forceinline__ void begin_block(const Source& s, int block, uint32_t stage_of_block, const Runs& runs, const Ranks& ranks,
                                              int lane) {
    stage = stage_of_block;
    run = stage + Ring::before_run(runs);
    fallbacks = stage + kFullStart + lane * 64;
    unstaged = nullptr;
    if (runs.has_more()) {
      const uint32_t start = min(s.tile_offsets[block].y, s.full_len);
      unstaged = s.full + start, unstaged_count = min(s.full_len - start, layout::kBlockSize - ranks.inside);
      free = run + (ranks.inside + 15 & ~15u);
    }
  }

  template <class Meanwhile>
  __device__ __forceinline__ void band(const uint32_t (&b)[3], uint32_t before, int band, int lane, Meanwhile&& meanwhile) {
    constexpr int kBandSize = layout::kBandRows * layout::kBlock;
    if (unstaged) stage_band(band * kBandSize, before, lane);
    const uint32_t any = b[0] | b[1] | b[2];
    // From the lowest position up. The first fallbacks' loads go out now, their values are placed below.
    uint32_t left = __brev(~any);
    uint32_t value_at = min(fallbacks + 2 * band * kBandSize - 2 * before, stage + kStageBytes);  // whatever the payload says
    Fallback early[kEarly];
    uint32_t value[kEarly];
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      early[i].next(left);
      if (early[i].found) value[i] = load_half(value_at + 2 * i);
    }
    decode_rows(b, any, run + before, exponents, half, meanwhile);
#pragma unroll
    for (int i = 0; i < kEarly; ++i)
      if (early[i].found) store_half(half + 2 * early[i].shift, value[i]);
    Fallback one;
    for (value_at += 2 * kEarly; left; value_at += 2) {
      one.next(left);
      store_half(half + 2 * one.shift, load_half(value_at));
    }
  }

 private:
  // A band's fallbacks, to where `free` has room for the most there can be.
  __device__ __forceinline__ void stage_band(uint32_t position, uint32_t before, int lane) {
    constexpr uint32_t kMost = layout::kBandRows * layout::kBlock;
    static_assert(kLine - 16 + layout::kBlockSize - kMost + 2 * kMost <= kStageBytes, "n fallbacks fit behind 4096 - n sign_mantissa");
    const uint32_t first = position - __shfl_sync(kAllLanes, before, 0);
#pragma unroll 1
    for (uint32_t i = lane; i < kMost && first + i < unstaged_count; i += 32) store_half(free + 2 * i, unstaged[first + i]);
    fence_stores_before_copies();  // the next of this stage
    fallbacks = free - 2 * first + lane * 64;
    __syncwarp();
  }
};

}  // namespace jaxzip::tca_tbe
