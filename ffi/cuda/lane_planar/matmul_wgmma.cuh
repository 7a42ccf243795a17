// Matmul on Hopper's wgmma for n = 8..256: weights are decoded in registers and multiply x in shared memory.
//
// A cluster owns row blocks; its CTAs (ranks) split K. Inside a CTA the warp groups form teams: a team works on one row block at a
// time, and its `k_groups` warp groups take the chunks of 64 k in turn. Their partial sums go to the ranks that own them through
// distributed shared memory and are added there in a fixed order: ranks, in them warp groups. No atomics, no workspace, the same
// bits in every run.
//
// Encoded blocks and chunks of x come through a ring of slots, which one more warp fills by bulk and tensor copies.
#pragma once
#include "epilogue.cuh"
#include "weights.cuh"
#include "wgmma_units.cuh"
#include "wgmma_x.cuh"

namespace jaxzip::lane_planar {

// Registers of a thread that multiplies, and of one that fills slots. Together they take no more than the CTA has at its start: 96 or
// 168 for each thread.
template <int kGroups>
struct Registers;
template <>
struct Registers<4> {
  static constexpr int kMultiply = 112, kFill = 32;
};
template <>
struct Registers<2> {
  static constexpr int kMultiply = 224, kFill = 40;
};

// Four lanes that differ in bits 2 and 3 hold two columns of rows r and r + 8; each gets four consecutive rows of one column.
__device__ __forceinline__ float4 transpose_rows(float4 v, int lane) {
  const bool odd = lane & 4, upper = lane & 8;
  float s = __shfl_xor_sync(~0u, odd ? v.x : v.y, 4), t = __shfl_xor_sync(~0u, odd ? v.z : v.w, 4);
  if (odd) v.x = s, v.z = t; else v.y = s, v.w = t;
  s = __shfl_xor_sync(~0u, upper ? v.x : v.z, 8), t = __shfl_xor_sync(~0u, upper ? v.y : v.w, 8);
  if (upper) v.x = s, v.y = t; else v.z = s, v.w = t;
  return v;
}

// What all warps of a CTA know of their work.
struct WgmmaWork {
  int rank, cluster, k_begin, chunks, row_blocks, slots_per_pass, passes;  // row_blocks of a gated product are pairs
  uint32_t shared, barriers, block_bytes, x_bytes;  // x_bytes of a slot

  __device__ __forceinline__ WgmmaWork(const WgmmaArgs& args, uint32_t shared, int chunk_bytes)
      : rank(ptx::cluster_rank()), cluster(ptx::cluster_index()), shared(shared) {
    const WgmmaPlan& plan = args.plan;
    k_begin = rank * plan.chunks + min(rank, plan.k_longer);
    chunks = plan.chunks + (rank < plan.k_longer);  // at least k_groups
    row_blocks = plan.row_blocks - (cluster + (plan.row_blocks - 1) * plan.clusters >= (args.w.m_blocks() >> plan.gated));
    slots_per_pass = (chunks + plan.k_groups - 1) >> plan.log_k_groups;
    passes = (row_blocks + plan.teams - 1) >> plan.log_teams << plan.gated;
    barriers = shared + plan.barriers;
    block_bytes = args.w.block_words * 4;
    x_bytes = plan.k_groups * chunk_bytes;
  }
  __device__ __forceinline__ int row_block_of(const WgmmaPlan& plan, int team, int pass) const {
    return cluster + (team + (pass >> plan.gated) * plan.teams) * plan.clusters + (pass & plan.gated ? plan.half : 0);
  }
  __device__ __forceinline__ int passes_of(const WgmmaPlan& plan, int team) const {
    return (row_blocks - team + plan.teams - 1) >> plan.log_teams << plan.gated;
  }
};

// The part of the warp that fills the slots.
template <int kN, int kGroups>
__device__ __forceinline__ void fill_slots(const WgmmaArgs& args, const WgmmaWork& work, int lane) {
  const WgmmaPlan& plan = args.plan;
  // Lanes 0 .. kGroups - 1 ask for the block of a warp group each.
  const int team = lane >> plan.log_k_groups, k_group = lane & (plan.k_groups - 1);
  const int own_passes = lane < kGroups ? work.passes_of(plan, team) : 0;
  const int own_slots = (work.chunks - k_group + plan.k_groups - 1) >> plan.log_k_groups;  // of a pass; the last slot may have none
  const int total = work.passes * work.slots_per_pass;
  const bool plain_x = args.x_load == XLoad::kPlain;

  struct Cursor {
    int pass = 0, slot = 0;
  };
  const auto advance = [&](Cursor& c) {
    if (++c.slot == work.slots_per_pass) {
      c.slot = 0;
      ++c.pass;
    }
  };
  const auto copy_blocks = [&](const Cursor& c, int at) {
    const uint32_t full = work.barriers + at * kSlotBarriers + kFull;
    const bool exists = c.pass < own_passes && c.slot < own_slots;
    const int blocks = __popc(__ballot_sync(~0u, exists));
    if (lane == 0) ptx::barrier_expect(full, blocks * work.block_bytes + (plain_x ? 0 : work.x_bytes));
    __syncwarp();
    if (exists) {
      const int row_block = work.row_block_of(plan, team, c.pass);
      const int block = row_block * args.w.k_blocks() + work.k_begin + k_group + c.slot * plan.k_groups;
      ptx::bulk_copy(work.shared + plan.blocks + (at * kGroups + lane) * work.block_bytes,
                     args.w.blocks + static_cast<size_t>(block) * args.w.block_words, work.block_bytes, full);
    }
  };
  const auto bring_x = [&](const Cursor& c, int at) {
    const uint32_t to = work.shared + at * work.x_bytes;
    const int first = work.k_begin + c.slot * plan.k_groups;
    if (plain_x)
      load_plain_x<kN>(args, to, first, plan.k_groups, lane);
    else if (lane == 0)
      copy_x<kN>(args, to, work.barriers + at * kSlotBarriers + kFull, first, plan.k_groups);
  };

  // More bytes than memory needs to be busy only make queues in which the kernel before waits for its last ones.
  const int first = min(total, plan.slots), early = min(first, plan.early);
  Cursor c;
  if (args.overlap && !plain_x) {
#pragma unroll 1
    for (int i = 0; i < early; ++i, advance(c)) copy_blocks(c, i);
    ptx::wait_for_previous_grid();
    Cursor x;
#pragma unroll 1
    for (int i = 0; i < first; ++i, advance(x)) bring_x(x, i);
#pragma unroll 1
    for (int i = early; i < first; ++i, advance(c)) copy_blocks(c, i);
  } else {
    ptx::wait_for_previous_grid();
#pragma unroll 1
    for (int i = 0; i < first; ++i, advance(c)) {
      bring_x(c, i);
      copy_blocks(c, i);
    }
  }
  int at = 0, phase = 0;
#pragma unroll 1
  for (int i = first; i < total; ++i, advance(c)) {
    ptx::barrier_wait(work.barriers + at * kSlotBarriers + kEmpty, phase);
    bring_x(c, at);
    copy_blocks(c, at);
    if (++at == plan.slots) {
      at = 0;
      phase ^= 1;
    }
  }
}

// The part of a warp that multiplies.
template <class Weights, int kN>
__device__ __forceinline__ void multiply(const WgmmaArgs& args, const WgmmaWork& work, uint8_t* memory, int warp, int lane) {
  constexpr int kChunkBytes = chunk_bytes(kN), kColumnGroups = kN / 8;
  const Matrix& w = args.w;
  const WgmmaPlan& plan = args.plan;
  const int tile = warp & 3, group = warp >> 2;
  const int k_groups = plan.k_groups, team = group >> plan.log_k_groups, k_group = group & (k_groups - 1);
  const int ranks = plan.cluster, rank = work.rank;
  const int own_passes = work.passes_of(plan, team);
  const int own_slots = (work.chunks - k_group + k_groups - 1) >> plan.log_k_groups;
  const uint32_t arrived = work.barriers + kArrived + 8 * team, may_send = work.barriers + kMaySend + 8 * team;
  const auto row_block_of = [&](int pass) { return work.row_block_of(plan, team, pass); };
  ptx::wait_for_previous_grid();  // bias and residual

  float sums[kN / 2];
  const int sources = ranks * k_groups;
  const int owned = (plan.items - rank + ranks - 1) / ranks;
  const uint32_t received = work.shared + plan.received + team * plan.received_bytes;
  const bool fours = in_fours(args.epilogue, w.m);
  // The rows of an item that this lane stores, and the item's share.
  const auto rows_of = [&](int item, int row_block) {
    const int row = row_block * kBlock + (item & 3) * kTileRows + ((lane >> 3) & 1) * 8 + (lane >> 4) * 4;
    return FourRows(args.epilogue, w.m, row, __ldg(reinterpret_cast<const uint32_t*>(w.shift + row)));
  };
  const auto write_item = [&](int item, const FourRows& rows, float4 v) {
    const int n = 8 * (item >> 2) + 2 * (lane & 3) + ((lane >> 2) & 1);
    v = transpose_rows(v, lane);
    if (n >= args.n) return;
    if (kN <= kGatedMaxN && args.epilogue.gated)
      store_rows_of_pair(args.epilogue, w.m, n, rows, v);
    else
      store_rows(args.epilogue, w.m, fours, n, rows, v);
  };
  const auto finish = [&](int pass) {
    const int team_warp = warp - team * k_groups * 4;
    if (ranks > 1 && team_warp == 0 && lane == 0) ptx::barrier_expect(arrived, owned * sources * kItemBytes);
    FourRows rows = rows_of(team_warp * ranks + rank, row_block_of(pass));
    ptx::barrier_wait(arrived, pass & 1);
    const float4* from = reinterpret_cast<const float4*>(memory + (received - work.shared)) + lane;
#pragma unroll 1
    for (int i = team_warp; i < owned; i += k_groups * 4) {
      float4 sum = from[i * 32];
#pragma unroll 4
      for (int s = 1; s < sources; ++s) {
        const float4 v = from[(s * plan.owned + i) * 32];
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
      }
      const int item = i * ranks + rank;
      if (i != team_warp) rows = rows_of(item, row_block_of(pass));
      write_item(item, rows, sum);
    }
    if (pass + 1 < own_passes) {  // there is a next send, which waits for this
      __syncwarp();
      if (ranks == 1 && lane == 0) ptx::barrier_arrive(may_send);
      if (ranks > 1 && lane < ranks) ptx::barrier_arrive_cluster(may_send, lane);
    }
  };
  bool cluster_started = ranks == 1;
  const auto wait_for_cluster = [&] {  // before anything is sent to others
    if (!cluster_started) ptx::cluster_wait();
    cluster_started = true;
  };
  const auto announce_idle = [&] {
    wait_for_cluster();
    __syncwarp();
    if (ranks == 1 && lane == 0) ptx::barrier_arrive(work.barriers + kIdle);
    if (ranks > 1 && lane < ranks) ptx::barrier_arrive_cluster(work.barriers + kIdle, lane);
  };
  const auto flush = [&](int pass) {
    if (sources == 1) {
      const FourRows rows = rows_of(tile, row_block_of(pass));
      if (fours && !args.epilogue.residual && !args.epilogue.fp32_out && !args.epilogue.gated) {  // as write_item, without branches
        const int first_n = 2 * (lane & 3) + ((lane >> 2) & 1), columns = rows.first < w.m ? args.n : 0;
        __nv_bfloat16* y = static_cast<__nv_bfloat16*>(args.epilogue.y) + static_cast<size_t>(first_n) * w.m + rows.first;
#pragma unroll
        for (int g = 0; g < kColumnGroups; ++g, y += 8 * static_cast<size_t>(w.m)) {
          const float4 v = transpose_rows(make_float4(sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]), lane);
          if (first_n + 8 * g < columns) *reinterpret_cast<uint2*>(y) = rounded(rows.finish(v));
        }
        return;
      }
#pragma unroll
      for (int g = 0; g < kColumnGroups; ++g)
        write_item(4 * g + tile, rows, make_float4(sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]));
      return;
    }
    wait_for_cluster();
    if (pass > 0) ptx::barrier_wait(may_send, (pass - 1) & 1);
    if (plan.sums_in_slots) ptx::barrier_wait(work.barriers + kIdle, 0);
    const uint32_t to = received + ((rank * k_groups + k_group) * plan.owned * 32 + lane) * 16;
    int owner = tile % ranks, at = tile / ranks;
    const int owner_step = 4 % ranks, at_step = 4 / ranks;
#pragma unroll
    for (int g = 0; g < kColumnGroups; ++g) {
      const float4 v = make_float4(sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]);
      if (ranks > 1)  // not an instruction of a CTA that is alone
        ptx::store_cluster(to + at * kItemBytes, arrived, owner, v);
      else
        *reinterpret_cast<float4*>(memory + (to - work.shared) + at * kItemBytes) = v;
      owner += owner_step;
      at += at_step;
      if (owner >= ranks) {
        owner -= ranks;
        ++at;
      }
    }
    if (ranks == 1) {
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(arrived);
    }
    finish(pass);
  };

  const TileWords<Weights> tile_words(tile, lane);
  constexpr uint32_t kPlane = Weights::kPlaneBytes;
  const Patches patches(work.shared + plan.planes + warp * kPlane, work.barriers - kUnusedBytes + 4 * warp, tile, lane);
  if constexpr (Weights::kHasEscapes) {
    patches.fill();
    __syncwarp();
  }
  const uint32_t first_words = work.shared + plan.blocks + group * work.block_bytes;
  const uint32_t first_b = ptx::wgmma_descriptor(work.shared + k_group * kChunkBytes);
  const uint32_t slot_bytes = plan.teams * k_groups * work.block_bytes;
  struct Slot {
    uint32_t index, phase;
  };
  const auto words_of = [&](const Slot& s) { return first_words + s.index * slot_bytes; };
  const auto barriers_of = [&](const Slot& s) { return work.barriers + s.index * kSlotBarriers; };
  const auto following = [&](const Slot& s) {
    const bool wraps = s.index + 1 == plan.slots;
    return Slot{wraps ? 0 : s.index + 1, s.phase ^ wraps};
  };
  const auto wait_full = [&](const Slot& s) { ptx::barrier_wait(barriers_of(s) + kFull, s.phase); };
  Slot slot = {0, 0};
  const auto skip_slot = [&] {
    wait_full(slot);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(barriers_of(slot) + kEmpty);
    slot = following(slot);
  };

#pragma unroll 1
  for (int pass = 0; pass < own_passes; ++pass) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;
    // Where the results' shifts are: otherwise the last step waits for memory.
    if (lane == 0) ptx::prefetch_l2(w.shift + row_block_of(pass) * kBlock);
    int left = own_slots;  // with the running one
    const auto block = [&] { return row_block_of(pass) * w.k_blocks() + work.k_begin + k_group + (own_slots - left) * k_groups; };
    uint32_t a[4][4] = {};
    Patch patch = {};
    wait_full(slot);
    if constexpr (Weights::kHasEscapes) patch = patches.put(words_of(slot), w, block);
#pragma unroll 1
    for (;;) {
      uint32_t words[Weights::kRegisters], high[2][4];
      const uint32_t b = first_b + slot.index * (work.x_bytes >> 4);
      __syncwarp();
      tile_words.read(words, words_of(slot));
      if constexpr (Weights::kHasEscapes) {
#pragma unroll
        for (int v = 0; v < 2; ++v) ptx::load_shared(high[v], patches.plane + lane * 16 + v * (kTileElements / 2));
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
        patches.take_back(patch);
      }
      const uint32_t empty = barriers_of(slot) + kEmpty;
      slot = following(slot);
      if (--left > 0) {
        wait_full(slot);
        if constexpr (Weights::kHasEscapes) {
          __syncwarp();
          patch = patches.put(words_of(slot), w, block);
        }
      }
      ptx::wgmma_wait();
      ptx::wgmma_ready(a);  // its registers are nobody else's before: what is loaded into others' would be multiplied
      if (lane == 0) ptx::barrier_arrive(empty);
      if (left == 0) break;
    }
    ptx::wgmma_done(sums);
    if (own_slots < work.slots_per_pass) skip_slot();
    if (plan.sums_in_slots) announce_idle();
    flush(pass);
  }
#pragma unroll 1
  for (int i = (work.passes - own_passes) * work.slots_per_pass; i > 0; --i) skip_slot();
  if (plan.sums_in_slots && own_passes == 0) announce_idle();
}

template <class Weights, int kN, int kGroups>
__global__ void __launch_bounds__((kGroups + 1) * 128, 1) matmul_wgmma(const __grid_constant__ WgmmaArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const WgmmaPlan& plan = args.plan;
  const WgmmaWork work(args, ptx::shared_address(memory), chunk_bytes(kN));
  // By a reduction, whose result the compiler knows to be the warp's: what follows from it then costs no vector registers.
  const int warp = __reduce_max_sync(~0u, threadIdx.x >> 5), lane = threadIdx.x & 31;
  const int ranks = plan.cluster;
  if (warp == kGroups * 4) {
    if (lane == 0 && args.x_load != XLoad::kPlain) ptx::prefetch_tensor_map(&args.x_map);
    if (lane < plan.slots) {
      const uint32_t barriers = work.barriers + lane * kSlotBarriers;
      ptx::barrier_init_only(barriers + kFull, 1);
      ptx::barrier_init_only(barriers + kEmpty, kGroups * 4);
    }
    if (lane < plan.teams) {
      ptx::barrier_init_only(work.barriers + kArrived + 8 * lane, ranks > 1 ? 1 : plan.k_groups * 4);
      ptx::barrier_init_only(work.barriers + kMaySend + 8 * lane, ranks * plan.k_groups * 4);
    }
    if (lane == 0) ptx::barrier_init_only(work.barriers + kIdle, ranks * kGroups * 4);
    ptx::barrier_init_done();
    __syncwarp();
  }
  ptx::launch_dependents();
  if (ranks > 1) ptx::cluster_arrive_relaxed();
  // The warp that fills made the barriers and need not wait for anybody; its group's others have nothing to do.
  constexpr int kUsers = kGroups * 128 + 32;
  if (warp >= kGroups * 4) {
    if (warp == kGroups * 4) ptx::arrive_threads(1, kUsers);
    ptx::registers_decrease<Registers<kGroups>::kFill>();
    if (warp == kGroups * 4) fill_slots<kN, kGroups>(args, work, lane);
  } else {
    ptx::sync_threads(1, kUsers);
    ptx::registers_increase<Registers<kGroups>::kMultiply>();
    multiply<Weights, kN>(args, work, memory, warp, lane);
  }
}

}  // namespace jaxzip::lane_planar
