// The same where a CTA has two warp groups, whose warps have registers for the operands of two chunks: the next chunk is decoded while
// wgmma multiplies this one, so that two of them keep the Tensor Cores busy.
#pragma once
#include "wgmma_ring.cuh"

namespace jaxzip::lane_planar {

template <class Weights, int kN, class Work>
class PipelinedMultiplier : public RingReader<Weights, kN, Work> {
  using Ring = RingReader<Weights, kN, Work>;
  using Operands = uint32_t[4][4];

  // The plane holds constants before and after.
  template <class BlockIndex>
  __device__ __forceinline__ void decode(const WgmmaArgs& args, const Work& work, const RingPlace& place, const BlockIndex& block, Operands& a) const {
    const uint32_t from = this->words_of(args, place);
    uint32_t words[Weights::kRegisters], high[2][4];
    Patch patch = {};
    if constexpr (Weights::kHasEscapes) patch = this->put_patches(args, work, place, block);
    this->tile_words_.read(words, from);
    if constexpr (Weights::kHasEscapes) {
      __syncwarp();
#pragma unroll
      for (int v = 0; v < 2; ++v) ptx::load_shared(high[v], this->patches_.plane + this->lane_ * 16 + v * (kTileElements / 2));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) Weights::decode(a[j], words, high[j >> 1], j);
    if constexpr (Weights::kHasEscapes) {
      __syncwarp();
      this->patches_.take_back(patch);
      __syncwarp();
    }
  }

 public:
  using Ring::Ring;

  // As of Multiplier.
  template <class BlockIndex>
  __device__ __forceinline__ void row_block(const WgmmaArgs& args, const Work& work, int slots, int own_slots, const BlockIndex& block_index,
                                            RingPlace& place, float (&sums)[kN / 2]) const {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;
    int left = own_slots;  // with the running one
    Ring::begin_row_block(args, work, place);
    const auto block = [&] { return block_index(own_slots - left); };
    // Multiplies the chunk at `place`, whose operands are `a`, and decodes the one that follows into `next`. False after the last one.
    const auto step = [&](Operands& a, Operands& next) {
      const uint32_t b = this->b_of(work, place), empty = Ring::barriers_of(work, place) + kEmpty;
      ptx::wgmma_ready(a);
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::wgmma(sums, a[j], b + 2 * j);
      ptx::wgmma_commit();
      place = Ring::following(work, args.plan, place);
      if (--left > 0) {
        Ring::wait_full(work, place);
        decode(args, work, place, block, next);
        ptx::wgmma_ready(next);
        ptx::wgmma_fence();  // or the compiler would decode after the wait
      }
      ptx::wgmma_wait();
      ptx::wgmma_ready(a);  // its registers are nobody else's before: what is loaded into others' would be multiplied
      __syncwarp();
      work.release(empty, this->lane_);
      return left > 0;
    };
    uint32_t even[4][4] = {}, odd[4][4] = {};
    Ring::wait_full(work, place);
    decode(args, work, place, block, even);
#pragma unroll 1
    while (step(even, odd) && step(odd, even)) {
    }
    ptx::wgmma_done(sums);
    if (own_slots < slots) this->skip_slot(args, work, place);
  }
};

}  // namespace jaxzip::lane_planar
