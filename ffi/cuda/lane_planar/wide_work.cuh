// How the matmul of many columns is split, as every warp of a CTA knows it.
#pragma once
#include "arrivals.cuh"
#include "matmul_wide.h"
#include "ptx.cuh"
#include "weights.cuh"
#include "wgmma.cuh"
#include "wgmma_x.cuh"

namespace jaxzip::lane_planar {

constexpr int kWideLineColumns = 64, kWideAreas = 2;  // of a warp group's results, which wait in so many areas for their copies
constexpr int kWideBand = 8;  // slices; their x is 4 KB for each k

// Where results go by whole lines: y[n, rows] in boxes of kWideLineColumns by 64 rows.
struct WideOutput {
  CUtensorMap map;
  bool by_lines;
};

// A unit of work is a row block for each warp group of a cluster, times a slice of the columns. Clusters take units in turn: those that run
// at once share slices and row blocks, which so come from the L2.
struct WideWork {
  static constexpr bool kSplitsK = false, kPairs = false;  // gated products have other results
  int rank, cluster, clusters, groups, slices, chunks, passes;
  uint32_t shared, barriers, block_bytes, x_bytes;  // x_bytes of a slot

  __device__ __forceinline__ WideWork(const WgmmaArgs& args, uint32_t shared)
      : rank(ptx::cluster_rank()), cluster(ptx::cluster_index()), clusters(args.plan.clusters), groups(args.plan.row_blocks),
        slices(args.plan.slices), chunks(args.plan.chunks), shared(shared) {
    passes = (groups * slices - cluster + clusters - 1) / clusters;
    barriers = shared + args.plan.barriers;
    block_bytes = args.w.block_words * 4;
    x_bytes = chunk_bytes(kWgmmaMaxN);
  }
  __device__ __forceinline__ int first_chunk() const { return 0; }
  __device__ __forceinline__ int unit(int pass) const { return cluster + pass * clusters; }
  // Units go through all row blocks for a band of slices, whose x stays in the L2, then for the next.
  __device__ __forceinline__ int first_slice(int unit) const { return unit / (kWideBand * groups) * kWideBand; }
  __device__ __forceinline__ int first_column(int pass) const {
    const int first = first_slice(unit(pass));
    return (first + (unit(pass) - first * groups) % min(kWideBand, slices - first)) * kWgmmaMaxN;
  }
  // Past the last one where this team has none. Of a gated product the teams have a gate's and the one that it is for.
  __device__ __forceinline__ int row_block_of(const WgmmaPlan& plan, int team, int pass) const {
    const int first = first_slice(unit(pass));
    const int group = (unit(pass) - first * groups) / min(kWideBand, slices - first), own = group * kWideShare + rank;
    if (plan.pair_of_teams) return own < plan.half ? own + team * plan.half : 2 * plan.half;
    return own * kWideTeams + team;
  }
  // Puts the overflow entries of a block's tile, of which `first` is the block's first, into a patch plane.
  __device__ __forceinline__ void scatter_overflow(const WgmmaArgs& args, uint32_t first, uint32_t block, uint32_t plane, int tile) const {
    lane_planar::scatter_overflow(args.w.overflow, args.w.overflow_length, first, block, plane, tile * kTileElements, kTileElements);
  }
  // Every CTA of the cluster writes into the slot.
  __device__ __forceinline__ void release(uint32_t empty, int lane) const {
    arrive_at_all(empty, kWideShare, lane);
  }
};

}  // namespace jaxzip::lane_planar
