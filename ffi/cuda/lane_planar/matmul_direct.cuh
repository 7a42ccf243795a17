// Small-N matmul: weights go straight from global memory to registers, x waits in shared memory, mma.sync multiplies.
//
// A cluster owns row groups of 16, 32 or 64 rows; its CTAs split K. A CTA's work, (row group, k block) in this order, is cut
// into one contiguous range a warp, so that every warp streams the same number of bytes and none waits before the end. A warp
// leaves one partial sum a row group that it touched; they are added in the order of k: over warps in shared memory, then
// over CTAs through distributed shared memory. No atomics, no workspace, the same bits in every run.
//
// A launch costs 3 to 4 us besides its stream, most of it a chain of latencies (constants, first loads, the last units, two
// reductions): warps jump over what only warp 0 has to do, and what comes before the first and after the last load is kept short.
#pragma once
#include "direct_sums.cuh"
#include "weights.cuh"

namespace jaxzip::lane_planar {

template <class Weights, int kTilesPerWarp, int kColumnTiles, int kWarps, int kCtasPerSm>
__global__ void __launch_bounds__(kWarps * 32, kCtasPerSm) matmul_direct(const __grid_constant__ DirectArgs args) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kGroups = kTiles / kTilesPerWarp;  // row groups of a row block: a unit of work is one of them x 64 k
  // Units in flight. More bytes than DRAM needs (about 40 KB an SM) only make queues in which x waits.
  constexpr int kInFlight = kColumnTiles == 1 && kTilesPerWarp < 4 ? 2 : kWarps * kCtasPerSm <= 8 && kColumnTiles <= 2 ? 8 : 4;
  constexpr int kAhead = kInFlight / kTilesPerWarp;
  constexpr int kGroupRows = kTilesPerWarp * kTileRows, kPitch = kGroupRows + kSumPad;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Matrix& w = args.w;
  const DirectPlan& plan = args.plan;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int ranks = plan.cluster, rank = ptx::cluster_rank(), cluster = ptx::cluster_index();

  const bool k_longer = rank < plan.k_longer, longer = cluster < plan.groups_longer;
  const int k_begin = rank * plan.k_blocks + min(rank, plan.k_longer), units_k = plan.k_blocks + k_longer;
  const int x_columns = max(0, min(units_k * kBlock, w.k - k_begin * kBlock));
  const uint32_t x_barrier = shared + plan.barrier, sums_barrier = x_barrier + 8, overflow_barrier = shared + plan.overflow;
  const bool bulk_x = w.k % 8 == 0 && (reinterpret_cast<uintptr_t>(args.x) & 15) == 0;
  const __nv_bfloat16* x = args.x + static_cast<size_t>(k_begin) * kBlock;
  auto load_x = [&] {  // by warp 0
    ptx::wait_for_previous_grid();
    if (lane == 0) ptx::barrier_expect(x_barrier, args.n * x_columns * 2);
    __syncwarp();
#pragma unroll 1
    for (int n = lane; n < args.n && x_columns; n += 32)
      ptx::bulk_copy(shared + plan.x + n * plan.x_pitch, x + static_cast<size_t>(n) * w.k, x_columns * 2, x_barrier);
  };
  // x goes first: behind the weights of all SMs it would come microseconds later.
  if (warp == 0) {
    if (lane == 0) {
      ptx::barrier_init_only(x_barrier, 1);
      ptx::barrier_init_only(sums_barrier, 1);
      if (plan.overflow_listed) ptx::barrier_init_only(overflow_barrier, kThreads);
      ptx::barrier_init_done();
    }
    __syncwarp();
    if (bulk_x && !args.overlap) load_x();
  }

  const int groups = plan.groups + (longer << plan.gated), total = groups * units_k;
  auto range_begin = [&](int i) { return static_cast<int>(static_cast<uint32_t>(total * i) / kWarps); };
  const int begin = range_begin(warp), end = range_begin(warp + 1);
  // Exact for fewer than 2^20 units. A table in the plan would be one more miss of the constant cache: 0.1-0.4 us.
  const int first_group = groups == 1 || !units_k ? 0 : static_cast<int>((begin + 0.5f) * ptx::reciprocal(static_cast<float>(units_k)));
  const int first_k = begin - first_group * units_k;
  auto group_index = [&](int group) {  // of the matrix
    return cluster + (group >> plan.gated) * plan.clusters + (group & plan.gated ? plan.half : 0);
  };
  auto block_index = [&](int group, int k) {
    return static_cast<uint32_t>(group_index(group) / kGroups * plan.all_k_blocks + k_begin + k);
  };
  auto block_at = [&](int group, int k) {
    return w.blocks + static_cast<uint64_t>(block_index(group, k)) * static_cast<uint32_t>(w.block_words);
  };

  // The cursor of loads runs kAhead units before that of the arithmetic.
  uint32_t tiles[kAhead * kTilesPerWarp][Weights::kRegisters];
  uint2 entries[kAhead];
  int load_group = first_group, load_k = first_k, to_load = end - begin;
  const uint32_t* load_block = block_at(load_group, load_k);
  auto load_entries = [&](uint2& e) {
    if (Weights::kHasEscapes && 2 * lane < w.block_words - kHeaderStart) {
      uint32_t v[2];
      ptx::load_stream<2>(v, load_block + kHeaderStart + 2 * lane);
      e = make_uint2(v[0], v[1]);
    }
  };
  auto load_tile = [&](int slot, int tile) {
    Weights::load(tiles[slot], load_block, (kGroups == 1 ? 0 : group_index(load_group) % kGroups * kTilesPerWarp) + tile, lane);
  };
  auto advance_load = [&] {
    --to_load;
    load_block += w.block_words;
    if (++load_k == units_k) {
      load_k = 0;
      ++load_group;
      load_block = block_at(load_group, 0);
    }
  };

  ptx::launch_dependents();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    entries[i] = make_uint2(0, 0);
    if (to_load > 0) {
      load_entries(entries[i]);
#pragma unroll
      for (int t = 0; t < kTilesPerWarp; ++t) load_tile(i * kTilesPerWarp + t, t);
      advance_load();
    }
  }
  if (args.overlap && bulk_x && warp == 0) load_x();
  if (!bulk_x) {
    ptx::wait_for_previous_grid();
#pragma unroll 1
    for (int n = 0; n < args.n; ++n)
#pragma unroll 1
      for (int i = threadIdx.x; i < x_columns; i += kThreads)
        reinterpret_cast<__nv_bfloat16*>(memory + plan.x + n * plan.x_pitch)[i] = x[static_cast<size_t>(n) * w.k + i];
  }
  // The last columns of a ragged K: weights there are finite padding, x must be zero.
#pragma unroll 1
  for (int i = x_columns + threadIdx.x; i < units_k * kBlock; i += kThreads)
#pragma unroll 1
    for (int n = 0; n < args.n; ++n)
      reinterpret_cast<uint16_t*>(memory + plan.x + n * plan.x_pitch)[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < groups * kTilesPerWarp; i += kThreads)
    ptx::async_copy_16(shared + plan.shift + i * 16,
                       w.shift + static_cast<size_t>(group_index(i / kTilesPerWarp)) * kGroupRows + i % kTilesPerWarp * 16);
  // Overflow entries of a short list wait in shared memory: read when a block needs them, they would hold its warp up.
  const bool listed = Weights::kHasEscapes && plan.overflow_listed;
#pragma unroll 1
  for (int i = threadIdx.x; listed && i < w.overflow_length; i += kThreads)
    ptx::async_copy_8(shared + plan.overflow + kListHeader + i * sizeof(OverflowEntry), w.overflow + i);
  if (ranks > 1 && threadIdx.x == 0) {
    const int owned = ((kGroupRows / 4 - 1 - rank) * plan.magic >> 16) + 1;  // chunks of a row group, 0 or more
    ptx::barrier_expect(sums_barrier, ranks * groups * args.n * owned * 16);
  }
  if (ranks > 1) ptx::cluster_arrive_relaxed();

  // Which warps share a row group: first | last << 8. The last one finishes it, the others leave a sum in their area.
  const float per_unit = total ? ptx::reciprocal(static_cast<float>(total)) : 0;
  auto owner = [&](int unit) { return static_cast<int>(((unit + 1) * kWarps - 0.5f) * per_unit); };
  uint16_t* owners = reinterpret_cast<uint16_t*>(memory + plan.owners);
#pragma unroll 1
  for (int g = threadIdx.x; g < groups; g += kThreads)
    owners[g] = static_cast<uint16_t>(owner(g * units_k) | owner((g + 1) * units_k - 1) << 8);

  const PatchPlane<kTilesPerWarp> plane{shared + warp * plan.area, lane};
  if (Weights::kHasEscapes) plane.fill();
  __syncthreads();
  if (listed) ptx::barrier_arrive_after_copies(overflow_barrier);

  float* finished = reinterpret_cast<float*>(memory + plan.finished);
  float sums[kTilesPerWarp][kColumnTiles][4] = {};
  int group = first_group, k = first_k;
  const int x_row = lane & 7;
  uint32_t x_address[kColumnTiles];
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c)  // columns past n repeat the last one and are never stored
    x_address[c] = shared + plan.x + min(8 * c + x_row, args.n - 1) * plan.x_pitch + (lane >> 3) * 16;

  auto store_sums = [&](float* out) {
#pragma unroll
    for (int t = 0; t < kTilesPerWarp; ++t)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 8 * c + 2 * (lane & 3) + (i & 1);
          if (n < args.n) out[n * kPitch + t * kTileRows + (lane >> 2) + 8 * (i >> 1)] = sums[t][c][i];
          sums[t][c][i] = 0;
        }
  };

  float* own_sums = reinterpret_cast<float*>(memory + warp * plan.area);
  if (ranks > 1) ptx::cluster_wait();  // the others have started, so that sums may be sent to them; here x hides it
  if (bulk_x) ptx::barrier_wait(x_barrier, 0);
  if (begin == end) store_sums(own_sums);  // zeros: there are fewer units than warps
#pragma unroll 1
  for (int left = end - begin; left > 0; left -= kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i >= left) break;
      const uint2 e = entries[i];
      const bool more = to_load > 0;
      const int first_tile = kGroups == 1 ? 0 : group_index(group) % kGroups * kTilesPerWarp;
      uint32_t ends = 0, overflow = 0;
      if (Weights::kHasEscapes) {
        ends = __shfl_sync(~0u, e.x, 0);
        overflow = __shfl_sync(~0u, e.y, 0);
        if (more) load_entries(entries[i]);
        plane.template scatter<false>(e, ends, first_tile);
        if (overflow) {
          const OverflowEntry* list = w.overflow;
          if (listed) {
            ptx::barrier_wait(overflow_barrier, 0);
            list = reinterpret_cast<const OverflowEntry*>(memory + plan.overflow + kListHeader);
          }
          scatter_overflow(list, w.overflow_length, overflow - 1, block_index(group, k), plane.base,
                           first_tile * kTileElements, plane.kPositions);
        }
        __syncwarp();
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t b[kColumnTiles][4];  // two k-steps
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) ptx::load_matrices(b[c], x_address[c] + k * (kBlock * 2) + half * 64);
#pragma unroll
        for (int t = 0; t < kTilesPerWarp; ++t) {
          const int slot = i * kTilesPerWarp + t;
          uint32_t high[4];
          if (Weights::kHasEscapes) ptx::load_shared(high, plane.base + t * Weights::kPlaneBytes + half * (kTileElements / 2) + lane * 16);
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            uint32_t a[4];
            Weights::decode(a, tiles[slot], high, j);
#pragma unroll
            for (int c = 0; c < kColumnTiles; ++c) ptx::mma(sums[t][c], a, b[c][2 * (j & 1)], b[c][2 * (j & 1) + 1]);
          }
          if (half && more) load_tile(slot, t);
        }
      }
      if (more) advance_load();
      if (Weights::kHasEscapes) {
        __syncwarp();
        if (overflow)
          plane.fill();
        else
          plane.template scatter<true>(e, ends, first_tile);
        __syncwarp();
      }
      const bool finishes = ++k == units_k;
      if (finishes || left - i == 1) {
        store_sums(finishes ? finished + (group << plan.log_n) * kPitch : own_sums);
        k = 0;
        ++group;
      }
    }
  }
  ptx::async_copy_wait();
  __syncthreads();

  const DirectSums<kGroupRows, kPitch, kThreads> sums_of_all{args, memory, shared, sums_barrier, owners, ranks, rank, cluster, groups, total > 0};
  if (kColumnTiles == 1 && rows_at_once(args.n) == 1)
    sums_of_all.template finish<1>();
  else
    sums_of_all.template finish<rows_at_once(8 * kColumnTiles)>();
}

}  // namespace jaxzip::lane_planar
