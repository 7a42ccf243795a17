// What becomes of the sums of a warp that multiplies: other warps' are added, then they are finished and stored.
#pragma once
#include "epilogue.cuh"
#include "weights.cuh"
#include "wgmma_work.cuh"

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

// Sums of a row block are items of 8 columns and 16 rows, a register quadruple of each lane. Where K is split, they are added in two steps,
// each in a fixed order: warp groups of a team, among which the items are dealt; then CTAs, each of which owns some of the items.
template <class Weights, int kN, class Work>
class Results {
 protected:
  static constexpr int kColumnGroups = kN / 8;
  static constexpr bool kFew = kN <= kFewColumns;
  static constexpr int kFirstPairBarrier = 1 + kMaxGroups;  // those before are a team's, or a warp group's
  const WgmmaArgs& args_;
  const Work& work_;
  uint8_t* const memory_;
  const int warp_, lane_, tile_, group_, k_groups_, team_, k_group_, ranks_;
  const uint32_t arrived_, may_send_;
  const bool stores_lines_;

  __device__ __forceinline__ int team_warp() const { return warp_ - team_ * k_groups_ * 4; }
  __device__ __forceinline__ int row_block_of(int pass) const { return work_.row_block_of(args_.plan, team_, pass); }
  // Of the rows that this warp stores: of all its items these are the same.
  __device__ __forceinline__ int stored_tile() const { return ranks_ == 1 ? tile_ : (team_warp() * ranks_ + work_.rank) & 3; }
  // Where a team's sums meet: of warp groups, then those that CTAs sent.
  __device__ __forceinline__ float4* team_memory() const {
    return reinterpret_cast<float4*>(memory_ + args_.plan.received + team_ * args_.plan.received_bytes) + lane_;
  }
  __device__ __forceinline__ int received() const { return kFew ? 0 : (k_groups_ - 1) * args_.plan.items; }  // items before them
  // `items` / ranks_. A division would take 200 cycles, and there is nothing else to do meanwhile.
  __device__ __forceinline__ int by_ranks(int items) const { return items * args_.plan.ranks_inverse >> 16; }
  // Of the sums that an owner adds: of CTAs, or of their warp groups.
  __device__ __forceinline__ int sources_of_cta() const { return kFew ? k_groups_ : 1; }
  __device__ __forceinline__ int source() const { return kFew ? work_.rank * k_groups_ + k_group_ : work_.rank; }

  __device__ __forceinline__ void wait_for_shifts() const {
    if (lane_ == 0) ptx::async_copy_wait();
    __syncwarp();
  }
  // The rows of an item that this lane stores, after a transposition.
  __device__ __forceinline__ FourRows four_rows(int pass) const {
    const int row = ((lane_ >> 3) & 1) * 8 + (lane_ >> 4) * 4;
    uint32_t shifts;
    ptx::load_shared_words<1>(&shifts, warp_area() + row);
    return FourRows(args_.epilogue, args_.w.m, row_block_of(pass) * kBlock + stored_tile() * kTileRows + row, shifts);
  }
  // The column of them.
  __device__ __forceinline__ int column_of(int first_n, int column_group) const {
    return first_n + 8 * column_group + 2 * (lane_ & 3) + ((lane_ >> 2) & 1);
  }
  template <class... Residual>
  __device__ __forceinline__ void store_item(int first_n, int column_group, const FourRows& rows, bool fours, float4 sum,
                                             const Residual&... residual) const {
    const int n = column_of(first_n, column_group);
    sum = transpose_rows(sum, lane_);
    if (n >= args_.n) return;
    if (Work::kPairs && args_.epilogue.gated)
      store_rows_of_pair(args_.epilogue, args_.w.m, n, rows, sum);
    else
      store_rows(args_.epilogue, args_.w.m, fours, n, rows, sum, residual...);
  }
  // Where a pair is two teams', a warp and one of the next team have the same items, of a gate's rows and of those that they are for. The gate's wait
  // in y for the others', as they do where a pair is two passes of a team.
  __device__ __forceinline__ void sync_pair() const {
    ptx::sync_threads(kFirstPairBarrier + (team_ >> 1) * k_groups_ * 4 + team_warp(), 64);
  }
  __device__ __forceinline__ void before_items() const {
    if (Work::kPairs && args_.plan.pair_of_teams && team_ & 1) sync_pair();
  }
  __device__ __forceinline__ void after_items() const {
    if (Work::kPairs && args_.plan.pair_of_teams && !(team_ & 1)) sync_pair();
  }
  static __device__ __forceinline__ float4 item(const float (&sums)[kN / 2], int g) {
    return make_float4(sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]);
  }
  static __device__ __forceinline__ float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

  // Sums of the warp groups of a team: column group g is taken by warp group g % kGroups. What another takes goes through shared memory, where
  // an item's places, of all groups but its taker, lie one behind the other. Compiled for each warp group: this code runs once, so that
  // every instruction has to be fetched for it.
  template <int kGroups, int kOwn>
  __device__ __forceinline__ void add_groups(int pass, float (&sums)[kN / 2]) const {
    float4* const of_tile = team_memory() + tile_ * kColumnGroups * (kGroups - 1) * 32;
    if (pass > 0) ptx::sync_threads(1 + team_, kGroups * 128);  // the last pass's were read
#pragma unroll
    for (int g = 0; g < kColumnGroups; ++g)
      if (g % kGroups != kOwn) of_tile[(g * (kGroups - 1) + kOwn - (kOwn > g % kGroups)) * 32] = item(sums, g);
    ptx::sync_threads(1 + team_, kGroups * 128);
#pragma unroll
    for (int g = kOwn; g < kColumnGroups; g += kGroups) {
      const float4* from = of_tile + g * (kGroups - 1) * 32;
      const float4 own = item(sums, g);
      float4 sum = kOwn == 0 ? own : from[0];
#pragma unroll
      for (int k = 1; k < kGroups; ++k) sum = add(sum, k == kOwn ? own : from[(k - (k > kOwn)) * 32]);
      sums[4 * g] = sum.x, sums[4 * g + 1] = sum.y, sums[4 * g + 2] = sum.z, sums[4 * g + 3] = sum.w;
    }
  }
  template <int kGroups, int kOwn>
  __device__ __forceinline__ void send(int pass, const float (&sums)[kN / 2]) const {
    if (pass > 0) ptx::barrier_wait(may_send_, (pass - 1) & 1);
    float4* const own = team_memory() + (received() + source() * args_.plan.owned) * 32;
    const uint32_t remote = ptx::shared_address(own);
    const int at_step = by_ranks(4 * kGroups), owner_step = 4 * kGroups - at_step * ranks_;
    int at = by_ranks(4 * kOwn + tile_), owner = 4 * kOwn + tile_ - at * ranks_;
#pragma unroll
    for (int g = kOwn; g < kColumnGroups; g += kGroups) {
      if (owner == work_.rank)
        own[at * 32] = item(sums, g);
      else  // half as fast
        ptx::store_cluster(remote + at * kItemBytes, arrived_, owner, item(sums, g));
      owner += owner_step;
      at += at_step;
      if (owner >= ranks_) {
        owner -= ranks_;
        ++at;
      }
    }
    __syncwarp();
    if (lane_ < kArrivingLanes) {
      if (lane_ == 0 && team_warp() == 0) ptx::barrier_expect(arrived_, owned() * (ranks_ - 1) * sources_of_cta() * kItemBytes);
      ptx::barrier_arrive(arrived_);
    }
  }
  // Where a pair is two teams' and no other CTA has parts of its sums, its two warps finish half of their items each. The other half's results
  // they give each other in their patch planes. Through y, one warp would wait for memory at every item, and for all code of the end twice. Of
  // fewer columns there are one or two items, and more code costs more than that (bench/NOTES.md, 58 and 93).
  static constexpr bool kMayExchangePairs = Work::kPairs && Weights::kHasEscapes && kN >= 32;
  __device__ __forceinline__ bool exchanges_pairs() const {
    return kMayExchangePairs && args_.epilogue.gated && args_.plan.pair_of_teams && ranks_ == 1;
  }
  template <int kGroups, int kOwn>
  __device__ __forceinline__ void exchange_and_store(int pass, bool more, const float (&sums)[kN / 2]) const {
    constexpr int kItems = (kColumnGroups - kOwn + kGroups - 1) / kGroups, kOfGate = kItems / 2, kOfOther = kItems - kOfGate;
    constexpr uint32_t kItemResults = 32 * sizeof(uint2);
    static_assert(kN > kGatedMaxN || kOfOther * kItemResults <= kTileElements);
    wait_for_shifts();
    const FourRows rows = four_rows(pass);
    const bool other = team_ & 1;
    const uint32_t plane = work_.shared + args_.plan.planes + warp_ * kTileElements + lane_ * static_cast<uint32_t>(sizeof(uint2));
    const uint32_t from = plane + (other ? -1 : 1) * k_groups_ * 4 * kTileElements;
    uint2 results[kItems + 1];
#pragma unroll
    for (int i = 0; i < kItems; ++i) results[i] = rounded(rows.finish(transpose_rows(item(sums, kOwn + i * kGroups), lane_)));
    __syncwarp();  // the plane's last escapes have been taken back
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (other == (i < kOfGate)) ptx::store_shared(plane + (i < kOfGate ? i : i - kOfGate) * kItemResults, results[i].x, results[i].y);
    sync_pair();
    const int row = rows.first - (other ? args_.w.m / 2 : 0);
#pragma unroll
    for (int i = 0; i < kOfOther; ++i) {
      if (i == kOfGate && !other) break;  // it has one less
      uint32_t theirs[2];
      ptx::load_shared(theirs, from + i * kItemResults);
      const uint2 own = other ? results[kOfGate + i] : results[i], received = make_uint2(theirs[0], theirs[1]);
      const int n = column_of(work_.first_column(pass), kOwn + (other ? kOfGate + i : i) * kGroups);
      if (n < args_.n) store_gated(args_.epilogue, args_.w.m, n, row, other ? received : own, other ? own : received);
    }
    if (more) sync_pair();  // before the planes are filled again
  }
  template <int kGroups, int kOwn>
  __device__ __forceinline__ void add_and_store(int pass, bool more, float (&sums)[kN / 2]) const {
    if constexpr (kGroups > 1) add_groups<kGroups, kOwn>(pass, sums);
    if (ranks_ > 1) {
      send<kGroups, kOwn>(pass, sums);
      return;
    }
    if constexpr (kMayExchangePairs) {
      if (exchanges_pairs()) {
        exchange_and_store<kGroups, kOwn>(pass, more, sums);
        return;
      }
    }
    wait_for_shifts();
    const FourRows rows = four_rows(pass);
    const bool fours = in_fours(args_.epilogue, args_.w.m);
    before_items();
#pragma unroll
    for (int g = kOwn; g < kColumnGroups; g += kGroups) store_item(work_.first_column(pass), g, rows, fours, item(sums, g));
    after_items();
  }
  __device__ __forceinline__ int owned() const { return args_.plan.owned - (work_.rank >= args_.plan.owning_most); }
  __device__ __forceinline__ void add_ranks_and_store(int pass, bool more) const {
    wait_for_shifts();
    const FourRows rows = four_rows(pass);
    const bool fours = in_fours(args_.epilogue, args_.w.m);
    const float4* from = team_memory() + received() * 32;
    // Asked for before sums have come, as otherwise the last thing that is waited for.
    const auto residual_at = [&](int i) {
      return residual_of(args_.epilogue, args_.w.m, fours, column_of(work_.first_column(pass), (i * ranks_ + work_.rank) >> 2), args_.n, rows.first);
    };
    uint2 residual = residual_at(team_warp());
    ptx::barrier_wait(arrived_, pass & 1);
    before_items();
#pragma unroll 1
    for (int i = team_warp(); i < owned(); i += k_groups_ * 4) {
      const auto of_cta = [&](int rank) {
        float4 sum = from[(rank * sources_of_cta() * args_.plan.owned + i) * 32];
        for (int s = 1; s < sources_of_cta(); ++s) sum = add(sum, from[((rank * sources_of_cta() + s) * args_.plan.owned + i) * 32]);
        return sum;
      };
      float4 sum = of_cta(0);
      constexpr int kAtOnce = kFew ? 2 : kN <= 64 ? kMaxCluster - 1 : 4;
#pragma unroll 1
      for (int r = 1; r < ranks_; r += kAtOnce) {
        float4 more[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (r + j < ranks_) more[j] = of_cta(r + j);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (r + j < ranks_) sum = add(sum, more[j]);
      }
      const uint2 own = residual;
      if (i + k_groups_ * 4 < owned()) residual = residual_at(i + k_groups_ * 4);
      store_item(work_.first_column(pass), (i * ranks_ + work_.rank) >> 2, rows, fours, sum, [&] { return own; });
    }
    after_items();
    if (more) {  // there is a next send, which waits for this
      __syncwarp();
      arrive_at_all(may_send_, ranks_, lane_);
    }
  }

  // A bf16 result by whole lines of 64 rows: these wait in the warp group's planes, 32 columns at a time. So does the residual that is
  // added, where there are columns enough for that to be worth its code.
  static constexpr int kColumnsAtOnce = kN < 32 ? kN : 32, kLoads = (kColumnsAtOnce + 15) / 16;
  static constexpr bool kResidualLines = kN == kWgmmaMaxN;
  __device__ __forceinline__ bool stores_lines() const {
    const Epilogue& e = args_.epilogue;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(e.y) | reinterpret_cast<uintptr_t>(e.residual);
    return kN >= 16 && Weights::kHasEscapes && ranks_ * k_groups_ == 1 && (kResidualLines || !e.residual) && !e.fp32_out && !(Work::kPairs && e.gated) &&
           args_.w.m % 8 == 0 && (addresses & 15) == 0;
  }
  __device__ __forceinline__ void sync_group() const { ptx::sync_threads(1 + group_, 128); }
  template <bool kResidual>
  __device__ __forceinline__ void store_lines(int pass, const float (&sums)[kN / 2]) const {
    const Epilogue& e = args_.epilogue;
    const int first_row = row_block_of(pass) * kBlock, first_n = work_.first_column(pass);
    float scale[2], bias[2];
    wait_for_shifts();
    for (int i = 0; i < 2; ++i) {
      const int row = (lane_ >> 2) + 8 * i, of = first_row + tile_ * kTileRows + row;
      scale[i] = unscale(static_cast<int8_t>(ptx::load_shared_u8(warp_area() + row)));
      bias[i] = e.bias && of < args_.w.m ? __bfloat162float(e.bias[of]) : -0.0f;
    }
    // A column takes 128 bytes; its 16-byte pieces are permuted so that eight columns' lie in different banks.
    const uint32_t lines = work_.shared + args_.plan.planes + group_ * kTiles * kTileElements;
    const int column = 8 * (lane_ >> 4) + (lane_ & 7);
    const uint32_t put = lines + column * 128 + (((2 * tile_ + ((lane_ >> 3) & 1)) ^ (lane_ & 7)) << 4);
    const int taken = 4 * tile_ + (lane_ >> 3), piece = lane_ & 7;
    const uint32_t take = lines + taken * 128 + ((piece ^ (taken & 7)) << 4);
    const int columns = first_row + 8 * piece < args_.w.m ? args_.n - first_n : 0;
    const size_t at = static_cast<size_t>(first_n + taken) * args_.w.m + first_row + 8 * piece;
    __nv_bfloat16* y = static_cast<__nv_bfloat16*>(e.y) + at;
    uint4 residual[kLoads] = {};
    const auto load_residual = [&](int n) {
#pragma unroll
      for (int s = 0; s < kLoads; ++s)
        if (taken + n + 16 * s < columns)
          residual[s] = *reinterpret_cast<const uint4*>(e.residual + at + static_cast<size_t>(n + 16 * s) * args_.w.m);
    };
    if (kResidual) load_residual(0);
#pragma unroll
    for (int n = 0; n < kN; n += kColumnsAtOnce) {
      sync_group();  // all have read their planes, or the lines before
      if (kResidual) {
#pragma unroll
        for (int s = 0; s < kLoads; ++s) ptx::store_shared(take + s * (16 * 128), residual[s].x, residual[s].y, residual[s].z, residual[s].w);
        sync_group();
        if (n + kColumnsAtOnce < kN) load_residual(n + kColumnsAtOnce);
      }
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        uint32_t pairs[4], added[4];
        if (kResidual) ptx::load_matrices_transposed(added, put + s * (16 * 128));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* two = sums + (n + 16 * s) / 2 + 2 * i;
          float2 sum = make_float2(fmaf(two[0], scale[i & 1], bias[i & 1]), fmaf(two[1], scale[i & 1], bias[i & 1]));
          if (kResidual) {
            const float2 more = unpack(added[i]);
            sum = make_float2(sum.x + more.x, sum.y + more.y);
          }
          pairs[i] = pack(sum.x, sum.y);
        }
        ptx::store_matrices<true>(put + s * (16 * 128), pairs);
      }
      sync_group();
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        uint32_t v[4];
        ptx::load_shared(v, take + s * (16 * 128));
        const int first = n + 16 * s;
        if (taken + first < columns) ptx::store_global(y + static_cast<size_t>(first) * args_.w.m, v);
      }
    }
    sync_group();  // before the planes are filled again
  }

 public:
  __device__ __forceinline__ Results(const WgmmaArgs& args, const Work& work, uint8_t* memory, int warp, int lane)
      : args_(args), work_(work), memory_(memory), warp_(warp), lane_(lane), tile_(warp & 3), group_(warp >> 2),
        k_groups_(Work::kSplitsK ? args.plan.k_groups : 1),
        team_(group_ >> args.plan.log_k_groups), k_group_(group_ & (k_groups_ - 1)), ranks_(Work::kSplitsK ? args.plan.cluster : 1),
        arrived_(work.barriers + kArrived + 8 * team_), may_send_(work.barriers + kMaySend + 8 * team_),
        stores_lines_(stores_lines()) {}

  // Once, before anything is sent to other CTAs.
  __device__ __forceinline__ void wait_for_cluster() const {
    if (ranks_ > 1) ptx::cluster_wait();
  }

  // The shared address of what is this warp's own: shifts of the rows that it stores, then bytes that nobody reads.
  __device__ __forceinline__ uint32_t warp_area() const { return work_.barriers - kWarpAreasBytes + warp_ * kWarpAreaBytes; }

  // Before a pass: asks for the shifts, for which its end would have to wait.
  __device__ __forceinline__ void begin(int pass) const {
    __syncwarp();
    if (lane_ == 0) ptx::async_copy_16(warp_area(), args_.w.shift + row_block_of(pass) * kBlock + stored_tile() * kTileRows);
  }
  // Where sums arrive in the slots: this warp needs them no more.
  __device__ __forceinline__ void announce_idle() const {
    __syncwarp();
    if (ranks_ == 1) arrive(work_.barriers + kIdle, lane_);
    if (ranks_ > 1) arrive_at_all(work_.barriers + kIdle, ranks_, lane_);
  }
  __device__ __forceinline__ bool used_planes() const { return stores_lines_ || exchanges_pairs(); }
  __device__ __forceinline__ void store(int pass, int passes, float (&sums)[kN / 2]) const {
    if (stores_lines_) {
      if (kResidualLines && args_.epilogue.residual)
        store_lines<kResidualLines>(pass, sums);
      else
        store_lines<false>(pass, sums);
      return;
    }
    if (args_.plan.sums_in_slots) ptx::barrier_wait(work_.barriers + kIdle, 0);
    if (kFew && ranks_ > 1) {
      send<1, 0>(pass, sums);
      add_ranks_and_store(pass, pass + 1 < passes);
      return;
    }
    // No switch: its table would have to be fetched.
    if (k_groups_ == 1) add_and_store<1, 0>(pass, pass + 1 < passes, sums);
    else if (k_groups_ == 2 && k_group_ == 0) add_and_store<2, 0>(pass, pass + 1 < passes, sums);
    else if (k_groups_ == 2) add_and_store<2, 1>(pass, pass + 1 < passes, sums);
    else if (k_group_ == 0) add_and_store<4, 0>(pass, pass + 1 < passes, sums);
    else if (k_group_ == 1) add_and_store<4, 1>(pass, pass + 1 < passes, sums);
    else if (k_group_ == 2) add_and_store<4, 2>(pass, pass + 1 < passes, sums);
    else add_and_store<4, 3>(pass, pass + 1 < passes, sums);
    if (ranks_ > 1) add_ranks_and_store(pass, pass + 1 < passes);
  }
};

}  // namespace jaxzip::lane_planar
