// How a warp turns the ring's slots into a row block's sums: it decodes its tile of a chunk and multiplies while the next chunk's escapes are
// put into its patch plane.
#pragma once
#include "weights.cuh"
#include "wgmma_units.cuh"
#include "wgmma_work.cuh"

namespace jaxzip::lane_planar {

// Where a warp is in the ring, and the parity by which it waits there.
struct RingPlace {
  uint32_t index, phase;
};

template <class Weights, int kN>
class Multiplier {
  const TileWords<Weights> tile_words_;
  const Patches patches_;
  const uint32_t first_words_, first_b_;
  const int lane_;

  static __device__ __forceinline__ uint32_t barriers_of(const WgmmaWork& work, const RingPlace& p) { return work.barriers + p.index * kSlotBarriers; }
  static __device__ __forceinline__ void wait_full(const WgmmaWork& work, const RingPlace& p) {
    ptx::barrier_wait(barriers_of(work, p) + kFull, p.phase);
  }
  static __device__ __forceinline__ RingPlace following(const WgmmaPlan& plan, const RingPlace& p) {
    const bool wraps = p.index + 1 == plan.slots;
    return {wraps ? 0 : p.index + 1, p.phase ^ wraps};
  }

 public:
  __device__ __forceinline__ Multiplier(const WgmmaArgs& args, const WgmmaWork& work, uint32_t warp_area, int warp, int lane)
      : tile_words_(warp & 3, lane),
        patches_(work.shared + args.plan.planes + warp * static_cast<uint32_t>(Weights::kPlaneBytes), warp_area + kShiftBytes, warp & 3, lane),
        first_words_(work.shared + args.plan.blocks + (warp >> 2) * work.block_bytes),
        first_b_(ptx::wgmma_descriptor(work.shared + (warp >> 2 & (args.plan.k_groups - 1)) * chunk_bytes(kN))), lane_(lane) {}

  __device__ __forceinline__ void fill_plane() const {
    if constexpr (Weights::kHasEscapes) {
      patches_.fill();
      __syncwarp();
    }
  }

  // A slot in which this warp has no chunk.
  __device__ __forceinline__ void skip_slot(const WgmmaArgs& args, const WgmmaWork& work, RingPlace& place) const {
    wait_full(work, place);
    __syncwarp();
    if (lane_ == 0) ptx::barrier_arrive(barriers_of(work, place) + kEmpty);
    place = following(args.plan, place);
  }

  // The sums of a row block over this warp group's chunks in the next `slots` slots, of which it has one in the first `own_slots`, all or
  // all but one. `block(i)` is the index of the encoded block in the i-th of them.
  template <class BlockIndex>
  __device__ __forceinline__ void row_block(const WgmmaArgs& args, const WgmmaWork& work, int slots, int own_slots, const BlockIndex& block_index,
                                            RingPlace& place, float (&sums)[kN / 2]) const {
    const WgmmaPlan& plan = args.plan;
    const Matrix& w = args.w;
    const auto words_of = [&](const RingPlace& p) { return first_words_ + p.index * plan.slot_bytes; };
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;
    int left = own_slots;  // with the running one
    const auto block = [&] { return block_index(own_slots - left); };
    uint32_t a[4][4] = {};
    Patch patch = {};
    wait_full(work, place);
    if constexpr (Weights::kHasEscapes) patch = patches_.put(words_of(place), w, block);
#pragma unroll 1
    for (;;) {
      uint32_t words[Weights::kRegisters], high[2][4];
      const uint32_t b = first_b_ + place.index * (work.x_bytes >> 4);
      __syncwarp();
      tile_words_.read(words, words_of(place));
      if constexpr (Weights::kHasEscapes) {
#pragma unroll
        for (int v = 0; v < 2; ++v) ptx::load_shared(high[v], patches_.plane + lane_ * 16 + v * (kTileElements / 2));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) Weights::decode(a[j], words, high[j >> 1], j);
      ptx::wgmma_ready(a);
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::wgmma(sums, a[j], b + 2 * j);
      ptx::wgmma_commit();
      // While this chunk multiplies, the escapes of the next go to the plane.
      if constexpr (Weights::kHasEscapes) {
        __syncwarp();
        patches_.take_back(patch);
      }
      const uint32_t empty = barriers_of(work, place) + kEmpty;
      place = following(plan, place);
      if (--left > 0) {
        wait_full(work, place);
        if constexpr (Weights::kHasEscapes) {
          __syncwarp();
          patch = patches_.put(words_of(place), w, block);
        }
      }
      ptx::wgmma_wait();
      ptx::wgmma_ready(a);  // its registers are nobody else's before: what is loaded into others' would be multiplied
      if (lane_ == 0) ptx::barrier_arrive(empty);
      if (left == 0) break;
    }
    ptx::wgmma_done(sums);
    if (own_slots < slots) skip_slot(args, work, place);
  }
};

}  // namespace jaxzip::lane_planar
