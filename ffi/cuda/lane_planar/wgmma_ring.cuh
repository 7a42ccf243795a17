// What a warp that multiplies knows of the ring: its place in it, where its tile's words and its patch plane are, whom it tells that it has
// used a slot.
#pragma once
#include "weights.cuh"
#include "wgmma_units.cuh"
#include "wgmma_work.cuh"

namespace jaxzip::lane_planar {

// Where a warp is in the ring, the parity by which it waits there, and how far from the start of a line the slot's blocks begin.
struct RingPlace {
  uint32_t index, phase, in_line;
};

// `Work` says where barriers and slots are, and to whom a used slot is announced.
template <class Weights, int kN, class Work>
class RingReader {
 protected:
  const TileWords<Weights> tile_words_;
  const Patches patches_;
  const uint32_t first_words_, first_b_;
  const int lane_;

  static __device__ __forceinline__ uint32_t barriers_of(const Work& work, const RingPlace& p) { return work.barriers + p.index * kSlotBarriers; }
  static __device__ __forceinline__ void wait_full(const Work& work, const RingPlace& p) {
    ptx::barrier_wait(barriers_of(work, p) + kFull, p.phase);
  }
  static __device__ __forceinline__ RingPlace following(const Work& work, const WgmmaPlan& plan, const RingPlace& p) {
    const bool wraps = p.index + 1 == plan.slots;
    return {wraps ? 0 : p.index + 1, p.phase ^ wraps, p.in_line + plan.k_groups * work.block_bytes & plan.line_mask};
  }
  __device__ __forceinline__ uint32_t words_of(const WgmmaArgs& args, const RingPlace& p) const {
    return first_words_ + p.index * args.plan.slot_bytes + p.in_line;
  }
  // Puts the escapes of the chunk at `p` into the plane; `block()` is the index that overflow entries give.
  template <class BlockIndex>
  __device__ __forceinline__ Patch put_patches(const WgmmaArgs& args, const Work& work, const RingPlace& p, const BlockIndex& block) const {
    return patches_.put(words_of(args, p),
                        [&](uint32_t first) { work.scatter_overflow(args, first, block(), patches_.plane, patches_.tile); });
  }
  __device__ __forceinline__ uint32_t b_of(const Work& work, const RingPlace& p) const { return first_b_ + p.index * (work.x_bytes >> 4); }

 public:
  __device__ __forceinline__ RingReader(const WgmmaArgs& args, const Work& work, uint32_t warp_area, int warp, int lane)
      : tile_words_(warp & 3, lane),
        patches_(work.shared + args.plan.planes + warp * static_cast<uint32_t>(Weights::kPlaneBytes), warp_area + kShiftBytes + lane, warp & 3, lane),
        first_words_(work.shared + args.plan.blocks + (warp >> 2 >> args.plan.log_k_groups) * args.plan.team_bytes +
                     (warp >> 2 & (args.plan.k_groups - 1)) * work.block_bytes),
        first_b_(ptx::wgmma_descriptor(work.shared + (warp >> 2 & (args.plan.k_groups - 1)) * chunk_bytes(kN))), lane_(lane) {}

  __device__ __forceinline__ void fill_plane() const {
    if constexpr (Weights::kHasEscapes) {
      patches_.fill();
      __syncwarp();
    }
  }

  // A row block's first slot is the next.
  static __device__ __forceinline__ void begin_row_block(const WgmmaArgs& args, const Work& work, RingPlace& place) {
    place.in_line = work.first_chunk() * work.block_bytes & args.plan.line_mask;
  }

  // A slot in which this warp has no chunk.
  __device__ __forceinline__ void skip_slot(const WgmmaArgs& args, const Work& work, RingPlace& place) const {
    wait_full(work, place);
    __syncwarp();
    work.release(barriers_of(work, place) + kEmpty, lane_);
    place = following(work, args.plan, place);
  }
};

}  // namespace jaxzip::lane_planar
