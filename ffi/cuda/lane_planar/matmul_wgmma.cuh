// Matmul on Hopper's wgmma for n = 8..256: weights are decoded in registers and multiply x in shared memory.
//
// A cluster owns row blocks; its CTAs (ranks) split K. Inside a CTA the warp groups form teams: a team works on one row block at a
// time, and its `k_groups` warp groups take the chunks of 64 k in turn. Their partial sums go to the ranks that own them through
// distributed shared memory and are added there in a fixed order: ranks, in them warp groups. No atomics, no workspace, the same
// bits in every run. Encoded blocks come by bulk copies into a ring that each warp group has for itself and fills itself, many
// bytes ahead of their use; x comes by tensor copies, in stages that all warp groups of the CTA share.
#pragma once
#include "epilogue.cuh"
#include "weights.cuh"
#include "wgmma_units.cuh"
#include "wgmma_x.cuh"

namespace jaxzip::lane_planar {

// Four lanes that differ in bits 2 and 3 hold two columns of rows r and r + 8; each gets four consecutive rows of one column.
__device__ __forceinline__ float4 transpose_rows(float4 v, int lane) {
  const bool odd = lane & 4, upper = lane & 8;
  float s = __shfl_xor_sync(~0u, odd ? v.x : v.y, 4), t = __shfl_xor_sync(~0u, odd ? v.z : v.w, 4);
  if (odd) v.x = s, v.z = t; else v.y = s, v.w = t;
  s = __shfl_xor_sync(~0u, upper ? v.x : v.z, 8), t = __shfl_xor_sync(~0u, upper ? v.y : v.w, 8);
  if (upper) v.x = s, v.y = t; else v.z = s, v.w = t;
  return v;
}

// `kOverlap`: a unit is decoded while the multiplications of the one before run, with operands of both in registers. That gains 2% up
// to n = 16; above, the registers are worth more (6% at n = 64), and the other warp groups of the SM multiply meanwhile.
template <class Weights, int kN, int kMaxThreads, bool kOverlap>
__global__ void __launch_bounds__(kMaxThreads, 1) matmul_wgmma(const __grid_constant__ WgmmaArgs args) {
  constexpr int kChunkBytes = chunk_bytes(kN);
  constexpr int kColumnGroups = kN / 8;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Matrix& w = args.w;
  const WgmmaPlan& plan = args.plan;
  // By a reduction, whose result the compiler knows to be the warp's: what follows from it then costs no vector registers.
  const int warp = __reduce_max_sync(~0u, threadIdx.x >> 5), lane = threadIdx.x & 31;
  const int tile = warp & 3, group = warp >> 2;
  const int k_groups = plan.k_groups, teams = plan.teams;
  const int team = group * plan.inverse_k_groups >> 16, k_group = group - team * k_groups;
  const int ranks = plan.cluster, rank = ptx::cluster_rank(), cluster = ptx::cluster_index();

  const int all_k_blocks = w.k_blocks();
  const int k_begin = rank * plan.k_blocks + min(rank, plan.k_longer);
  const int chunks = plan.k_blocks + (rank < plan.k_longer);  // at least k_groups
  const int row_blocks = plan.row_blocks - (cluster + (plan.row_blocks - 1) * plan.clusters >= w.m_blocks());
  const int passes = (row_blocks - team + teams - 1) * plan.inverse_teams >> 16;  // row blocks of this team
  const int own_chunks = (chunks - k_group + k_groups - 1) * plan.inverse_k_groups >> 16;
  const int pass_stages = (chunks + plan.stage_chunks - 1) * plan.inverse_stage_chunks >> 16;
  const auto row_block_of = [&](int pass) { return cluster + (team + pass * teams) * plan.clusters; };

  const uint32_t full = shared + plan.barriers, empty = full + kMaxStages * 8;
  const uint32_t arrived = empty + kMaxStages * 8 + team * 8, may_send = arrived + kMaxGroups * 8;
  const uint32_t ring_full = ptx::keep(empty + (kMaxStages + 2 * kMaxGroups + group * kMaxRing) * 8);
  const uint32_t ring_empty = ring_full + kMaxGroups * kMaxRing * 8;
  if (warp == 0) {
    if (lane == 0 && args.x_load != XLoad::kPlain) ptx::prefetch_tensor_map(&args.x_map);
#pragma unroll 1
    for (int i = lane; i < plan.stages; i += 32) {
      ptx::barrier_init_only(full + i * 8, 1);
      ptx::barrier_init_only(empty + i * 8, plan.groups * 4);
    }
    if (lane < teams) {
      ptx::barrier_init_only(empty + (kMaxStages + lane) * 8, ranks > 1 ? 1 : k_groups * 4);
      ptx::barrier_init_only(empty + (kMaxStages + kMaxGroups + lane) * 8, ranks * k_groups * 4);
    }
  }
  if (tile == 0 && lane < plan.ring) {
    ptx::barrier_init_only(ring_full + lane * 8, 1);
    ptx::barrier_init_only(ring_empty + lane * 8, 4);
  }
  if (tile == 0) {
    ptx::barrier_init_done();
    __syncwarp();
  }

  // The first warp of a group copies its blocks. The cursor of copies is `ring` - 1 units (a row block's chunk)
  // ahead of the arithmetic, so that a copy goes where the unit before was; all slots count as left at the start.
  const uint32_t block_bytes = w.block_words * 4;
  const uint32_t ring = ptx::keep(shared + plan.blocks + group * plan.ring * block_bytes);
  int copy_left_in_pass = own_chunks, copy_pass = 0, to_copy = tile == 0 ? passes * own_chunks : 0, copy_slot = 0, copy_phase = 1;
  const auto first_block_of = [&](int pass) { return row_block_of(pass) * all_k_blocks + k_begin + k_group; };
  const auto block_at = [&](int block) { return reinterpret_cast<const char*>(w.blocks + static_cast<size_t>(block) * w.block_words); };
  const char* copy_from = block_at(first_block_of(0));
  const auto copy_block = [&] {
    if (ptx::elect_one()) {
      ptx::barrier_expect(ring_full + copy_slot * 8, block_bytes);
      ptx::bulk_copy(ring + copy_slot * block_bytes, copy_from, block_bytes, ring_full + copy_slot * 8);
    }
    --to_copy;
    if (++copy_slot == plan.ring) {
      copy_slot = 0;
      copy_phase ^= 1;
    }
    copy_from += k_groups * block_bytes;
    if (--copy_left_in_pass == 0) {
      copy_left_in_pass = own_chunks;
      copy_from = block_at(first_block_of(++copy_pass));
    }
  };
  const auto copy_first_blocks = [&] {
#pragma unroll 1
    for (int i = min(to_copy, plan.ring - 1); i > 0; --i) copy_block();
  };
  // Warp 0 fills the stages; team 0 has no fewer passes than the others.
  int fills = warp == 0 ? (plan.resident ? pass_stages : passes * pass_stages) : 0;
  int fill_stage_of_pass = 0, fill_slot = 0, fill_phase = 1;
  const auto fill_next = [&] {
    fill_stage<kN>(args, shared + fill_slot * plan.stage_chunks * kChunkBytes, full + fill_slot * 8, k_begin, chunks, fill_stage_of_pass,
                   lane);
    --fills;
    if (++fill_slot == plan.stages) {
      fill_slot = 0;
      fill_phase ^= 1;
    }
    if (++fill_stage_of_pass == pass_stages) fill_stage_of_pass = 0;
  };
  // x goes first: behind the weights of all SMs it would come microseconds later.
  if (args.overlap) ptx::launch_dependents();
#pragma unroll 1
  for (int step = 0; step < 2; ++step) {
    if ((step == 0) == args.overlap) {
      copy_first_blocks();
    } else {
      ptx::wait_for_previous_grid();
#pragma unroll 1
      for (int i = min(fills, plan.resident ? plan.stages : plan.stages - kRefillLag); i > 0; --i) fill_next();
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < row_blocks; i += blockDim.x)
    ptx::prefetch_l2(w.shift + (cluster + static_cast<size_t>(i) * plan.clusters) * kBlock);
  if (ranks > 1) ptx::cluster_arrive_relaxed();

  Patches patches(shared + plan.planes + warp * Weights::kPlaneBytes, shared + plan.unused + warp * 4, tile, lane);
  if (Weights::kHasEscapes) patches.plane.fill();
  __syncthreads();
  if (ranks > 1) ptx::cluster_wait();  // the others have started

  float sums[kN / 2];
  int pass = 0, slot = 0, phase = 0;
  const int stage_units = plan.stage_chunks / k_groups;
  // The last stage of a pass may have no chunk for this warp group.
  const bool last_stage_empty = k_group >= chunks - (pass_stages - 1) * plan.stage_chunks;

  const auto leave_stage = [&](int which) {
    if (!plan.resident && lane == 0) ptx::barrier_arrive(empty + which * 8);
  };
  const auto next_stage = [&] {
    if (++slot == plan.stages) {
      slot = 0;
      phase ^= !plan.resident;
    }
  };
  const auto enter_stage = [&] {
    if (fills > 0) {
      ptx::barrier_wait(empty + fill_slot * 8, fill_phase);
      fill_next();
    }
    ptx::barrier_wait(full + slot * 8, phase);
  };

  // Sums of the pass before the running one that wait for the other ranks.
  const int sources = ranks * k_groups;
  const int owned = (plan.items - rank + ranks - 1) / ranks;
  const uint32_t received = shared + plan.received + team * plan.received_bytes;
  constexpr int kNever = 1 << 30;
  int finish_in = kNever;  // stages
  const auto write_item = [&](int item, int row_block, float4 v) {
    const int n = 8 * (item >> 2) + 2 * (lane & 3) + ((lane >> 2) & 1);
    const int row = row_block * kBlock + (item & 3) * kTileRows + ((lane >> 3) & 1) * 8 + (lane >> 4) * 4;
    v = transpose_rows(v, lane);
    const uint32_t shifts = __ldg(reinterpret_cast<const uint32_t*>(w.shift + row));
    if (n < args.n) store_rows(args.epilogue, w.m, n, row, v, shifts);
  };
  const auto finish = [&](int of_pass) {
    finish_in = kNever;
    const int team_warp = warp - team * k_groups * 4;
    if (ranks > 1 && team_warp == 0 && lane == 0) ptx::barrier_expect(arrived, owned * sources * kItemBytes);
    ptx::barrier_wait(arrived, of_pass & 1);
    const float4* from = reinterpret_cast<const float4*>(memory + (received - shared)) + lane;
#pragma unroll 1
    for (int i = team_warp; i < owned; i += k_groups * 4) {
      float4 sum = from[i * 32];
#pragma unroll 4
      for (int s = 1; s < sources; ++s) {
        const float4 v = from[(s * plan.owned + i) * 32];
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
      }
      write_item(i * ranks + rank, row_block_of(of_pass), sum);
    }
    if (of_pass + 1 < passes) {  // there is a next send, which waits for this
      __syncwarp();
      if (ranks == 1 && lane == 0) ptx::barrier_arrive(may_send);
      if (ranks > 1 && lane < ranks) ptx::barrier_arrive_cluster(may_send, lane);
    }
  };
  const auto flush = [&] {
    if (sources == 1) {
#pragma unroll
      for (int g = 0; g < kColumnGroups; ++g)
        write_item(4 * g + tile, row_block_of(pass), make_float4(sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]));
      return;
    }
    if (pass > 0) ptx::barrier_wait(may_send, (pass - 1) & 1);
    const uint32_t to = received + ((rank * k_groups + k_group) * plan.owned * 32 + lane) * 16;
    int owner = tile % ranks, at = tile / ranks;
    const int owner_step = 4 % ranks, at_step = 4 / ranks;
#pragma unroll
    for (int g = 0; g < kColumnGroups; ++g) {
      const float4 v = make_float4(sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]);
      if (ranks > 1)  // not an instruction of a CTA that is alone
        ptx::store_cluster(to + at * kItemBytes, arrived, owner, v);
      else
        *reinterpret_cast<float4*>(memory + (to - shared) + at * kItemBytes) = v;
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
    finish_in = (pass_stages - last_stage_empty) / 2 + 1;  // so before the next flush
  };

  const TileWords<Weights> tile_words(tile, lane);
  uint32_t ring_slot = 0, ring_phase = 0;
#pragma unroll 1
  for (; pass < passes; ++pass) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;
    int left = own_chunks, left_in_stage = 0;
    uint32_t b = 0;
    uint32_t a[kOverlap ? 2 : 1][4][4] = {};
    const auto unit = [&](uint32_t (&a)[4][4], uint32_t (&multiplying)[4][4]) {
      ptx::barrier_wait(ring_full + ring_slot * 8, ring_phase);
      const uint32_t words_at = ring + ring_slot * block_bytes;
      if constexpr (Weights::kHasEscapes)
        patches.put(words_at, w, [&] { return first_block_of(pass) + (own_chunks - left) * k_groups; }, tile);
      uint32_t words[Weights::kRegisters];
      if constexpr (kOverlap || Weights::kHasEscapes) tile_words.read(words, words_at);
      if constexpr (!kOverlap) {
        ptx::wgmma_wait();
        ptx::wgmma_ready(multiplying);  // its registers are nobody else's before; raw words would be read right into them
      }
      if constexpr (!kOverlap && !Weights::kHasEscapes) tile_words.read(words, words_at);
#pragma unroll
      for (int j = 0; j < 4; ++j) Weights::decode(a[j], words, patches.plane.base + lane * 16, j);
      ptx::wgmma_ready(a);
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(ring_empty + ring_slot * 8);
      if constexpr (Weights::kHasEscapes) {
        patches.take_back();
        __syncwarp();
      }
      const bool new_stage = left_in_stage == 0;
      int stage_before = -1;
      if (new_stage) {
        if (left < own_chunks) {
          stage_before = slot;
          next_stage();
        }
        enter_stage();
        b = ptx::wgmma_descriptor(shared + (slot * plan.stage_chunks + k_group) * kChunkBytes);
        left_in_stage = stage_units;
        --finish_in;
      }
      ptx::wgmma_wait();
      if (kOverlap) ptx::wgmma_ready(multiplying);
      if (stage_before >= 0) leave_stage(stage_before);
      if (finish_in == 0) finish(pass - 1);
      ptx::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::wgmma(sums, a[j], b + 2 * j);
      ptx::wgmma_commit();

      if (to_copy > 0) {
        ptx::barrier_wait(ring_empty + copy_slot * 8, copy_phase);
        copy_block();
      }
      if (++ring_slot == plan.ring) {
        ring_slot = 0;
        ring_phase ^= 1;
      }
      b += k_groups * (kChunkBytes >> 4);
      --left_in_stage;
      return --left > 0;
    };
#pragma unroll 1
    while (unit(a[0], a[kOverlap]) && (!kOverlap || unit(a[kOverlap], a[0]))) {
    }
    ptx::wgmma_wait();
    ptx::wgmma_done(sums);
    leave_stage(slot);
    next_stage();
    flush();
    if (plan.resident) {
      slot = 0;
    } else if (last_stage_empty) {
      enter_stage();
      leave_stage(slot);
      next_stage();
    }
  }
  if (sources > 1 && passes > 0) finish(passes - 1);
  if (plan.resident) return;
  // Team 0 may have a pass more; its stages wait for this warp too.
  const int first_team_passes = (row_blocks + teams - 1) / teams;
#pragma unroll 1
  for (int i = (first_team_passes - passes) * pass_stages; i > 0; --i) {
    enter_stage();
    leave_stage(slot);
    next_stage();
  }
}

}  // namespace jaxzip::lane_planar
