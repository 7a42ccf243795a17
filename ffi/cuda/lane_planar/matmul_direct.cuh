// Small-N matmul: weights go straight from global memory to registers, x waits in shared memory, mma.sync multiplies.
//
// A cluster owns row blocks; its CTAs split K. A CTA's work, (row group, k block) in this order, is cut into one contiguous
// range a warp, so that every warp streams the same number of bytes and none waits before the end. A warp leaves one
// partial sum a row group that it touched; they are added in the order of k: over warps in shared memory, then over
// CTAs through distributed shared memory. No atomics, no workspace, the same bits in every run.
#pragma once
#include <cuda_bf16.h>

#include "epilogue.cuh"
#include "weights.cuh"

namespace jaxzip::lane_planar {

// Work split and shared memory (bytes from its start) of one launch, computed on the host.
struct DirectPlan {
  int cluster;   // CTAs that share a row block, each with its part of K
  int clusters;
  int chunks;    // of four rows that a rank owns of every row block: chunk c is the (c / cluster)th of rank c % cluster
  int magic;     // c / cluster = c * magic >> 16
  int row_blocks;  // of the clusters with most
  int k_blocks, k_longer;  // of a rank; the first k_longer ranks have one more
  int log_n;       // of the columns in the buffers of sums
  int x_pitch;     // 16 bytes over a multiple of 128: eight rows start in eight different bank groups
  int area;        // of a warp: its patch planes, and in the end the sum of the row group that it did not finish
  int barrier, owners, shift, x, finished, received, bytes;
};

struct DirectArgs {
  Matrix w;
  const __nv_bfloat16* x;  // [n][k]
  Epilogue epilogue;
  int n;
  bool overlap;  // launched while the kernel before may still run: only then do weights go before x
  DirectPlan plan;
};

constexpr int kSumPad = 4;  // floats after a column of sums: a warp's stores then fall into different banks

template <class Weights>
DirectPlan plan_direct(const Matrix& w, int n, int tiles_per_warp, int warps, int cluster, int clusters) {
  DirectPlan p = {};
  p.cluster = cluster;
  p.chunks = (kBlock / 4 + cluster - 1) / cluster;
  p.magic = 65536 / cluster + 1;
  p.clusters = clusters;
  p.row_blocks = (w.m_blocks() + clusters - 1) / clusters;
  p.k_blocks = w.k_blocks() / cluster;
  p.k_longer = w.k_blocks() % cluster;
  while (1 << p.log_n < n) ++p.log_n;
  p.x_pitch = (p.k_blocks + (p.k_longer > 0)) * kBlock * 2 + 16;
  const int groups = p.row_blocks * (kTiles / tiles_per_warp);
  const int sum_bytes = ((tiles_per_warp * kTileRows + kSumPad) << p.log_n) * 4;
  const int plane_bytes = tiles_per_warp * Weights::kPlaneBytes;
  p.area = sum_bytes > plane_bytes ? sum_bytes : plane_bytes;
  p.barrier = warps * p.area;
  p.owners = p.barrier + 16;
  p.shift = p.owners + (groups * 2 + 15) / 16 * 16;
  p.x = p.shift + p.row_blocks * kBlock;
  p.finished = p.x + n * p.x_pitch;
  p.received = p.finished + groups * sum_bytes;
  p.bytes = p.received + (cluster > 1 ? cluster * (p.row_blocks * p.chunks << p.log_n) * 16 : 0);
  return p;
}

template <class Weights, int kTilesPerWarp, int kColumnTiles, int kWarps, int kCtasPerSm>
__global__ void __launch_bounds__(kWarps * 32, kCtasPerSm) matmul_direct(const __grid_constant__ DirectArgs args) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kGroups = kTiles / kTilesPerWarp;  // row groups of a row block: a unit of work is one of them x 64 k
  // Units in flight: four tiles a warp, eight where few warps have many registers.
  constexpr int kAhead = kGroups * (kWarps * kCtasPerSm <= 8 && kColumnTiles <= 2 ? 2 : 1);
  constexpr int kGroupRows = kTilesPerWarp * kTileRows, kPitch = kGroupRows + kSumPad;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Matrix& w = args.w;
  const DirectPlan& plan = args.plan;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int ranks = plan.cluster, rank = ptx::cluster_rank(), cluster = ptx::cluster_index();

  const int all_k_blocks = w.k_blocks();
  const int k_begin = rank * plan.k_blocks + min(rank, plan.k_longer);
  const int units_k = plan.k_blocks + (rank < plan.k_longer);
  const bool short_one = cluster + (plan.row_blocks - 1) * plan.clusters >= w.m_blocks();
  const int row_blocks = plan.row_blocks - short_one;
  const int total = row_blocks * kGroups * units_k;
  auto range_begin = [&](int i) { return static_cast<int>(static_cast<uint32_t>(total * i) / kWarps); };
  const int begin = range_begin(warp), end = range_begin(warp + 1);

  // Exact for fewer than 2^20 units.
  const int first_group = units_k ? static_cast<int>((begin + 0.5f) * ptx::reciprocal(static_cast<float>(units_k))) : 0;
  auto block_index = [&](int group, int k) {
    return static_cast<size_t>(cluster + group / kGroups * plan.clusters) * all_k_blocks + k_begin + k;
  };

  // The cursor of loads runs kAhead units before that of the arithmetic.
  uint32_t tiles[kAhead * kTilesPerWarp][Weights::kRegisters];
  uint2 entries[kAhead];
  int load_group = first_group, load_k = begin - first_group * units_k, to_load = end - begin;
  const uint32_t* load_block = w.blocks + block_index(load_group, load_k) * w.block_words;
  auto load_entries = [&](uint2& e) {
    if (Weights::kHasEscapes && 2 * lane < w.block_words - kHeaderStart) {
      uint32_t v[2];
      ptx::load_stream<2>(v, load_block + kHeaderStart + 2 * lane);
      e = make_uint2(v[0], v[1]);
    }
  };
  auto load_tile = [&](int slot, int tile) {
    Weights::load(tiles[slot], load_block, load_group % kGroups * kTilesPerWarp + tile, lane);
  };
  auto advance_load = [&] {
    --to_load;
    load_block += w.block_words;
    if (++load_k == units_k) {
      load_k = 0;
      ++load_group;
      load_block = w.blocks + block_index(load_group, 0) * w.block_words;
    }
  };

  const int x_columns = max(0, min(units_k * kBlock, w.k - k_begin * kBlock));
  const uint32_t x_barrier = shared + plan.barrier, sums_barrier = x_barrier + 8;
  if (threadIdx.x == 0) {
    ptx::barrier_init(x_barrier, 1);
    ptx::barrier_init(sums_barrier, 1);
    const int owned = ((kBlock / 4 - 1 - rank) * plan.magic >> 16) + 1;  // chunks of a row block
    if (ranks > 1) ptx::barrier_expect(sums_barrier, ranks * row_blocks * args.n * owned * 16);
  }
  const bool bulk_x = w.k % 8 == 0 && (reinterpret_cast<uintptr_t>(args.x) & 15) == 0;
  auto load_x = [&] {
    ptx::wait_for_previous_grid();
    const __nv_bfloat16* x = args.x + static_cast<size_t>(k_begin) * kBlock;
    if (!bulk_x) {
#pragma unroll 1
      for (int n = 0; n < args.n; ++n)
#pragma unroll 1
        for (int i = threadIdx.x; i < x_columns; i += kThreads)
          reinterpret_cast<__nv_bfloat16*>(memory + plan.x + n * plan.x_pitch)[i] = x[static_cast<size_t>(n) * w.k + i];
    } else if (warp == 0) {
      if (lane == 0) ptx::barrier_expect(x_barrier, args.n * x_columns * 2);
      __syncwarp();
#pragma unroll 1
      for (int n = lane; n < args.n && x_columns; n += 32)
        ptx::bulk_copy(shared + plan.x + n * plan.x_pitch, x + static_cast<size_t>(n) * w.k, x_columns * 2, x_barrier);
    }
  };
  auto load_first_units = [&] {
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
  };
  // x goes first: behind the weights of all SMs it would come microseconds later.
  if (args.overlap) ptx::launch_dependents();
#pragma unroll 1
  for (int step = 0; step < 2; ++step) {
    if ((step == 0) != args.overlap)
      load_x();
    else
      load_first_units();
  }
  // The last columns of a ragged K: weights there are finite padding, x must be zero.
#pragma unroll 1
  for (int i = x_columns + threadIdx.x; i < units_k * kBlock; i += kThreads)
#pragma unroll 1
    for (int n = 0; n < args.n; ++n)
      reinterpret_cast<uint16_t*>(memory + plan.x + n * plan.x_pitch)[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < row_blocks * 4; i += kThreads)
    ptx::async_copy_16(shared + plan.shift + i * 16,
                       w.shift + (cluster + static_cast<size_t>(i >> 2) * plan.clusters) * kBlock + (i & 3) * 16);
  if (ranks > 1) ptx::cluster_arrive_relaxed();

  // Which warps share a row group: first | last << 8. The last one finishes it, the others leave a sum in their area.
  const float per_unit = total ? ptx::reciprocal(static_cast<float>(total)) : 0;
  auto owner = [&](int unit) { return static_cast<int>(((unit + 1) * kWarps - 0.5f) * per_unit); };
  uint16_t* owners = reinterpret_cast<uint16_t*>(memory + plan.owners);
#pragma unroll 1
  for (int g = threadIdx.x; g < row_blocks * kGroups; g += kThreads)
    owners[g] = static_cast<uint16_t>(owner(g * units_k) | owner((g + 1) * units_k - 1) << 8);

  const PatchPlane<kTilesPerWarp> plane{shared + warp * plan.area, lane};
  if (Weights::kHasEscapes) plane.fill();
  __syncthreads();

  float* finished = reinterpret_cast<float*>(memory + plan.finished);
  float sums[kTilesPerWarp][kColumnTiles][4] = {};
  int group = first_group, k = begin - first_group * units_k;
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
  if (bulk_x) ptx::barrier_wait(x_barrier, 0);
  if (begin == end) store_sums(own_sums);  // zeros: there are fewer units than warps
#pragma unroll 1
  for (int left = end - begin; left > 0; left -= kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i >= left) break;
      const uint2 e = entries[i];
      const bool more = to_load > 0;
      const int first_tile = group % kGroups * kTilesPerWarp;
      uint32_t count = 0, overflow = 0;
      if (Weights::kHasEscapes) {
        count = __shfl_sync(~0u, e.x, 0) >> 24;
        overflow = __shfl_sync(~0u, e.y, 0);
        if (more) load_entries(entries[i]);
        plane.template scatter<false>(e, count, first_tile);
        if (overflow)
          scatter_overflow(w.overflow, w.overflow_length, overflow - 1, static_cast<uint32_t>(block_index(group, k)),
                           plane.base, first_tile * kTileElements, plane.kPositions);
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
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            uint32_t a[4];
            Weights::decode(a, tiles[slot], plane.base + t * Weights::kPlaneBytes + lane * 16, j);
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
          plane.template scatter<true>(e, count, first_tile);
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

  // Sum over the warps that share a row group, in the order of k, four rows a thread.
  const int per_rank = row_blocks * plan.chunks << plan.log_n;  // float4
  float* received = reinterpret_cast<float*>(memory + plan.received);
  auto add = [](float4& sum, const float* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  };

  auto write = [&](int row_block, int n, int row, float4 sum) {
    const uint32_t shifts = *reinterpret_cast<const uint32_t*>(memory + plan.shift + row_block * kBlock + row);
    store_rows(args.epilogue, w.m, n, (cluster + row_block * plan.clusters) * kBlock + row, sum, shifts);
  };
  if (ranks > 1) ptx::cluster_wait();  // the others have started
#pragma unroll 1
  for (int o = threadIdx.x; o < row_blocks << (plan.log_n + 4); o += kThreads) {
    const int row = (o & 15) * 4, n = (o >> 4) & ((1 << plan.log_n) - 1), row_block = o >> (4 + plan.log_n);
    if (n >= args.n) continue;
    float4 sum = make_float4(0, 0, 0, 0);
    if (total) {
      const int group = row_block * kGroups + row / kGroupRows, at = n * kPitch + row % kGroupRows;
      const int first = owners[group] & 255, last = owners[group] >> 8;
#pragma unroll 2
      for (int i = first; i < last; ++i) add(sum, reinterpret_cast<const float*>(memory + i * plan.area) + at);
      add(sum, finished + (group << plan.log_n) * kPitch + at);
    }
    if (ranks == 1) {
      write(row_block, n, row, sum);
    } else {
      const int chunk = row / 4, which = chunk * plan.magic >> 16;
      const int slot = ((row_block * plan.chunks + which) << plan.log_n) + n;
      ptx::store_cluster(shared + plan.received + (rank * per_rank + slot) * 16, sums_barrier, chunk - which * ranks, sum);
    }
  }
  if (ranks == 1) return;
  ptx::barrier_wait(sums_barrier, 0);
  // Slot o of this rank: column, chunk, row block from the inside out; row blocks are few, so they are counted.
#pragma unroll 1
  for (int o = threadIdx.x; o < per_rank; o += kThreads) {
    const int n = o & ((1 << plan.log_n) - 1);
    int row_block = 0, which = o >> plan.log_n;
    for (; which >= plan.chunks; which -= plan.chunks) ++row_block;
    const int row = (which * ranks + rank) * 4;
    if (n >= args.n || row >= kBlock) continue;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 2
    for (int i = 0; i < ranks; ++i) add(sum, received + (i * per_rank + o) * 4);
    write(row_block, n, row, sum);
  }
}

}  // namespace jaxzip::lane_planar
