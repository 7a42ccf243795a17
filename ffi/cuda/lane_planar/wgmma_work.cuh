// How the wgmma matmul's work is split, as every warp of a CTA knows it.
#pragma once
#include "arrivals.cuh"
#include "overflow_list.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"
#include "wgmma_x.cuh"

namespace jaxzip::lane_planar {

// What all warps of a CTA know of their work. Where kernels may deal pairs, the plan says whether they do.
template <bool kMayDealPairs>
struct WgmmaWork {
  static constexpr bool kSplitsK = true, kPairs = kMayDealPairs;
  int rank, first_row_block, k_begin, chunks, row_blocks, slots_per_pass, passes;  // row_blocks: or pairs
  int first_n = 0;                                                                 // of its columns
  uint32_t shared, barriers, block_bytes, x_bytes;  // x_bytes of a slot

  __device__ __forceinline__ WgmmaWork(const WgmmaArgs& args, uint32_t shared, int instruction_n)
      : rank(ptx::cluster_rank()), shared(shared) {
    const WgmmaPlan& plan = args.plan;
    int cluster = ptx::cluster_index();
    if (instruction_n == kWgmmaMaxN) {
      first_n = cluster % plan.slices * kWgmmaMaxN;
      cluster /= plan.slices;
    }
    k_begin = rank * plan.chunks + min(rank, plan.k_longer);
    chunks = plan.chunks + (rank < plan.k_longer);  // at least k_groups
    row_blocks = plan.row_blocks - (cluster + (plan.row_blocks - 1) * plan.clusters >= plan.dealt);
    first_row_block = plan.first + cluster;
    slots_per_pass = (chunks + plan.k_groups - 1) >> plan.log_k_groups;
    passes = passes_of(plan, 0);
    barriers = shared + plan.barriers;
    block_bytes = args.w.block_words * 4;
    x_bytes = plan.k_groups * chunk_bytes(instruction_n);
  }
  __device__ __forceinline__ int first_chunk() const { return k_begin; }
  // The first of a pass's columns.
  __device__ __forceinline__ int first_column(int) const { return first_n; }
  // By a whole warp, of which no lane needs the slot of this barrier any more.
  __device__ __forceinline__ void release(uint32_t empty, int lane) const {
    arrive(empty, lane);
  }
  __device__ __forceinline__ int row_block_of(const WgmmaPlan& plan, int team, int pass) const {
    const int of_teams = kPairs ? plan.pair_of_teams : 0, of_passes = kPairs ? plan.pair_of_passes : 0;
    const bool second = (team & of_teams) | (pass & of_passes);
    return first_row_block + ((team >> of_teams) + (pass >> of_passes) * plan.takers) * plan.clusters + (second ? plan.half : 0);
  }
  // Whether the encoded block is one of this CTA's.
  __device__ __forceinline__ bool has_block(const WgmmaArgs& args, uint32_t block) const {
    const WgmmaPlan& plan = args.plan;
    const uint32_t row_block = block / args.w.k_blocks(), chunk = block - row_block * args.w.k_blocks();
    const bool second = kPairs && plan.pair_of_teams + plan.pair_of_passes && row_block >= plan.half;
    const uint32_t dealt = row_block - (second ? plan.half : 0) - first_row_block;
    return chunk - k_begin < chunks && dealt < row_blocks * plan.clusters && dealt % plan.clusters == 0;
  }
  __device__ __forceinline__ OverflowList overflow_list(const WgmmaPlan& plan) const { return {shared + plan.overflow}; }
  // Puts the overflow entries of a block's tile, of which `first` is the block's first, into a patch plane.
  __device__ __forceinline__ void scatter_overflow(const WgmmaArgs& args, uint32_t first, uint32_t block, uint32_t plane, int tile) const {
    if (args.plan.overflow_listed && overflow_list(args.plan).scatter(block, plane, tile)) return;
    lane_planar::scatter_overflow(args.w.overflow, args.w.overflow_length, first, block, plane, tile * kTileElements, kTileElements);
  }
  __device__ __forceinline__ int passes_of(const WgmmaPlan& plan, int team) const {
    const int of_teams = kPairs ? plan.pair_of_teams : 0, of_passes = kPairs ? plan.pair_of_passes : 0;
    return (row_blocks - (team >> of_teams) + plan.takers - 1) >> plan.log_takers << of_passes;
  }
};

}  // namespace jaxzip::lane_planar
