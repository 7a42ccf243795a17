// Attention of one query a row: a cluster takes a row's KV head, its CTAs' warps the units of 16 slots in turn. Keys and values go from
// memory straight into the registers of the products that they are operands of: both are taken in an order of their own, keys of the sum's
// index and values of the rows, which makes what a lane needs 16 bytes that follow each other:
//
//   scores[slot, head] = keys[slot, d] queries[head, d].T       lane (g, j) has d = 32 i + 8 j .. + 8 of slots g and g + 8, as of its query
//   sums[d, head] += values[slot, d].T weights[slot, head]      lane (g, j) has d = 64 h + 8 g .. + 8 of slots 2 j, 2 j + 1, and 8 more
//
// with g = lane / 4, j = lane % 4. Warps add up in a fixed order, then CTAs do, through distributed shared memory.
#include "attention.h"

#include "../lane_planar/resident.h"
#include "attention.cuh"

namespace jaxzip::decode_chain {
namespace {

constexpr int kMaxSplits = 8, kWarpsOfSm = 8;
constexpr float kLog2e = 1.44269504f;

template <int kD, int kTiles, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kWarpsOfSm / kWarps) attend(const __grid_constant__ Attention a, int splits) {
  constexpr int kHeads = 8 * kTiles;
  using FoundOfWarp = Found<kD, kHeads>;
  constexpr bool kAhead = kD < 256;  // the next unit is asked for while one is multiplied; there are not registers for more
  extern __shared__ __align__(16) uint8_t memory[];
  FoundOfWarp* found = reinterpret_cast<FoundOfWarp*>(memory);  // a warp's each, then the CTA's
  ptx::launch_dependents();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, j = lane & 3;
  const int rank = blockIdx.x, kv_head = blockIdx.y, row_index = blockIdx.z;
  const int group = a.heads / a.kv_heads;

  const __nv_bfloat16* qkv = a.qkv + static_cast<size_t>(row_index) * (a.heads + 2 * a.kv_heads) * kD;
  const __nv_bfloat16 *new_key = qkv + (a.heads + kv_head) * kD, *new_value = new_key + a.kv_heads * kD;
  const size_t in_cache = (static_cast<size_t>(row_index) * a.kv_heads + kv_head) * a.slots * kD;
  Row<kD> row = {a.start[row_index], *a.own, a.keys + in_cache, a.values + in_cache, new_key, new_value};
  row.own = min(row.own, a.slots - 1);
  row.first = max(a.window ? max(row.first, row.own - (a.window - 1)) : row.first, 0);
  const int units = row.own < row.first ? 0 : (row.own - row.first) / kUnit + 1, step = splits * kWarps;

  int unit = rank + splits * warp;  // so that few units are spread over CTAs
  uint32_t keys[2][kD / 32][4], values[4][kD / 64][4];
  const auto load_first = [&] {
    row.load_keys(unit, g, j, keys);
    if (kAhead) row.load_values(unit, g, j, values);
  };
  // The kernel before writes queries, new keys and new values: all that the last unit needs, and nothing of the others' slots.
  if (unit + 1 < units) load_first();
  ptx::wait_for_previous_grid();
  if (unit + 1 == units) load_first();
  uint32_t query[kTiles][kD / 32][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int member = 8 * t + g;
    load_head<kD>(qkv + (kv_head * group + member) * kD, member < group, j, query[t]);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) norm_and_rotate<kD>(a, row_index, a.q_norm, j, query[t]);
  // Powers of two, so that scores are in their logarithm.
  const float scale = a.cap == 0 ? kLog2e / a.divisor : 1 / (a.divisor * a.cap), cap = a.cap * kLog2e;

  float sums[kTiles][kD / 16][4] = {};
  float largest[kTiles][2], total[kTiles][2] = {};  // of heads 2 j and 2 j + 1; totals of this lane's slots
#pragma unroll
  for (int t = 0; t < kTiles; ++t) largest[t][0] = largest[t][1] = -INFINITY;

#pragma unroll 1
  for (; unit < units; unit += step) {
    const int at = row.first + unit * kUnit;
    if (at + kUnit > row.own) {  // the last unit
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t key[kD / 32][4];
#pragma unroll
        for (int i = 0; i < kD / 8; ++i) key[i / 4][i % 4] = keys[half][i / 4][i % 4];
        norm_and_rotate<kD>(a, row_index, a.k_norm, j, key);
        if (at + g + 8 * half != row.own) continue;
        uint4* to = reinterpret_cast<uint4*>(a.keys + in_cache + static_cast<size_t>(row.own) * kD + 8 * j);
#pragma unroll
        for (int i = 0; i < kD / 32; ++i) {
#pragma unroll
          for (int word = 0; word < 4; ++word) keys[half][i][word] = key[i][word];
          to[4 * i] = make_uint4(key[i][0], key[i][1], key[i][2], key[i][3]);
        }
      }
      const __nv_bfloat16* from = new_value + 8 * lane;
      __nv_bfloat16* to = a.values + in_cache + static_cast<size_t>(row.own) * kD + 8 * lane;
      if (lane < kD / 8) *reinterpret_cast<uint4*>(to) = __ldcg(reinterpret_cast<const uint4*>(from));
    }
    float scores[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kD / 32; ++i)
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        const uint32_t k[4] = {keys[0][i][pair], keys[1][i][pair], keys[0][i][pair + 1], keys[1][i][pair + 1]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) ptx::mma(scores[t], k, query[t][i][pair], query[t][i][pair + 1]);
      }
    if (!kAhead)
      row.load_values(unit, g, j, values);
    else if (unit + step < units)
      row.load_keys(unit + step, g, j, keys);

    uint32_t weights[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float(&s)[4] = scores[t];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i] *= scale;
        if (a.cap != 0) s[i] = cap * tanhf(s[i]);
        if (at + g + 8 * (i >> 1) > row.own) s[i] = -INFINITY;
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
#pragma unroll
    for (int h = 0; h < kD / 64; ++h)
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t v[4] = {__byte_perm(values[0][h][word], values[1][h][word], 0x5410), __byte_perm(values[0][h][word], values[1][h][word], 0x7632),
                               __byte_perm(values[2][h][word], values[3][h][word], 0x5410), __byte_perm(values[2][h][word], values[3][h][word], 0x7632)};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) ptx::mma(sums[t][4 * h + word], v, weights[t][0], weights[t][1]);
      }
    if (unit + step < units) {
      if (kAhead)
        row.load_values(unit + step, g, j, values);
      else
        row.load_keys(unit + step, g, j, keys);
    }
  }

#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float sum = total[t][head];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      const int member = 8 * t + 2 * j + head;
      if (member >= group) continue;
      if (g == 0) found[warp].largest[member] = largest[t][head], found[warp].total[member] = sum;
#pragma unroll
      for (int h = 0; h < kD / 64; ++h) {
        float4* to = reinterpret_cast<float4*>(&found[warp].sums[member][64 * h + 8 * g]);
        const auto& s = sums[t];
        to[0] = make_float4(s[4 * h][head], s[4 * h][head + 2], s[4 * h + 1][head], s[4 * h + 1][head + 2]);
        to[1] = make_float4(s[4 * h + 2][head], s[4 * h + 2][head + 2], s[4 * h + 3][head], s[4 * h + 3][head + 2]);
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
    const float4 sum = add_up(kWarps, head, d, most, all, [&](int w) { return &found[w]; });
    if (splits == 1) {
      store(i, sum, all);
      continue;
    }
    *reinterpret_cast<float4*>(&found[kWarps].sums[head][d]) = sum;
    if (d == 0) found[kWarps].largest[head] = most, found[kWarps].total[head] = all;
  }
  if (splits == 1) return;
  ptx::cluster_sync();
  for (int i = rank + splits * threadIdx.x; i < vectors; i += splits * kWarps * 32) {
    const float4 sum = add_up(splits, 4 * i / kD, 4 * i % kD, most, all, [&](int r) { return ptx::of_rank(&found[kWarps], r); });
    store(i, sum, all);
  }
  ptx::cluster_sync();  // others may still read
}

template <int kD, int kTiles, int kWarps>
cudaError_t launch(const Attention& a, int splits, cudaStream_t stream, bool overlap) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(splits, a.kv_heads, a.n);
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = (kWarps + 1) * sizeof(Found<kD, 8 * kTiles>);
  config.stream = stream;
  config.attrs = attributes;
  attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
  attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
  attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
  config.numAttrs += overlap;
  auto* kernel = attend<kD, kTiles, kWarps>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.dynamicSmemBytes)))
    return error;
  return cudaLaunchKernelEx(&config, kernel, a, splits);
}

template <int kD, int kTiles>
cudaError_t launch(const Attention& a, const AttentionPlan& plan, cudaStream_t stream, bool overlap) {
  if (plan.warps == 2) return launch<kD, kTiles, 2>(a, plan.splits, stream, overlap);
  if (plan.warps == 4) return launch<kD, kTiles, 4>(a, plan.splits, stream, overlap);
  return plan.warps == 8 ? launch<kD, kTiles, 8>(a, plan.splits, stream, overlap) : cudaErrorInvalidValue;
}

}  // namespace

bool attention_takes(int heads, int kv_heads, int head_dim) {
  const int most = head_dim < 256 ? 16 : 8;  // heads of a KV head: their sums are in registers
  return kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= most && (head_dim == 64 || head_dim == 128 || head_dim == 256);
}

AttentionPlan plan_attention(const Attention& a, bool fixed) {
  if (fixed) return {4, 4};
  // Eight warps an SM, in one wave, are fastest: in few CTAs, or where there are rows enough, in many that need no cluster.
  const int pairs = a.n * a.kv_heads;
  for (int splits = kMaxSplits; splits >= 1; --splits)
    if (pairs <= lane_planar::kResident[0][splits - 1]) return {kWarpsOfSm, splits};
  return {pairs <= lane_planar::kResident[1][0] ? 4 : 2, 1};
}

cudaError_t launch_attention(const Attention& a, const AttentionPlan& plan, cudaStream_t stream, bool overlap) {
  if (!attention_takes(a.heads, a.kv_heads, a.head_dim) || plan.splits < 1 || plan.splits > kMaxSplits) return cudaErrorInvalidValue;
  const bool two_tiles = a.heads / a.kv_heads > 8;
  if (a.head_dim == 64) return two_tiles ? launch<64, 2>(a, plan, stream, overlap) : launch<64, 1>(a, plan, stream, overlap);
  if (a.head_dim == 128) return two_tiles ? launch<128, 2>(a, plan, stream, overlap) : launch<128, 1>(a, plan, stream, overlap);
  return launch<256, 1>(a, plan, stream, overlap);
}

}  // namespace jaxzip::decode_chain
