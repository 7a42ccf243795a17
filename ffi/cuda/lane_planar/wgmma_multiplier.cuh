// How a warp turns the ring's slots into a row block's sums where a CTA has four warp groups: it decodes its tile of a chunk and multiplies
// while the next chunk's escapes are put into its patch plane. Other warps multiply while it decodes.
#pragma once
#include "wgmma_ring.cuh"

namespace jaxzip::lane_planar {

template <class Weights, int kN, class Work>
class Multiplier : public RingReader<Weights, kN, Work> {
  using Ring = RingReader<Weights, kN, Work>;

 public:
  using Ring::Ring;

  // The sums of a row block over this warp group's chunks in the next `slots` slots, of which it has one in the first `own_slots`, all or
  // all but one. `block(i)` is the index of the encoded block in the i-th of them.
  template <class BlockIndex>
  __device__ __forceinline__ void row_block(const WgmmaArgs& args, const Work& work, int slots, int own_slots, const BlockIndex& block_index,
                                            RingPlace& place, float (&sums)[kN / 2]) const {
    const WgmmaPlan& plan = args.plan;
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;
    int left = own_slots;  // with the running one
    Ring::begin_row_block(args, work, place);
    const auto block = [&] { return block_index(own_slots - left); };
    uint32_t a[4][4] = {};
    Patch patch = {};
    Ring::wait_full(work, place);
    if constexpr (Weights::kHasEscapes) patch = this->put_patches(args, work, place, block);
#pragma unroll 1
    for (;;) {
      uint32_t words[Weights::kRegisters], high[2][4];
      const uint32_t b = this->b_of(work, place);
      __syncwarp();
      this->tile_words_.read(words, this->words_of(args, place));
      if constexpr (Weights::kHasEscapes) {
#pragma unroll
        for (int v = 0; v < 2; ++v) ptx::load_shared(high[v], this->patches_.plane + this->lane_ * 16 + v * (kTileElements / 2));
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
        this->patches_.take_back(patch);
      }
      const uint32_t empty = Ring::barriers_of(work, place) + kEmpty;
      place = Ring::following(work, plan, place);
      if (--left > 0) {
        Ring::wait_full(work, place);
        if constexpr (Weights::kHasEscapes) {
          __syncwarp();
          patch = this->put_patches(args, work, place, block);
        }
      }
      ptx::wgmma_wait();
      ptx::wgmma_ready(a);  // its registers are nobody else's before: what is loaded into others' would be multiplied
      work.release(empty, this->lane_);
      if (left == 0) break;
    }
    ptx::wgmma_done(sums);
    if (own_slots < slots) this->skip_slot(args, work, place);
  }
};

}  // namespace jaxzip::lane_planar
