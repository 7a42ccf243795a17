// Attention's last step: the sums of a sequence's chunks, put together in their order. Meanwhile the next kernel asks for its weights.
#include "rows.cuh"
#include "rows.h"

namespace jaxzip::decode_chain {
namespace {

constexpr int kMaxHeadDim = 1024;  // a thread each
constexpr int kTogether = 16;      // chunks whose sums are on their way at once

// A CTA a row and head, a thread a feature. A chunk behind the row's own slot was not computed and is not read.
__global__ void gather_chunks(const AttentionChunks a) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grid();
  const int heads = a.kv_heads * a.group, row = blockIdx.x / heads, head = blockIdx.x % heads;
  const int kv_head = head / a.group, member = head % a.group;
  const int own = a.own[0], start = a.window ? max(a.start[row], own - (a.window - 1)) : a.start[row];
  const int used = own < start ? 0 : min((own - start) / a.chunk_slots + 1, a.chunks);
  const size_t of_head = (static_cast<size_t>(row) * a.kv_heads + kv_head) * a.chunks;
  const float* largest = a.largest + of_head * a.group + static_cast<size_t>(member) * a.chunks;
  const float* total = a.total + of_head * a.group + static_cast<size_t>(member) * a.chunks;
  const float* sums = a.sums + (of_head * a.group + member) * a.head_dim + threadIdx.x;
  const size_t step = static_cast<size_t>(a.group) * a.head_dim;  // from a chunk's sums to the next one's
  float most = -INFINITY;
  for (int first = 0; first < used; first += kTogether)
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i < used) most = fmaxf(most, largest[first + i]);
  float weights = 0, sum = 0;
  for (int first = 0; first < used; first += kTogether) {
    float share[kTogether], weight[kTogether], part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const bool inside = first + i < used;
      share[i] = inside ? largest[first + i] : 0;
      weight[i] = inside ? total[first + i] : 0;
      part[i] = inside ? sums[(first + i) * step] : 0;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i < used) {
        const float e = __expf(share[i] - most);
        weights = fmaf(e, weight[i], weights);
        sum = fmaf(e, part[i], sum);
      }
  }
  // A query in the padding has no chunk; NaN from there would spread.
  a.gathered[static_cast<size_t>(blockIdx.x) * a.head_dim + threadIdx.x] = __float2bfloat16_rn(used ? sum / weights : 0.0f);
}

}  // namespace

cudaError_t launch_gather_chunks(const AttentionChunks& a, int n, cudaStream_t stream, bool overlap) {
  if (a.head_dim < 1 || a.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  return launch(gather_chunks, n * a.kv_heads * a.group, a.head_dim, stream, overlap, a);
}

}  // namespace jaxzip::decode_chain
