// The end of the small-N matmul: sums over the warps that share a row group, then over the CTAs of a cluster, in the order of k; epilogue.
//
// Where there are few columns a warp or two have all of the results, and every instruction between the last product and the end of the
// launch is time, and so is fetching it. So a thread then takes one or two rows of a column and not four, by code of its own.
#pragma once
#include "direct_plan.cuh"
#include "epilogue.cuh"
#include "ptx.cuh"

namespace jaxzip::lane_planar {

// Rows of a column that a thread takes at once.
__host__ __device__ constexpr int rows_at_once(int columns) { return columns <= 4 ? 1 : columns <= 8 ? 2 : 4; }

template <int kRows>
struct SumsOfRows;

template <>
struct SumsOfRows<1> {
  float value = 0;
  __device__ __forceinline__ void add(const SumsOfRows& o) { value += o.value; }
};

template <>
struct SumsOfRows<2> {
  float2 value = {0, 0};
  __device__ __forceinline__ void add(const SumsOfRows& o) { value = make_float2(value.x + o.value.x, value.y + o.value.y); }
};

template <>
struct SumsOfRows<4> {
  float4 value = {0, 0, 0, 0};
  __device__ __forceinline__ void add(const SumsOfRows& o) {
    value = make_float4(value.x + o.value.x, value.y + o.value.y, value.z + o.value.z, value.w + o.value.w);
  }
};

// Epilogue of such rows; `row` is the first one, of the matrix, and `shifts` points to its shift.
template <int kRows>
class RowResults;

template <>
class RowResults<1> {
 public:
  __device__ __forceinline__ RowResults(const Epilogue& e, int m) : e_(e), m_(m) {}
  __device__ __forceinline__ void store(int n, int row, const uint8_t* shift, const SumsOfRows<1>& sum) const {
    if (row >= m_) return;
    const size_t at = static_cast<size_t>(n) * m_ + row;
    float v = fmaf(sum.value, unscale(static_cast<int8_t>(*shift)), e_.bias ? __bfloat162float(e_.bias[row]) : -0.0f);
    if (e_.residual) v += __bfloat162float(e_.residual[at]);
    if (e_.fp32_out)
      static_cast<float*>(e_.y)[at] = v;
    else
      static_cast<__nv_bfloat16*>(e_.y)[at] = __float2bfloat16_rn(v);
  }
  // Of a gate and of the rows that it is for, whose shifts are `up_shift`.
  __device__ __forceinline__ void store_gated(int n, int row, const uint8_t* shift, const SumsOfRows<1>& gate, const uint8_t* up_shift,
                                              const SumsOfRows<1>& up) const {
    const auto finished = [](const SumsOfRows<1>& sum, const uint8_t* shift) { return pack(sum.value * unscale(static_cast<int8_t>(*shift)), 0); };
    const uint32_t result = gated_activation(e_.activation, finished(gate, shift), finished(up, up_shift));
    static_cast<uint16_t*>(e_.y)[static_cast<size_t>(n) * (m_ / 2) + row] = static_cast<uint16_t>(result);
  }

 private:
  const Epilogue& e_;
  int m_;
};

template <>
class RowResults<2> {
 public:
  __device__ __forceinline__ RowResults(const Epilogue& e, int m) : one_(e, m) {}
  __device__ __forceinline__ void store(int n, int row, const uint8_t* shifts, const SumsOfRows<2>& sums) const {
    one_.store(n, row, shifts, {sums.value.x});
    one_.store(n, row + 1, shifts + 1, {sums.value.y});
  }
  __device__ __forceinline__ void store_gated(int n, int row, const uint8_t* shifts, const SumsOfRows<2>& gate, const uint8_t* up_shifts,
                                              const SumsOfRows<2>& up) const {
    one_.store_gated(n, row, shifts, {gate.value.x}, up_shifts, {up.value.x});
    one_.store_gated(n, row + 1, shifts + 1, {gate.value.y}, up_shifts + 1, {up.value.y});
  }

 private:
  RowResults<1> one_;
};

template <>
class RowResults<4> {
 public:
  __device__ __forceinline__ RowResults(const Epilogue& e, int m) : e_(e), m_(m), fours_(in_fours(e, m)) {}
  __device__ __forceinline__ void store(int n, int row, const uint8_t* shifts, const SumsOfRows<4>& sums) const {
    store_rows(e_, m_, fours_, n, rows(row, shifts), sums.value);
  }
  __device__ __forceinline__ void store_gated(int n, int row, const uint8_t* shifts, const SumsOfRows<4>& gate, const uint8_t* up_shifts,
                                              const SumsOfRows<4>& up) const {
    lane_planar::store_gated(e_, m_, n, row, rounded(rows(row, shifts).finish(gate.value)), rounded(rows(row, up_shifts).finish(up.value)));
  }

 private:
  __device__ __forceinline__ FourRows rows(int row, const uint8_t* shifts) const {
    return FourRows(e_, m_, row, *reinterpret_cast<const uint32_t*>(shifts));
  }
  const Epilogue& e_;
  int m_;
  bool fours_;
};

// What warps have left in shared memory, as `plan` says. Of one CTA, all of whose threads call `finish`, once.
template <int kGroupRows, int kPitch, int kThreads>
struct DirectSums {
  const DirectArgs& args;
  uint8_t* memory;         // of the CTA,
  uint32_t shared;         // its address,
  uint32_t barrier;        // and its barrier for sums of other CTAs
  const uint16_t* owners;  // which warps share a row group: first | last << 8
  int ranks, rank, cluster;
  int groups;     // row groups of this cluster
  bool has_work;  // of this CTA: otherwise its sums are zero

  // `kRows` rows of a column are a thread's at once.
  template <int kRows>
  __device__ __forceinline__ void finish() const {
    constexpr uint32_t kGroupItems = kGroupRows / kRows, kChunkItems = 4 / kRows;
    const DirectPlan& plan = args.plan;
    const uint32_t columns = 1u << plan.log_n, per_rank = groups * plan.chunks << plan.log_n;  // chunks of four rows
    const uint32_t received = plan.received;
    using Sums = SumsOfRows<kRows>;
    const RowResults<kRows> results(args.epilogue, args.w.m);
    const auto sums_at = [&](uint32_t offset) { return *reinterpret_cast<const Sums*>(memory + offset); };
    const auto row_of = [&](int group, int row) {  // of the matrix
      return (cluster + (group >> plan.gated) * plan.clusters + (group & plan.gated ? plan.half : 0)) * kGroupRows + row;
    };
    const auto shifts_of = [&](int group, int row) { return memory + plan.shift + group * kGroupRows + row; };
    const auto write = [&](int group, int n, int row, const Sums& sums) { results.store(n, row_of(group, row), shifts_of(group, row), sums); };
    const auto write_gated = [&](int group, int n, int row, const Sums& gate, const Sums& up) {
      results.store_gated(n, row_of(group, row), shifts_of(group, row), gate, shifts_of(group + 1, row), up);
    };
    const auto sum_of_warps = [&](uint32_t group, uint32_t n, uint32_t item) {
      Sums sums = {};
      if (has_work) {
        const uint32_t at = (n * kPitch + item * kRows) * 4, first = owners[group] & 255, last = owners[group] >> 8;
#pragma unroll 4
        for (uint32_t i = first; i < last; ++i) sums.add(sums_at(i * plan.area + at));
        sums.add(sums_at(plan.finished + (group << plan.log_n) * (kPitch * 4) + at));
      }
      return sums;
    };
    const int pairs = ranks == 1 ? plan.gated : 0;
#pragma unroll 1
    for (uint32_t o = threadIdx.x; o < (groups >> pairs) * kGroupItems << plan.log_n; o += kThreads) {
      const uint32_t item = o % kGroupItems, n = o / kGroupItems & (columns - 1), group = o / kGroupItems >> plan.log_n << pairs;
      if (n >= args.n) continue;
      const Sums sums = sum_of_warps(group, n, item);
      if (pairs) {
        write_gated(group, n, item * kRows, sums, sum_of_warps(group + 1, n, item));
      } else if (ranks == 1) {
        write(group, n, item * kRows, sums);
      } else {
        const uint32_t chunk = item / kChunkItems, which = chunk * plan.magic >> 16, slot = ((group * plan.chunks + which) << plan.log_n) + n;
        ptx::store_cluster(shared + received + (rank * per_rank + slot) * 16 + item % kChunkItems * sizeof(Sums), barrier, chunk - which * ranks,
                           sums.value);
      }
    }
    if (ranks == 1) return;
    ptx::barrier_wait(barrier, 0);
    const auto sum_of_ranks = [&](uint32_t slot, uint32_t item) {
      Sums sums = {};
#pragma unroll 4
      for (int i = 0; i < ranks; ++i) sums.add(sums_at(received + (i * per_rank + slot) * 16 + item * sizeof(Sums)));
      return sums;
    };
    // Slot o of this rank: item of a chunk, column, chunk, row group from the inside out; row groups are few, so they are counted.
    const uint32_t group_slots = plan.chunks << plan.log_n;
#pragma unroll 1
    for (uint32_t o = threadIdx.x; o < (per_rank >> plan.gated) * kChunkItems; o += kThreads) {
      const uint32_t item = o % kChunkItems, slot = o / kChunkItems, n = slot & (columns - 1);
      int group = 0, which = slot >> plan.log_n;
      for (; which >= plan.chunks; which -= plan.chunks) ++group;
      const int row = (which * ranks + rank) * 4 + item * kRows;
      if (n >= args.n || row >= kGroupRows) continue;
      if (plan.gated) {
        const uint32_t gate = slot + group * group_slots;  // behind as many gates there are as many others
        write_gated(2 * group, n, row, sum_of_ranks(gate, item), sum_of_ranks(gate + group_slots, item));
      } else {
        write(group, n, row, sum_of_ranks(slot, item));
      }
    }
  }
};

}  // namespace jaxzip::lane_planar
