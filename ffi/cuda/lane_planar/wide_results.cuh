// What becomes of the sums of the matmul of many columns: by whole lines of 64 rows, which wait in shared memory for a tensor copy while the
// next unit is multiplied.
#pragma once
#include "wgmma_results.cuh"
#include "wide_work.cuh"

namespace jaxzip::lane_planar {

// A column of an area takes 128 bytes; its 16-byte pieces are permuted as tensor copies with 128-byte swizzle have them, so that eight columns'
// lie in different banks.
template <class Weights>
class WideResults : Results<Weights, kWgmmaMaxN, WideWork> {
  using Base = Results<Weights, kWgmmaMaxN, WideWork>;
  static constexpr int kParts = kWgmmaMaxN / kWideLineColumns, kLoads = kWideLineColumns / 16, kLineBytes = kBlock * 2;
  static constexpr int kAreaBytes = kWideLineColumns * kLineBytes, kPairsBarrier = 1 + kWideTeams;
  const WideOutput& output_;
  const bool asks_;  // this thread asks for the team's copies

  __device__ __forceinline__ uint32_t area(int team, int part) const {
    return this->work_.shared + this->args_.plan.received + (team * kWideAreas + part % kWideAreas) * kAreaBytes;
  }
  // Where four matrices of 8 rows by 8 columns go, two by two: of the warp's 16 rows, and the first 16 columns.
  __device__ __forceinline__ uint32_t matrices() const {
    const int lane = this->lane_;
    return (8 * (lane >> 4) + (lane & 7)) * kLineBytes + (((2 * this->tile_ + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
  }
  // Before the team writes into an area: its copy of two parts ago was read.
  __device__ __forceinline__ void begin_part() const {
    if (asks_) ptx::bulk_store_wait_read<kWideAreas - 1>();
    this->sync_group();
  }
  // After that: its columns from `n` on are copied.
  __device__ __forceinline__ void end_part(int part, int row, int n) const {
    ptx::fence_async_proxy();
    this->sync_group();
    if (!asks_) return;
    if (n < this->args_.n) ptx::tensor_store(&output_.map, area(this->team_, part), row, n);
    ptx::bulk_store_commit();
  }
  __device__ __forceinline__ void load_scales(float (&scale)[2]) const {
    this->wait_for_shifts();
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = unscale(static_cast<int8_t>(ptx::load_shared_u8(warp_area() + (this->lane_ >> 2) + 8 * i)));
  }

  template <bool kResidual>
  __device__ __forceinline__ void store_lines(int pass, const float (&sums)[kWgmmaMaxN / 2]) const {
    const WgmmaArgs& args = this->args_;
    const Epilogue& e = args.epilogue;
    const int lane = this->lane_, first_row = this->row_block_of(pass) * kBlock, first_n = this->work_.first_column(pass);
    float scale[2], bias[2];
    load_scales(scale);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + this->tile_ * kTileRows + (lane >> 2) + 8 * i;
      bias[i] = e.bias && row < args.w.m ? __bfloat162float(e.bias[row]) : -0.0f;
    }
    // Of the residual a thread brings eight rows of every 16th column, two parts ahead.
    const int taken = 4 * this->tile_ + (lane >> 3), piece = lane & 7;
    const uint32_t put = matrices(), take = taken * kLineBytes + ((piece ^ (taken & 7)) << 4);
    const int columns = kResidual && first_row + 8 * piece < args.w.m ? args.n - first_n : 0;
    const __nv_bfloat16* from = e.residual + static_cast<size_t>(first_n + taken) * args.w.m + first_row + 8 * piece;
    uint4 residual[kWideAreas][kLoads] = {};
    const auto load_residual = [&](int part) {
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        const int n = part * kWideLineColumns + 16 * s;
        if (taken + n < columns) residual[part % kWideAreas][s] = *reinterpret_cast<const uint4*>(from + static_cast<size_t>(n) * args.w.m);
      }
    };
    if (kResidual) {
#pragma unroll
      for (int part = 0; part < kWideAreas; ++part) load_residual(part);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t lines = area(this->team_, part);
      begin_part();
      if (kResidual) {
#pragma unroll
        for (int s = 0; s < kLoads; ++s) {
          const uint4 v = residual[part % kWideAreas][s];
          ptx::store_shared(lines + take + s * 16 * kLineBytes, v.x, v.y, v.z, v.w);
        }
        if (part + kWideAreas < kParts) load_residual(part + kWideAreas);
        this->sync_group();
      }
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        const uint32_t at = lines + put + s * 16 * kLineBytes;
        uint32_t pairs[4], added[4];
        if (kResidual) ptx::load_matrices_transposed(added, at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* two = sums + (part * kWideLineColumns + 16 * s) / 2 + 2 * i;
          float2 sum = make_float2(fmaf(two[0], scale[i & 1], bias[i & 1]), fmaf(two[1], scale[i & 1], bias[i & 1]));
          if (kResidual) {
            const float2 more = unpack(added[i]);
            sum = make_float2(sum.x + more.x, sum.y + more.y);
          }
          pairs[i] = pack(sum.x, sum.y);
        }
        ptx::store_matrices<true>(at, pairs);
      }
      end_part(part, first_row, first_n + part * kWideLineColumns);
    }
  }

  // A gated product's: the teams have the gate's sums and those that it is for. Each gives the other half of its columns, rounded, and finishes
  // the other half. Both have the same lanes for the same places.
  template <int kTeam>
  __device__ __forceinline__ void store_gated(int pass, const float (&sums)[kWgmmaMaxN / 2]) const {
    static_assert(kWideTeams == 2 && kParts == 2 * kWideAreas);
    constexpr int kHalf = kWgmmaMaxN / 4, kThreads = kWideTeams * 128;  // registers of half of the columns
    const WgmmaArgs& args = this->args_;
    const int first_row = (this->row_block_of(pass) - kTeam * args.plan.half) * kBlock, first_n = this->work_.first_column(pass);
    float scale[2];
    load_scales(scale);
    const auto pair = [&](int i) { return pack(sums[2 * i] * scale[i & 1], sums[2 * i + 1] * scale[i & 1]); };
    // Threads write and read 16 bytes side by side.
    const uint32_t own = (this->warp_ & 3) * 512 + this->lane_ * 16;
    if (asks_) ptx::bulk_store_wait_read<0>();
    this->sync_group();
#pragma unroll
    for (int i = 0; i < kHalf / 2; i += 4) {
      const int of = (1 - kTeam) * kHalf / 2 + i;
      ptx::store_shared(area(kTeam, 0) + own + i / 4 * 2048, pair(of), pair(of + 1), pair(of + 2), pair(of + 3));
    }
    ptx::sync_threads(kPairsBarrier, kThreads);
    uint32_t other[kHalf / 2 / 4][4];
#pragma unroll
    for (int i = 0; i < kHalf / 2 / 4; ++i) ptx::load_shared(other[i], area(1 - kTeam, 0) + own + i * 2048);
    ptx::sync_threads(kPairsBarrier, kThreads);
#pragma unroll
    for (int area_index = 0; area_index < kWideAreas; ++area_index) {
      const int part = kTeam * kWideAreas + area_index;
#pragma unroll
      for (int s = 0; s < kLoads; ++s) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t mine = pair(kTeam * kHalf / 2 + (area_index * kLoads + s) * 4 + i), theirs = other[area_index * kLoads + s][i];
          pairs[i] = kTeam == 0 ? gated_activation(args.epilogue.activation, mine, theirs) : gated_activation(args.epilogue.activation, theirs, mine);
        }
        ptx::store_matrices<true>(area(kTeam, area_index) + matrices() + s * 16 * kLineBytes, pairs);
      }
      end_part(part, first_row, first_n + part * kWideLineColumns);
    }
  }

 public:
  __device__ __forceinline__ WideResults(const WgmmaArgs& args, const WideOutput& output, const WideWork& work, uint8_t* memory, int warp, int lane)
      : Base(args, work, memory, warp, lane), output_(output), asks_((warp & 3) == 0 && lane == 0) {}

  using Base::begin;
  using Base::warp_area;

  __device__ __forceinline__ void store(int pass, float (&sums)[kWgmmaMaxN / 2]) {
    if (!output_.by_lines)
      this->template add_and_store<1, 0>(pass, false, sums);  // of more it need not know
    else if (this->args_.epilogue.gated)
      this->team_ == 0 ? store_gated<0>(pass, sums) : store_gated<1>(pass, sums);
    else if (this->args_.epilogue.residual)
      store_lines<true>(pass, sums);
    else
      store_lines<false>(pass, sums);
  }
  // After the last pass: shared memory is nobody's any more.
  __device__ __forceinline__ void end() const {
    if (asks_) ptx::bulk_store_wait_read<0>();
  }
};

}  // namespace jaxzip::lane_planar
