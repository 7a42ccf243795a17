// Grouped matmul: as the small-N matmul, weights go straight from global memory to registers and mma.sync multiplies.
//
// A work item is a row group (32 or 64 rows) of an expert that has rows of x, times some 8 to 32 of those. How many items
// there are is known on the device only, so the grid is as large as the GPU, a CTA an SM: each sums up the group sizes, and its
// teams of warps take every so many-th item (items go to all SMs before an SM gets a second one). A team's warps split K, the
// same way for every item, and stream their blocks of one item after the other without a pause; at an item's end
// their sums are added in the order of K. No atomics, no workspace, and a result's bits depend on nothing but its row, its
// expert and the size of a team.
//
// x is read anew for every item, a block's 64 columns at a time and as far ahead as the weights: few rows, mostly from L2.
#pragma once
#include <cuda_bf16.h>

#include "epilogue.cuh"
#include "matmul_ragged.h"
#include "weights.cuh"

namespace jaxzip::lane_planar {

constexpr int kRaggedSumPad = 4;  // floats after a column of sums: a warp's stores then fall into different banks

// Places in shared memory, bytes from its start.
struct RaggedPlan {
  int items, rows;  // tables: of each expert, and of the end, the first work item and the first row of x
  int planes, x, sums, bytes;
};

struct RaggedArgs {
  Matrix w;  // expert 0
  Groups groups;
  int experts;
  int row_groups;  // of an expert
  RaggedPlan plan;
  Epilogue epilogue;
};

template <class Weights, int kTilesPerWarp, int kColumnTiles>
struct RaggedShape {
  static constexpr int kRowGroups = kTiles / kTilesPerWarp;  // of a row block
  static constexpr int kGroupRows = kTilesPerWarp * kTileRows, kPitch = kGroupRows + kRaggedSumPad;
  static constexpr int kColumns = 8 * kColumnTiles;
  static constexpr int kInFlight = 4;  // tiles that a warp has on their way
  static constexpr int kAhead = kInFlight / kTilesPerWarp;
  static constexpr int kPlaneBytes = kTilesPerWarp * Weights::kPlaneBytes;
  static constexpr int kXBytes = kColumns * kBlock * 2;    // of a warp's slice of x
  static constexpr int kSumBytes = kColumns * kPitch * 4;    // of a warp's sums of an item

  static RaggedPlan plan(int experts, int warps) {
    RaggedPlan p = {};
    const int table = ((experts + 1) * 4 + 127) / 128 * 128;
    p.items = 0;
    p.rows = table;
    p.planes = 2 * table;
    p.x = p.planes + warps * kPlaneBytes;
    p.sums = p.x + warps * kAhead * kXBytes;
    p.bytes = p.sums + warps * kSumBytes;
    return p;
  }
};

template <class Weights, int kTilesPerWarp, int kColumnTiles, int kWarps, int kTeams>
__global__ void __launch_bounds__(kTeams * kWarps * 32, 1) matmul_ragged(const __grid_constant__ RaggedArgs args) {
  using Shape = RaggedShape<Weights, kTilesPerWarp, kColumnTiles>;
  constexpr int kTeamThreads = kWarps * 32, kThreads = kTeams * kTeamThreads;
  constexpr int kAhead = Shape::kAhead, kColumns = Shape::kColumns;
  constexpr int kGroupRows = Shape::kGroupRows, kPitch = Shape::kPitch, kRowGroups = Shape::kRowGroups;
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Matrix& w = args.w;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int team = warp / kWarps, part = warp % kWarps, team_thread = threadIdx.x - team * kTeamThreads;
  const int all_k_blocks = w.k_blocks();
  const int k_begin = all_k_blocks * part / kWarps, units = all_k_blocks * (part + 1) / kWarps - k_begin;

  // The tables. Sizes that do not fit are cut off, so that nothing past x and y is touched.
  int* const first_item = reinterpret_cast<int*>(memory);
  int* const first_row = reinterpret_cast<int*>(memory + args.plan.rows);
#pragma unroll 1
  for (int e = threadIdx.x; e < args.experts; e += kThreads) first_row[e] = min(max(args.groups.sizes[e], 0), args.groups.n);
  const PatchPlane<kTilesPerWarp> plane{shared + args.plan.planes + warp * Shape::kPlaneBytes, lane};
  if (Weights::kHasEscapes) plane.fill();
  __syncthreads();
  if (warp == 0) {
    const int share = (args.experts + 31) / 32, begin = min(lane * share, args.experts), end = min(begin + share, args.experts);
    int rows = 0;
#pragma unroll 1
    for (int e = begin; e < end; ++e) rows += first_row[e];
    const int own_rows = rows;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, rows, step);
      if (lane >= step) rows += before;
    }
    rows -= own_rows;
    int items = 0;
#pragma unroll 1
    for (int e = begin; e < end; ++e) {
      const int row = min(rows, args.groups.n);
      rows += first_row[e];
      first_row[e] = row;
      first_item[e] = items;
      items += (min(rows, args.groups.n) - row + kColumns - 1) / kColumns * args.row_groups;
    }
    int items_before = items;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, items_before, step);
      if (lane >= step) items_before += before;
    }
    const int all_items = __shfl_sync(~0u, items_before, 31), all_rows = __shfl_sync(~0u, rows, 31);
    items_before -= items;
#pragma unroll 1
    for (int e = begin; e < end; ++e) first_item[e] += items_before;
    if (lane == 0) {
      first_item[args.experts] = all_items;
      first_row[args.experts] = min(all_rows, args.groups.n);
    }
  }
  __syncthreads();

  struct Item {
    int expert, group, row, columns;
  };
  // By a whole warp: a vote finds the 32 experts that the item's is one of, another the expert.
  auto locate = [&](int item) {
    const int chunk = __popc(__ballot_sync(~0u, first_item[min(lane * 32, args.experts)] <= item)) - 1;
    const int expert = chunk * 32 + __popc(__ballot_sync(~0u, first_item[min(chunk * 32 + lane, args.experts)] <= item)) - 1;
    const int rest = item - first_item[expert], row = first_row[expert], rows = first_row[expert + 1] - row;
    const int tiles = (rows + kColumns - 1) / kColumns, group = tiles == 1 ? rest : rest / tiles, tile = rest - group * tiles;
    return Item{expert, group, row + tile * kColumns, min(kColumns, rows - tile * kColumns)};
  };
  auto block_index = [&](const Item& item) {  // of the expert; the warp's first
    return static_cast<uint32_t>(item.group / kRowGroups * all_k_blocks + k_begin);
  };
  const uint32_t expert_blocks = w.m_blocks() * all_k_blocks;
  const int all_items = first_item[args.experts], own_item = team * gridDim.x + blockIdx.x, stride = kTeams * gridDim.x;
  const int items = own_item < all_items ? (all_items - 1 - own_item) / stride + 1 : 0;

  // The cursor of loads runs kAhead units before that of the arithmetic.
  uint32_t tiles[kAhead * kTilesPerWarp][Weights::kRegisters];
  uint2 entries[kAhead];
  const uint32_t* load_block = nullptr;
  const __nv_bfloat16* load_x_from = nullptr;
  int load_item = own_item, load_k = 0, load_tile_first = 0, load_columns = 0, to_load = items * units;
  const uint32_t x_slots = shared + args.plan.x + warp * (kAhead * Shape::kXBytes);
  auto begin_load = [&] {
    const Item item = locate(load_item);
    load_block = w.blocks + (static_cast<uint64_t>(item.expert) * expert_blocks + block_index(item)) * static_cast<uint32_t>(w.block_words);
    load_tile_first = kRowGroups == 1 ? 0 : item.group % kRowGroups * kTilesPerWarp;
    load_x_from = args.groups.x + static_cast<size_t>(item.row + (lane >> 3)) * args.groups.pitch + (lane & 7) * 8 + k_begin * kBlock;
    load_columns = item.columns;
  };
  auto load_entries = [&](uint2& e) {
    if (Weights::kHasEscapes && 2 * lane < w.block_words - kHeaderStart) {
      uint32_t v[2];
      ptx::load_stream<2>(v, load_block + kHeaderStart + 2 * lane);
      e = make_uint2(v[0], v[1]);
    }
  };
  auto load_tile = [&](int slot, int tile) { Weights::load(tiles[slot], load_block, load_tile_first + tile, lane); };
  // 16 bytes a lane, four rows at a time; past the last column there are zeros.
  auto load_x = [&](int slot) {
    const bool inside = (k_begin + load_k) * kBlock + (lane & 7) * 8 < args.groups.pitch;
#pragma unroll
    for (int i = 0; i < 2 * kColumnTiles; ++i) {
      const int row = 4 * i + (lane >> 3);
      if (row < load_columns)
        ptx::async_copy_16_or_zero(x_slots + slot * Shape::kXBytes + row * (kBlock * 2) + ((lane & 7) ^ (row & 7)) * 16,
                                   inside ? load_x_from + static_cast<size_t>(4 * i) * args.groups.pitch : args.groups.x, inside);
    }
  };
  auto advance_load = [&] {
    --to_load;
    load_block += w.block_words;
    load_x_from += kBlock;
    if (++load_k == units) {
      load_k = 0;
      load_item += stride;
      if (to_load > 0) begin_load();
    }
  };

  if (to_load > 0) begin_load();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    entries[i] = make_uint2(0, 0);
    if (to_load > 0) {
      load_entries(entries[i]);
      load_x(i);
#pragma unroll
      for (int t = 0; t < kTilesPerWarp; ++t) load_tile(i * kTilesPerWarp + t, t);
      advance_load();
    }
    ptx::async_copy_commit();
  }

  float sums[kTilesPerWarp][kColumnTiles][4] = {};
  int item_index = own_item, k = 0;
  Item item = {};
  uint32_t block = 0, shifts = 0;
  const bool fours = in_fours(args.epilogue, w.m);
  uint32_t x_address[kColumnTiles], x_swizzle[kColumnTiles];
  constexpr int kChunks = kGroupRows / 4;  // of four rows, a thread each when sums are added
  auto begin_item = [&] {
    item = locate(item_index);
    block = block_index(item);
    shifts = __ldg(reinterpret_cast<const uint32_t*>(w.shift + (static_cast<size_t>(item.expert) * w.m_blocks() * kBlock +
                                                                item.group * kGroupRows)) + team_thread % kChunks);
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) {  // columns past the last one repeat it and are never stored
      const int row = min(8 * c + (lane & 7), item.columns - 1);
      x_address[c] = x_slots + row * (kBlock * 2);
      x_swizzle[c] = row & 7;
    }
  };
  auto finish_item = [&] {
    ptx::sync_threads(team + 1, kTeamThreads);  // the sums of the item before have been read
    float* out = reinterpret_cast<float*>(memory + args.plan.sums + warp * Shape::kSumBytes);
#pragma unroll
    for (int t = 0; t < kTilesPerWarp; ++t)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = 8 * c + 2 * (lane & 3) + (i & 1);
          if (n < item.columns) out[n * kPitch + t * kTileRows + (lane >> 2) + 8 * (i >> 1)] = sums[t][c][i];
          sums[t][c][i] = 0;
        }
    ptx::sync_threads(team + 1, kTeamThreads);
#pragma unroll 1
    for (int o = team_thread; o < kChunks * item.columns; o += kTeamThreads) {
      const int chunk = o % kChunks, n = o / kChunks;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const float4 v = *reinterpret_cast<const float4*>(memory + args.plan.sums + (team * kWarps + i) * Shape::kSumBytes +
                                                          (n * kPitch + chunk * 4) * 4);
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
      }
      store_rows(args.epilogue, w.m, fours, item.row + n, FourRows(args.epilogue, w.m, item.group * kGroupRows + chunk * 4, shifts), sum);
    }
    item_index += stride;
  };

  // A warp without blocks of its own adds its zeros all the same.
  const int steps = max(units, 1);
#pragma unroll 1
  for (int left = items * steps; left > 0; left -= kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i >= left) break;
      if (k == 0) begin_item();
      ptx::async_copy_wait_but<kAhead - 1>();
      __syncwarp();
      if (units) {
        const uint2 e = entries[i];
        const bool more = to_load > 0;
        const int first_tile = kRowGroups == 1 ? 0 : item.group % kRowGroups * kTilesPerWarp;
        uint32_t ends = 0, overflow = 0;
        if (Weights::kHasEscapes) {
          ends = __shfl_sync(~0u, e.x, 0);
          overflow = __shfl_sync(~0u, e.y, 0);
          if (more) load_entries(entries[i]);
          plane.template scatter<false>(e, ends, first_tile);
          if (overflow)
            scatter_overflow(w.overflow + static_cast<size_t>(item.expert) * w.overflow_length, w.overflow_length, overflow - 1,
                             block + k, plane.base, first_tile * kTileElements, plane.kPositions);
          __syncwarp();
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t b[kColumnTiles][4];  // two k-steps
#pragma unroll
          for (int c = 0; c < kColumnTiles; ++c)
            if (c == 0 || 8 * c < item.columns)
              ptx::load_matrices(b[c], x_address[c] + i * Shape::kXBytes + (((4 * half + (lane >> 3)) ^ x_swizzle[c]) * 16));
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
              for (int c = 0; c < kColumnTiles; ++c)
                if (c == 0 || 8 * c < item.columns) ptx::mma(sums[t][c], a, b[c][2 * (j & 1)], b[c][2 * (j & 1) + 1]);
            }
            if (half && more) load_tile(slot, t);
          }
        }
        __syncwarp();  // planes and x have been read
        if (more) {
          load_x(i);
          advance_load();
        }
        if (Weights::kHasEscapes) {
          if (overflow)
            plane.fill();
          else
            plane.template scatter<true>(e, ends, first_tile);
          __syncwarp();
        }
      }
      ptx::async_copy_commit();
      if (++k == steps) {
        finish_item();
        k = 0;
      }
    }
  }

  // Rows of no expert.
  const size_t from = static_cast<size_t>(first_row[args.experts]) * w.m, to = static_cast<size_t>(args.groups.n) * w.m;
#pragma unroll 1
  for (size_t i = from + blockIdx.x * kThreads + threadIdx.x; i < to; i += static_cast<size_t>(gridDim.x) * kThreads) {
    if (args.epilogue.fp32_out)
      static_cast<float*>(args.epilogue.y)[i] = 0;
    else
      static_cast<uint16_t*>(args.epilogue.y)[i] = 0;
  }
}

}  // namespace jaxzip::lane_planar
