// Matmul on Hopper's wgmma from n = 8 on: weights are decoded in registers and multiply x in shared memory.
//
// A cluster owns row blocks; its CTAs (ranks) split K. Inside a CTA the warp groups form teams: a team works on one row block at a
// time, and its `k_groups` warp groups take the chunks of 64 k in turn. Their partial sums are added in the CTA, in order of warp groups,
// go to the ranks that own them through distributed shared memory and are added there in order of ranks. No atomics, no workspace, the
// same bits in every run.
//
// Encoded blocks and chunks of x come through a ring of slots, which one more warp fills by bulk and tensor copies. Where clusters have
// fewer row blocks than CTAs have teams, the ring has room for the busy teams only, and so more slots.
#pragma once
#include <type_traits>

#include "weights.cuh"
#include "wgmma_multiplier.cuh"
#include "wgmma_pipelined.cuh"
#include "wgmma_results.cuh"
#include "wgmma_work.cuh"
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

// So many slots are asked for before anything else, their barriers made by the warp that fills them. The others cannot start before that
// has been done, so it is little unless the time is the kernel's before.
template <class Work>
__device__ __forceinline__ int early_slots(const WgmmaArgs& args, const Work& work) {
  constexpr int kWithoutOverlap = 2;
  if (args.x_load == XLoad::kPlain) return 0;  // plain x is there before its slot's blocks
  const int total = work.passes * work.slots_per_pass;
  return min(min(total, args.plan.slots), args.overlap ? args.plan.early : kWithoutOverlap);
}

// Barriers of a CTA's warps. All slots' barriers are made: those that multiply go on when the filling warp has made its own, and that one asks for
// its first slots before it waits for those of the others.
constexpr int kFillerReady = 0, kOthersReady = 15;

// The part of the warp that fills the slots.
template <int kN, int kGroups, class Work>
__device__ __forceinline__ void fill_slots(const WgmmaArgs& args, const Work& work, int lane) {
  constexpr int kThreads = (kGroups + 1) * 128;
  const WgmmaPlan& plan = args.plan;
  // A team's lane asks for its blocks of a slot: k_groups that lie one behind the other, fewer in a pass's last slot.
  const int own_passes = lane < plan.busy ? work.passes_of(plan, lane) : 0;
  const int total = work.passes * work.slots_per_pass;
  const bool plain_x = args.x_load == XLoad::kPlain;

  // What other slices will read too stays in the L2 a while.
  const uint64_t policy = kN == kWgmmaMaxN && plan.slices > 1 ? ptx::read_again() : ptx::read_once();
  // A slot's place in the work. Advanced by additions: the warps that multiply keep the schedulers busy, so each instruction here takes some
  // ten cycles, and a slot of one chunk is used up in a thousand (bench/NOTES.md, 103).
  struct Cursor {
    int pass = 0, first = 0;  // of this CTA's chunks the slot's first
  };
  struct Blocks : Cursor {
    const uint32_t* from;  // this lane's, in this pass from k_begin on
    uint32_t teams;
  };
  const int step = plan.k_groups;
  const auto advance = [&](Cursor& c) {
    c.first += step;
    if (c.first < work.chunks) return false;
    c.first = 0;
    ++c.pass;
    return true;
  };
  const auto begin_pass = [&](Blocks& b) {
    const int block = work.row_block_of(plan, lane, b.pass) * args.w.k_blocks() + work.k_begin;
    b.from = args.w.blocks + static_cast<size_t>(block) * args.w.block_words;
    b.teams = __popc(__ballot_sync(~0u, b.pass < own_passes));
  };
  uint32_t begin_bytes = work.k_begin * work.block_bytes, x_expected = plain_x ? 0 : work.x_bytes;
  uint32_t own_room = work.shared + plan.blocks + lane * plan.team_bytes, slot_bytes = plan.slot_bytes, line_mask = plan.line_mask;
  ptx::keep(begin_bytes, x_expected, own_room, slot_bytes, line_mask);
  const auto copy_blocks = [&](const Blocks& b, int at) {
    const uint32_t full = work.barriers + at * kSlotBarriers + kFull;
    const uint32_t bytes = min(step, work.chunks - b.first) * work.block_bytes, offset = b.first * work.block_bytes;
    if (lane == 0) ptx::barrier_expect(full, b.teams * bytes + x_expected);
    __syncwarp();
    if (b.pass < own_passes)
      ptx::bulk_copy(own_room + at * slot_bytes + ((begin_bytes + offset) & line_mask), reinterpret_cast<const uint8_t*>(b.from) + offset, bytes,
                     full, policy);
  };
  const auto bring_x = [&](const Cursor& c, int at) {
    const uint32_t to = work.shared + at * work.x_bytes;
    const int first = work.k_begin + c.first;
    if (plain_x)
      load_plain_x<kN>(args, to, work.first_n, first, plan.k_groups, lane);
    else if (lane == 0)
      copy_x<kN>(args, to, work.barriers + at * kSlotBarriers + kFull, work.first_n, first, plan.k_groups);
  };

  // The first blocks wait neither for other warps, so that this one makes the barriers that they arrive at, nor for x. More bytes than
  // memory needs to be busy only make queues in which the kernel before waits for its last ones.
  const int early = early_slots(args, work);
  if (lane == 0) {
#pragma unroll 1
    for (int i = 0; i < early; ++i) ptx::barrier_init_only(work.barriers + i * kSlotBarriers + kFull, 1);
    ptx::barrier_init_done();
  }
  __syncwarp();
  ptx::arrive_threads(kFillerReady, kThreads);
  if (plan.cluster > 1) ptx::cluster_arrive_relaxed();
  // Where x is many bytes it would be late behind the blocks of several slots.
  const bool x_first = kN >= 32 && !args.overlap;
  Blocks blocks;
  begin_pass(blocks);
#pragma unroll 1
  for (int i = 0; i < early; ++i) {
    if (x_first) bring_x(blocks, i);
    copy_blocks(blocks, i);
    if (advance(blocks)) begin_pass(blocks);
  }
  ptx::wait_for_previous_grid();
  if (!x_first) {
    Cursor x;
#pragma unroll 1
    for (int i = 0; i < early; ++i, advance(x)) bring_x(x, i);
  }
  // Only now, since it waits for the group's other warps, and those that multiply wait for data anyway.
  ptx::registers_decrease<Registers<kGroups>::kFill>();
  ptx::sync_threads(kOthersReady, kThreads);
  int at = early, phase = 1;  // of an unused barrier the phase before has ended
  if (at == plan.slots) at = 0, phase = 0;
#pragma unroll 1
  for (int i = early; i < total; ++i) {
    ptx::barrier_wait(work.barriers + at * kSlotBarriers + kEmpty, phase);
    bring_x(blocks, at);
    copy_blocks(blocks, at);
    if (advance(blocks)) begin_pass(blocks);
    if (++at == plan.slots) {
      at = 0;
      phase ^= 1;
    }
  }
}

// The part of a warp that multiplies.
template <class Weights, int kN, int kGroups, class Work>
__device__ __forceinline__ void multiply(const WgmmaArgs& args, const Work& work, uint8_t* memory, int warp, int lane) {
  const WgmmaPlan& plan = args.plan;
  const int k_groups = plan.k_groups, team = warp >> 2 >> plan.log_k_groups, k_group = warp >> 2 & (k_groups - 1);
  const int own_slots = (work.chunks - k_group + k_groups - 1) >> plan.log_k_groups;
  const int own_passes = work.passes_of(plan, team);
  ptx::wait_for_previous_grid();  // bias and residual

  float sums[kN / 2];
  const Results<Weights, kN, Work> results(args, work, memory, warp, lane);
  using Multiplies = std::conditional_t<kGroups == 2, PipelinedMultiplier<Weights, kN, Work>, Multiplier<Weights, kN, Work>>;
  const Multiplies multiplier(args, work, results.warp_area(), warp, lane);
  multiplier.fill_plane();
  results.wait_for_cluster();  // here, while the first blocks come, not before sums are sent: then nothing would hide it
  RingPlace place = {};
#pragma unroll 1
  for (int pass = 0; pass < own_passes; ++pass) {
    results.begin(pass);
    const auto block = [&](int i) { return work.row_block_of(plan, team, pass) * args.w.k_blocks() + work.k_begin + k_group + i * k_groups; };
    multiplier.row_block(args, work, work.slots_per_pass, own_slots, block, place, sums);
    if (plan.sums_in_slots) results.announce_idle();
    results.store(pass, own_passes, sums);
    if (pass + 1 < own_passes && results.used_planes()) multiplier.fill_plane();
  }
#pragma unroll 1
  for (int i = (work.passes - own_passes) * work.slots_per_pass; i > 0; --i) multiplier.skip_slot(args, work, place);
  if (plan.sums_in_slots && own_passes == 0) results.announce_idle();
}

template <class Weights, int kN, int kGroups, bool kPairs>
__global__ void __launch_bounds__((kGroups + 1) * 128, 1) matmul_wgmma(const __grid_constant__ WgmmaArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  // By a warp that has nothing else to do at first: the one that copies x would wait for it.
  if (threadIdx.x == (kGroups + 1) * 128 - 32 && args.x_load != XLoad::kPlain) ptx::prefetch_tensor_map(&args.x_map);
  const WgmmaPlan& plan = args.plan;
  // By a reduction, whose result the compiler knows to be the warp's: what follows from it then costs no vector registers.
  const int warp = __reduce_max_sync(~0u, threadIdx.x >> 5), lane = threadIdx.x & 31;
  const WgmmaWork<kPairs> work(args, ptx::shared_address(memory), kN);
  ptx::launch_dependents();
  if (warp == kGroups * 4) {
    fill_slots<kN, kGroups>(args, work, lane);
    return;
  }
  const auto join = [&] {
    ptx::arrive_threads(kOthersReady, (kGroups + 1) * 128);
    ptx::sync_threads(kFillerReady, (kGroups + 1) * 128);
    if (plan.cluster > 1) ptx::cluster_arrive_relaxed();
  };
  const int busy_warps = plan.busy_warps();
  // A warp makes few barriers: one after another they cost a microsecond. The filling warp makes those that it uses at once.
  if (warp < kGroups * 4 && ptx::elect_one()) {
    const int early = early_slots(args, work);
#pragma unroll 1
    for (int i = warp; i < plan.slots; i += kGroups * 4) {
      const uint32_t barriers = work.barriers + i * kSlotBarriers;
      if (i >= early) ptx::barrier_init_only(barriers + kFull, 1);
      ptx::barrier_init_only(barriers + kEmpty, busy_warps * kArrivingLanes);
    }
    if (warp < plan.busy && plan.cluster > 1) {
      ptx::barrier_init_only(work.barriers + kArrived + 8 * warp, plan.k_groups * 4 * kArrivingLanes + 1);
      ptx::barrier_init_only(work.barriers + kMaySend + 8 * warp, plan.cluster * plan.k_groups * 4 * kArrivingLanes);
    }
    if (warp == kGroups * 4 - 1 && plan.sums_in_slots) ptx::barrier_init_only(work.barriers + kIdle, plan.cluster * busy_warps * kArrivingLanes);
    ptx::barrier_init_done();
  }
  if (Weights::kHasEscapes && plan.overflow_listed && warp > kGroups * 4) {
    const OverflowList list = work.overflow_list(plan);
    if (warp == kGroups * 4 + 1 && ptx::elect_one()) list.begin();
    OverflowList::Gatherer gatherer(list, args.w, warp - kGroups * 4 - 1, lane);
    join();
    ptx::registers_decrease<Registers<kGroups>::kFill>();
    gatherer.gather(args, work, lane);
    return;
  }
  join();
  if (warp < busy_warps) {
    ptx::registers_increase<Registers<kGroups>::kMultiply>();
    multiply<Weights, kN, kGroups>(args, work, memory, warp, lane);
  } else {
    ptx::registers_decrease<Registers<kGroups>::kFill>();
  }
}

}  // namespace jaxzip::lane_planar
