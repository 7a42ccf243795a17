// Attention of one query a row: a cluster takes a row's KV head, its CTAs' warps the units of 16 slots in turn. Keys and values come through
// a ring of each warp (cache_ring.cuh) and are the A operands of two products, whose B operands are a group's queries and weights:
//
//   scores[slot, head] = keys[slot, d] queries[head, d].T       lane (g, j) has d = 32 i + 8 j .. + 8 of two slots, as of its query
//   sums[d, head] += values[slot, d].T weights[slot, head]
//
// with g = lane / 4, j = lane % 4. Row g of the scores is slot slot_of(g): eight lanes that load 16 bytes at once have two of them, which
// differ by 4, so that the swizzle puts them into different banks. Warps add up in a fixed order, then CTAs do, through distributed shared
// memory.
#include "attention.h"

#include <algorithm>
#include <utility>

#include "../lane_planar/ptx.cuh"
#include "../lane_planar/resident.h"
#include "../launch.h"
#include "../tensor_maps.h"
#include "attention.cuh"
#include "cache_ring.cuh"

namespace jaxzip::decode_chain {
namespace {

constexpr int kMaxSplits = 8;
// Warps that an SM has registers for.
constexpr int warps_of_sm(int head_dim, int tiles) { return head_dim < 256 && tiles == 1 ? 16 : 8; }
constexpr float kLog2e = 1.44269504f;

struct Arguments {
  Attention attention;
  CUtensorMap keys, values;
  int splits, ring_slots, ring_bytes;  // of a warp
  // What would be divided by on the way to the first copy, where nothing hides it: 200 cycles each.
  int group;                // heads of a KV head
  uint32_t step_inverse;    // 2^32 / (splits * kWarps), rounded up
};

__device__ __forceinline__ int slot_of(int g) { return (g >> 1) | ((g & 1) << 2); }

template <int kD, int kTiles, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, warps_of_sm(kD, kTiles) / kWarps) attend(const __grid_constant__ Arguments args) {
  constexpr int kHeads = 8 * kTiles, kHalfBytes = kUnit * 128;  // of a ring's slot: what has 64 elements of each cache slot
  using FoundHere = Found<kD, kHeads>;
  extern __shared__ __align__(1024) uint8_t memory[];  // rings, which later have what their warp has found, barriers, and what the CTA has
  const Attention& a = args.attention;
  ptx::launch_dependents();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, j = lane & 3;
  const int rank = blockIdx.x, kv_head = blockIdx.y, row_index = blockIdx.z;
  const int group = args.group, splits = args.splits;
  uint8_t* barriers = memory + kWarps * args.ring_bytes;
  FoundHere* of_cta = reinterpret_cast<FoundHere*>(barriers + kWarps * args.ring_slots * 8);
  const auto of_warp = [&](int w) { return reinterpret_cast<FoundHere*>(memory + w * args.ring_bytes); };

  const int last_slot = *a.own, start = a.start[row_index];
  CacheRing<kD> ring(args.keys, args.values, ptx::shared_address(of_warp(warp)), ptx::shared_address(barriers) + 8 * warp * args.ring_slots,
                     args.ring_slots, lane == 0);
  const __nv_bfloat16* qkv = a.qkv + static_cast<size_t>(row_index) * (a.heads + 2 * a.kv_heads) * kD;
  const __nv_bfloat16 *new_key = qkv + (a.heads + kv_head) * kD, *new_value = new_key + a.kv_heads * kD;
  // All that the first product needs besides keys is asked for before the ring is: behind that it would wait for as long as the ring takes.
  uint32_t query[kTiles][kD / 32][4], key[kD / 32][4] = {};
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int member = 8 * t + g;
    load_head<kD>(qkv + (kv_head * group + member) * kD, member < group, j, query[t]);
  }
  const Angles<kD> angles(a, row_index, j);
  const Scales<kD> q_scales(a.q_norm, true, j);

  const int own = min(last_slot, a.slots - 1);
  const int first = max(a.window ? max(start, own - (a.window - 1)) : start, 0);
  const int units = own < first ? 0 : (own - first) / kUnit + 1, step = splits * kWarps;
  int unit = rank + splits * warp;  // so that few units are spread over CTAs
  const uint32_t behind = units - 1 - unit;
  const bool has_last = unit < units && behind == __umulhi(behind, args.step_inverse) * step;
  uint4 value = {};  // of the own slot: piece `piece`
  const int piece = lane % (kD / 8);
  if (has_last) {
    load_head<kD>(new_key, true, j, key);
    value = __ldcg(reinterpret_cast<const uint4*>(new_value + 8 * piece));
  }
  const Scales<kD> k_scales(a.k_norm, has_last, j);
  const size_t cache_row = (static_cast<size_t>(row_index) * a.kv_heads + kv_head) * a.slots;
  ring.begin(static_cast<int>(cache_row) + first, unit, step, units);

#pragma unroll
  for (int t = 0; t < kTiles; ++t) norm_and_rotate(a.q_norm, a.norm_offset, q_scales, angles, query[t]);
  if (has_last) {
    norm_and_rotate(a.k_norm, a.norm_offset, k_scales, angles, key);
    const size_t at = (cache_row + own) * kD;
    uint4* to = reinterpret_cast<uint4*>(a.keys + at + 8 * j);
#pragma unroll
    for (int i = 0; i < kD / 32; ++i)
      if (g == 0) to[4 * i] = make_uint4(key[i][0], key[i][1], key[i][2], key[i][3]);
    if (lane < kD / 8) *reinterpret_cast<uint4*>(a.values + at + 8 * lane) = value;
  }
  // Powers of two, so that scores are in their logarithm.
  const float scale = a.cap == 0 ? kLog2e / a.divisor : 1 / (a.divisor * a.cap), cap = a.cap * kLog2e;

  float sums[kTiles][kD / 16][4] = {};
  float largest[kTiles][2], total[kTiles][2] = {};  // of heads 2 j and 2 j + 1; totals of this lane's slots
#pragma unroll
  for (int t = 0; t < kTiles; ++t) largest[t][0] = largest[t][1] = -INFINITY;

  // Where this lane reads: of keys 16 bytes of row slot_of(g), of values the row of a matrix that four matrices of 8x8 need an address of.
  const int slot = slot_of(g), matrix_slot = slot_of(lane & 7);
  const uint32_t from_keys = slot * 128 + ((j ^ slot) << 4);
  const uint32_t from_values = (matrix_slot + 8 * (lane >> 4)) * 128 + ((((lane >> 3) & 1) ^ matrix_slot) << 4);

#pragma unroll 1
  for (; unit < units; unit += step) {
    const int at = first + unit * kUnit;
    const bool last = unit + 1 == units;
    const uint32_t keys = ring.wait();
    if (last) {
      const int row = own - at;
#pragma unroll
      for (int i = 0; i < kD / 32; ++i)
        if (g == 0)
          ptx::store_shared(keys + (i >> 1) * kHalfBytes + row * 128 + (((4 * (i & 1) + j) ^ (row & 7)) << 4), key[i][0], key[i][1], key[i][2],
                            key[i][3]);
      __syncwarp();
    }
    float scores[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      uint32_t of[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) ptx::load_shared(of[half], keys + (i >> 1) * kHalfBytes + half * 1024 + (from_keys ^ ((i & 1) << 6)));
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        const uint32_t k[4] = {of[0][pair], of[1][pair], of[0][pair + 1], of[1][pair + 1]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) ptx::mma(scores[t], k, query[t][i][pair], query[t][i][pair + 1]);
      }
    }
    ring.next();

    uint32_t weights[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float(&s)[4] = scores[t];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i] *= scale;
        if (a.cap != 0) s[i] = cap * tanhf(s[i]);
        if (at + slot + 8 * (i >> 1) > own) s[i] = -INFINITY;
      }
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        float most = fmaxf(s[head], s[head + 2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
        most = fmaxf(most, largest[t][head]);
        const float kept = share_of(largest[t][head], most);
        largest[t][head] = most;
        s[head] = exp2f(s[head] - most);
        s[head + 2] = exp2f(s[head + 2] - most);
        total[t][head] = fmaf(total[t][head], kept, s[head] + s[head + 2]);
#pragma unroll
        for (int i = 0; i < kD / 16; ++i) sums[t][i][head] *= kept, sums[t][i][head + 2] *= kept;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) weights[t][half] = ptx::transpose_matrix(pack(s[2 * half], s[2 * half + 1]));
    }
    const uint32_t values = ring.wait();
    if (last) {
      // Slots behind the own one are masked, but their values are multiplied by zero, so they must be finite where the own value is.
      for (int row = own - at + lane / (kD / 8); row < kUnit; row += 32 / (kD / 8))
        ptx::store_shared(values + (piece >> 3) * kHalfBytes + row * 128 + (((piece & 7) ^ (row & 7)) << 4), value.x, value.y, value.z, value.w);
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      uint32_t v[4];
      ptx::load_matrices_transposed(v, values + (i >> 2) * kHalfBytes + (from_values ^ ((i & 3) << 5)));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) ptx::mma(sums[t][i], v, weights[t][0], weights[t][1]);
    }
    ring.next();
  }

  FoundHere* found = of_warp(warp);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float sum = total[t][head];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      const int member = 8 * t + 2 * j + head;
      if (member >= group) continue;
      if (g == 0) found->largest[member] = largest[t][head], found->total[member] = sum;
#pragma unroll
      for (int i = 0; i < kD / 16; ++i) {
        found->sums[member][16 * i + g] = sums[t][i][head];
        found->sums[member][16 * i + 8 + g] = sums[t][i][head + 2];
      }
    }
  __syncthreads();

  const int vectors = group * kD / 4;
  __nv_bfloat16* out = a.out + (static_cast<size_t>(row_index) * a.heads + kv_head * group) * kD;
  const auto store = [&](int vector, const float4& sum, float total_of_head) {
    const float factor = total_of_head == 0 ? 0 : 1 / total_of_head;  // a row in the padding sees nothing
    *reinterpret_cast<uint2*>(out + 4 * vector) = make_uint2(pack(sum.x * factor, sum.y * factor), pack(sum.z * factor, sum.w * factor));
  };
  float most, all;
  for (int i = threadIdx.x; i < vectors; i += kWarps * 32) {
    const int head = 4 * i / kD, d = 4 * i % kD;
    const float4 sum = add_up(kWarps, head, d, most, all, of_warp);
    if (splits == 1) {
      store(i, sum, all);
      continue;
    }
    *reinterpret_cast<float4*>(&of_cta->sums[head][d]) = sum;
    if (d == 0) of_cta->largest[head] = most, of_cta->total[head] = all;
  }
  if (splits == 1) return;
  ptx::cluster_sync();
  for (int i = rank + splits * threadIdx.x; i < vectors; i += splits * kWarps * 32) {
    const float4 sum = add_up(splits, 4 * i / kD, 4 * i % kD, most, all, [&](int r) { return ptx::of_rank(of_cta, r); });
    store(i, sum, all);
  }
  ptx::cluster_sync();  // others may still read
}

template <int kD, int kTiles, int kWarps>
cudaError_t launch(const Attention& a, int splits, cudaStream_t stream) {
  using FoundHere = Found<kD, 8 * kTiles>;
  constexpr int kSlotBytes = CacheRing<kD>::kBytes;
  const size_t rows = static_cast<size_t>(a.n) * a.kv_heads * a.slots;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  Arguments args = {a};
  for (const auto& [map, cache] : {std::pair(&args.keys, a.keys), std::pair(&args.values, a.values)})
    if (const cudaError_t error = make_rows_map(map, cache, static_cast<int>(rows), kD, kUnit, kD / 64, true)) return error;
  // No more than a warp's units, or than keeps memory busy: the next kernel's CTAs begin in what the rings leave.
  constexpr int kMostSlots = std::max(3, (12 << 10) / kSlotBytes);
  const int units_of_warp = (a.slots + kUnit * splits * kWarps - 1) / (kUnit * splits * kWarps), behind_rings = splits == 1 ? 0 : sizeof(FoundHere);
  args.splits = splits;
  args.group = a.heads / a.kv_heads;
  args.step_inverse = static_cast<uint32_t>(((1ull << 32) + splits * kWarps - 1) / (splits * kWarps));
  args.ring_slots = std::min(2 * units_of_warp, kMostSlots);
  args.ring_bytes = (std::max<int>(args.ring_slots * kSlotBytes, sizeof(FoundHere)) + 1023) / 1024 * 1024;

  const Launch launch(dim3(splits, a.kv_heads, a.n), kWarps * 32, kWarps * (args.ring_bytes + 8 * args.ring_slots) + behind_rings, stream, splits,
                      false);
  auto* kernel = attend<kD, kTiles, kWarps>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.config.dynamicSmemBytes)))
    return error;
  return cudaLaunchKernelEx(&launch.config, kernel, args);
}

template <int kD, int kTiles>
cudaError_t launch(const Attention& a, const AttentionPlan& plan, cudaStream_t stream) {
  if (plan.warps == 2) return launch<kD, kTiles, 2>(a, plan.splits, stream);
  if (plan.warps == 4) return launch<kD, kTiles, 4>(a, plan.splits, stream);
  return plan.warps == 8 ? launch<kD, kTiles, 8>(a, plan.splits, stream) : cudaErrorInvalidValue;
}

}  // namespace

bool attention_takes(int heads, int kv_heads, int head_dim) {
  const int most = head_dim < 256 ? 16 : 8;  // heads of a KV head: their sums are in registers
  return kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= most && (head_dim == 64 || head_dim == 128 || head_dim == 256);
}

AttentionPlan plan_attention(const Attention& a, bool fixed) {
  if (fixed) return {4, 4};
  // One wave of CTAs is fastest: of few rows by clusters, which share a row's KV head, of many with as many warps an SM as it has registers for.
  const int pairs = a.n * a.kv_heads, warps = warps_of_sm(a.head_dim, a.heads / a.kv_heads > 8 ? 2 : 1);
  for (int splits = kMaxSplits; splits >= 1; --splits)
    if (pairs <= lane_planar::kResident[0][splits - 1]) return {8, splits};
  const int ctas = pairs <= lane_planar::kResident[1][0] ? 2 : 4;  // an SM
  return {warps / ctas, 1};
}

cudaError_t launch_attention(const Attention& a, const AttentionPlan& plan, cudaStream_t stream) {
  if (!attention_takes(a.heads, a.kv_heads, a.head_dim) || plan.splits < 1 || plan.splits > kMaxSplits) return cudaErrorInvalidValue;
  const bool two_tiles = a.heads / a.kv_heads > 8;
  if (a.head_dim == 64) return two_tiles ? launch<64, 2>(a, plan, stream) : launch<64, 1>(a, plan, stream);
  if (a.head_dim == 128) return two_tiles ? launch<128, 2>(a, plan, stream) : launch<128, 1>(a, plan, stream);
  return launch<256, 1>(a, plan, stream);
}

}  // namespace jaxzip::decode_chain
