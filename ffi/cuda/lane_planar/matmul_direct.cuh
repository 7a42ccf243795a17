// Small-N matmul: weights go straight from global memory to registers, x waits in shared memory, mma.sync multiplies.
//
// A cluster owns row blocks; its CTAs split K. A CTA's work, (row group, k block) in this order, is cut into one contiguous
// range a warp, so that every warp streams the same number of bytes and none waits before the end. A warp leaves one
// partial sum a row group that it touched; they are added in the order of k: over warps in shared memory, then over
// CTAs through distributed shared memory. No atomics, no workspace, the same bits in every run.
#pragma once
#include <cuda_bf16.h>

#include "weights.cuh"

namespace jaxzip::lane_planar {

// Work split and shared memory (bytes from its start) of one launch, computed on the host.
struct DirectPlan {
  int log_cluster;  // CTAs that share a row block, each with its part of K
  int clusters;
  int row_blocks;  // of the clusters with most
  int k_blocks;    // of a rank; the last may have fewer
  int log_n;       // of the columns in the buffers of sums
  int x_pitch;     // 16 bytes over a multiple of 128: eight rows start in eight different bank groups
  int barrier, shift, x, partial, received, bytes;
};

struct DirectArgs {
  Matrix w;
  const __nv_bfloat16* x;  // [n][k]
  void* y;                 // [n][m], bf16 or fp32
  int n;
  bool fp32_out;
  DirectPlan plan;
};

constexpr int kSumPad = 4;  // floats after a column of sums: a warp's stores then fall into different banks

template <class Weights>
DirectPlan plan_direct(const Matrix& w, int n, int tiles_per_warp, int warps, int log_cluster, int clusters) {
  DirectPlan p = {};
  p.log_cluster = log_cluster;
  p.clusters = clusters;
  p.row_blocks = (w.m_blocks() + clusters - 1) / clusters;
  p.k_blocks = (w.k_blocks() + (1 << log_cluster) - 1) >> log_cluster;
  while (1 << p.log_n < n) ++p.log_n;
  p.x_pitch = p.k_blocks * kBlock * 2 + 16;
  const int groups = p.row_blocks * (kTiles / tiles_per_warp);
  p.barrier = warps * tiles_per_warp * Weights::kPlaneBytes;
  p.shift = p.barrier + 16;
  p.x = p.shift + p.row_blocks * kBlock;
  p.partial = p.x + n * p.x_pitch;
  p.received = p.partial + (((warps + groups - 1) * (tiles_per_warp * kTileRows + kSumPad)) << p.log_n) * 4;
  p.bytes = p.received + (log_cluster ? (p.row_blocks * kBlock << p.log_n) * 4 : 0);
  return p;
}

template <class Weights, int kTilesPerWarp, int kColumnTiles, int kWarps, int kCtasPerSm>
__global__ void __launch_bounds__(kWarps * 32, kCtasPerSm) matmul_direct(const __grid_constant__ DirectArgs args) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kGroups = kTiles / kTilesPerWarp;  // row groups of a row block: a unit of work is one of them x 64 k
  constexpr int kAhead = kGroups;                  // units in flight: always four tiles a warp
  constexpr int kGroupRows = kTilesPerWarp * kTileRows, kPitch = kGroupRows + kSumPad;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Matrix& w = args.w;
  const DirectPlan& plan = args.plan;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int ranks = 1 << plan.log_cluster, rank = blockIdx.x & (ranks - 1);
  const int cluster = static_cast<int>(blockIdx.x) >> plan.log_cluster;

  const int all_k_blocks = w.k_blocks();
  const int k_begin = min(rank * plan.k_blocks, all_k_blocks);
  const int units_k = min(plan.k_blocks, all_k_blocks - k_begin);
  const bool short_one = cluster + (plan.row_blocks - 1) * plan.clusters >= w.m_blocks();
  const int row_blocks = plan.row_blocks - short_one;
  const int total = row_blocks * kGroups * units_k;
  auto range_begin = [&](int i) { return total * i / kWarps; };
  const int begin = range_begin(warp), end = range_begin(warp + 1);

  // Exact for fewer than 2^21 units.
  const int first_group = units_k ? static_cast<int>((begin + 0.5f) * __frcp_rn(static_cast<float>(units_k))) : 0;
  auto block_index = [&](int group, int k) {
    return static_cast<size_t>(cluster + group / kGroups * plan.clusters) * all_k_blocks + k_begin + k;
  };

  // The cursor of loads runs kAhead units before that of the arithmetic.
  uint32_t tiles[kTiles][Weights::kRegisters];
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

  if (threadIdx.x == 0) ptx::barrier_init(shared + plan.barrier, 1);
  const int x_columns = max(0, min(plan.k_blocks * kBlock, w.k - k_begin * kBlock));
  const bool bulk_x = w.k % 8 == 0 && (reinterpret_cast<uintptr_t>(args.x) & 15) == 0;
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
  ptx::launch_dependents();
  ptx::wait_for_previous_grid();
  const __nv_bfloat16* x = args.x + static_cast<size_t>(k_begin) * kBlock;
  if (bulk_x) {
    if (warp == 0) {
      if (lane == 0) ptx::barrier_expect(shared + plan.barrier, args.n * x_columns * 2);
      __syncwarp();
      for (int n = lane; n < args.n && x_columns; n += 32)
        ptx::bulk_copy(shared + plan.x + n * plan.x_pitch, x + static_cast<size_t>(n) * w.k, x_columns * 2,
                       shared + plan.barrier);
    }
  } else {
    for (int n = 0; n < args.n; ++n)
      for (int i = threadIdx.x; i < x_columns; i += kThreads)
        reinterpret_cast<__nv_bfloat16*>(memory + plan.x + n * plan.x_pitch)[i] = x[static_cast<size_t>(n) * w.k + i];
  }
  // The last columns of a ragged K: weights there are finite padding, x must be zero.
  for (int i = x_columns + threadIdx.x; i < units_k * kBlock; i += kThreads)
    for (int n = 0; n < args.n; ++n)
      reinterpret_cast<uint16_t*>(memory + plan.x + n * plan.x_pitch)[i] = 0;
  for (int i = threadIdx.x; i < row_blocks * 4; i += kThreads)
    ptx::async_copy_16(shared + plan.shift + i * 16,
                       w.shift + (cluster + static_cast<size_t>(i >> 2) * plan.clusters) * kBlock + (i & 3) * 16);
  if (ranks > 1) ptx::cluster_arrive_relaxed();

  const PatchPlane<kTilesPerWarp> plane{shared + warp * kTilesPerWarp * Weights::kPlaneBytes, lane};
  if (Weights::kHasEscapes) plane.fill();
  __syncthreads();
  if (bulk_x) ptx::barrier_wait(shared + plan.barrier, 0);

  float sums[kTilesPerWarp][kColumnTiles][4] = {};
  int group = first_group, k = begin - first_group * units_k;
  const int x_row = lane & 7;
  uint32_t x_address[kColumnTiles];
#pragma unroll
  for (int c = 0; c < kColumnTiles; ++c)  // columns past n repeat the last one and are never stored
    x_address[c] = shared + plan.x + min(8 * c + x_row, args.n - 1) * plan.x_pitch + (lane >> 3) * 16;

  auto store_partial = [&] {
    float* out = reinterpret_cast<float*>(memory + plan.partial) +
                 ((warp + group) << plan.log_n) * kPitch;
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
      uint32_t b[kColumnTiles][2][4];
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        ptx::load_matrices(b[c][0], x_address[c] + k * (kBlock * 2));
        ptx::load_matrices(b[c][1], x_address[c] + k * (kBlock * 2) + 64);
      }
#pragma unroll
      for (int t = 0; t < kTilesPerWarp; ++t) {
        const int slot = i * kTilesPerWarp + t;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t a[4];
          Weights::decode(a, tiles[slot], plane.base + t * Weights::kPlaneBytes + lane * 16, j);
#pragma unroll
          for (int c = 0; c < kColumnTiles; ++c)
            ptx::mma(sums[t][c], a, b[c][j >> 1][2 * (j & 1)], b[c][j >> 1][2 * (j & 1) + 1]);
        }
        if (more) load_tile(slot, t);
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
      if (++k == units_k) {
        store_partial();
        k = 0;
        ++group;
      }
    }
  }
  if (k > 0 && end > begin) store_partial();
  ptx::async_copy_wait();
  __syncthreads();

  // Sum over the warps that touched a row group, in the order of k.
  const int shift_rows = 6 - plan.log_cluster;  // of a row block's 64 rows each rank owns 2^shift_rows
  const float* partial = reinterpret_cast<const float*>(memory + plan.partial);
  float* received = reinterpret_cast<float*>(memory + plan.received);
  const int per_rank = row_blocks << (plan.log_n + shift_rows);
  auto write = [&](int row_block, int n, int row, float sum) {
    const int logical = (cluster + row_block * plan.clusters) * kBlock + row;
    if (logical >= w.m) return;
    const int shift = reinterpret_cast<const int8_t*>(memory + plan.shift)[row_block * kBlock + row];
    const float value = sum * __int_as_float((127 - shift) << 23);
    const size_t at = static_cast<size_t>(n) * w.m + logical;
    if (args.fp32_out)
      static_cast<float*>(args.y)[at] = value;
    else
      static_cast<__nv_bfloat16*>(args.y)[at] = __float2bfloat16(value);
  };
  const float per_unit = total ? __frcp_rn(static_cast<float>(total)) : 0;
  auto owner = [&](int unit) { return static_cast<int>(((unit + 1) * kWarps - 0.5f) * per_unit); };
  if (ranks > 1) ptx::cluster_wait();
  for (int o = threadIdx.x; o < row_blocks << (plan.log_n + 6); o += kThreads) {
    const int row = o & (kBlock - 1), n = (o >> 6) & ((1 << plan.log_n) - 1), row_block = o >> (6 + plan.log_n);
    const int g = row_block * kGroups + row / kGroupRows;
    if (n >= args.n) continue;
    float sum = 0;
    if (total) {
      const int last = owner((g + 1) * units_k - 1);
      for (int i = owner(g * units_k); i <= last; ++i)
        if (range_begin(i) < range_begin(i + 1))
          sum += partial[(((i + g) << plan.log_n) + n) * kPitch + row % kGroupRows];
    }
    if (ranks == 1) {
      write(row_block, n, row, sum);
    } else {
      const int slot = (((row_block << plan.log_n) + n) << shift_rows) | (row & ((1 << shift_rows) - 1));
      ptx::store_cluster(ptx::shared_address(received + rank * per_rank + slot), row >> shift_rows, sum);
    }
  }
  if (ranks == 1) return;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int o = threadIdx.x; o < per_rank; o += kThreads) {
    float sum = 0;
    for (int i = 0; i < ranks; ++i) sum += received[i * per_rank + o];
    const int n = (o >> shift_rows) & ((1 << plan.log_n) - 1), row_block = o >> (shift_rows + plan.log_n);
    if (n < args.n) write(row_block, n, rank << shift_rows | (o & ((1 << shift_rows) - 1)), sum);
  }
}

}  // namespace jaxzip::lane_planar
