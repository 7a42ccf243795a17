// Matmul on Hopper's wgmma for many columns, as prompts have: compute and L2 are the limit, not memory.
//
// A CTA multiplies two row blocks, decoded in registers, by 256 columns at a time. The CTAs of a cluster work on the same columns: each
// brings its part of a chunk of x to all of them, so that x leaves the L2 once a cluster. CTAs stay and take one unit of work after
// another, so the ring fills for the next one while results are stored. Of a gated product (see Epilogue) a CTA has a gate's row block
// and the one that it is for.
#pragma once
#include "weights.cuh"
#include "wgmma_pipelined.cuh"
#include "wide_results.cuh"
#include "wide_work.cuh"

namespace jaxzip::lane_planar {

constexpr int kWideMultiply = 224, kWideFill = 40;  // registers of a thread: 168 for each at the start

// The part of the warp that fills the slots: lane t brings the blocks of team t.
__device__ __forceinline__ void fill_wide(const WgmmaArgs& args, const WideWork& work, int lane) {
  const WgmmaPlan& plan = args.plan;
  constexpr int kPart = kWgmmaMaxN / kWideShare;  // columns of x that this CTA brings
  const uint64_t policy = ptx::read_again();
  ptx::wait_for_previous_grid();
  int at = 0, phase = 1;  // of an unused barrier the phase before has ended
#pragma unroll 1
  for (int pass = 0; pass < work.passes; ++pass) {
    const int row_block = work.row_block_of(plan, lane, pass), first_n = work.first_column(pass) + work.rank * kPart;
    const bool exists = lane < kWideTeams && row_block < args.w.m_blocks();
    const uint32_t blocks = __popc(__ballot_sync(~0u, exists));
    const uint32_t* from = args.w.blocks + static_cast<size_t>(row_block) * work.chunks * args.w.block_words;
#pragma unroll 1
    for (int chunk = 0; chunk < work.chunks; ++chunk, from += args.w.block_words) {
      const uint32_t full = work.barriers + at * kSlotBarriers + kFull;
      ptx::barrier_wait(work.barriers + at * kSlotBarriers + kEmpty, phase);
      if (lane == 0) {
        ptx::barrier_expect(full, blocks * work.block_bytes + work.x_bytes);
        const uint32_t to = work.shared + at * work.x_bytes + work.rank * chunk_bytes(kPart);
        if (args.x_load == XLoad::kSlot)
          ptx::tensor_copy_to_all<kWideShare>(to, &args.x_map, 0, first_n, chunk, full);
        else
          ptx::tensor_copy_to_all<kWideShare>(to, &args.x_map, chunk * kBlock, first_n, 0, full);
      }
      __syncwarp();
      if (exists) {
        const uint32_t in_line = chunk * work.block_bytes & plan.line_mask;
        ptx::bulk_copy(work.shared + plan.blocks + at * plan.slot_bytes + lane * plan.team_bytes + in_line, from, work.block_bytes, full, policy);
      }
      if (++at == plan.slots) {
        at = 0;
        phase ^= 1;
      }
    }
  }
  // Until no CTA of the cluster has anything more to announce here, this one's shared memory has to stay.
#pragma unroll 1
  for (int i = 0; i < plan.slots; ++i) {
    ptx::barrier_wait(work.barriers + at * kSlotBarriers + kEmpty, phase);
    if (++at == plan.slots) {
      at = 0;
      phase ^= 1;
    }
  }
}

template <class Weights>
__device__ __forceinline__ void multiply_wide(const WgmmaArgs& args, const WideOutput& output, const WideWork& work, uint8_t* memory, int warp, int lane) {
  const int team = warp >> 2;
  ptx::wait_for_previous_grid();  // bias and residual
  float sums[kWgmmaMaxN / 2];
  WideResults<Weights> results(args, output, work, memory, warp, lane);
  const PipelinedMultiplier<Weights, kWgmmaMaxN, WideWork> multiplier(args, work, results.warp_area(), warp, lane);
  multiplier.fill_plane();
  RingPlace place = {};
#pragma unroll 1
  for (int pass = 0; pass < work.passes; ++pass) {
    const int row_block = work.row_block_of(args.plan, team, pass);
    if (row_block >= args.w.m_blocks()) {
#pragma unroll 1
      for (int i = 0; i < work.chunks; ++i) multiplier.skip_slot(args, work, place);
      continue;
    }
    results.begin(pass);
    multiplier.row_block(args, work, work.chunks, work.chunks, [&](int i) { return row_block * work.chunks + i; }, place, sums);
    results.store(pass, sums);
  }
  results.end();
}

template <class Weights>
__global__ void __launch_bounds__((kWideTeams + 1) * 128, 1) matmul_wide(const __grid_constant__ WgmmaArgs args,
                                                                                 const __grid_constant__ WideOutput output) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp = __reduce_max_sync(~0u, threadIdx.x >> 5), lane = threadIdx.x & 31;
  const WideWork work(args, ptx::shared_address(memory));
  ptx::launch_dependents();
  if (threadIdx.x < args.plan.slots) {
    const uint32_t barriers = work.barriers + threadIdx.x * kSlotBarriers;
    ptx::barrier_init_only(barriers + kFull, 1);
    ptx::barrier_init_only(barriers + kEmpty, kWideShare * kWideTeams * 4 * kArrivingLanes);
    ptx::barrier_init_done();
  }
  __syncthreads();
  // Others' copies and arrivals come to this CTA's barriers.
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  if (warp < kWideTeams * 4) {
    ptx::registers_increase<kWideMultiply>();
    multiply_wide<Weights>(args, output, work, memory, warp, lane);
  } else {
    ptx::registers_decrease<kWideFill>();
    if (warp == kWideTeams * 4) fill_wide(args, work, lane);
  }
}

}  // namespace jaxzip::lane_planar
