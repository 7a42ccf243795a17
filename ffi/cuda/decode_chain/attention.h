// Attention of a decode step, one new token a sequence, as a kernel of the chain: head norms, rotation, the new slot of the cache, softmax
// and its sums in one launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "rows.h"

namespace jaxzip::decode_chain {

struct Attention {
  const __nv_bfloat16* qkv;  // [n, (heads + 2 * kv_heads) * head_dim]: the heads' queries, then keys, then values
  const float *cos, *sin;    // [n, head_dim / 2]
  // The cache [n, kv_heads, slots, head_dim]; row b has the slots start[b] up to *own, and *own becomes the new token's.
  __nv_bfloat16 *keys, *values;
  const int32_t* start;  // [n]
  const int32_t* own;    // one
  __nv_bfloat16* out;    // [n, heads * head_dim]
  int n, heads, kv_heads, head_dim, slots;
  float divisor;   // of the scores
  float cap = 0;   // scores become cap * tanh(score / cap), if not 0
  int window = 0;  // only the last so many slots are seen, the own one included, if not 0
  // RMSNorm of each head's queries and keys before they are rotated, if there are scales [head_dim].
  Norm q_norm, k_norm;
  float norm_offset = 0;
};

// Whether the kernel takes this shape: head_dim of 64 or 128 with up to 16 heads to a KV head, or 256 with up to 8.
bool attention_takes(int heads, int kv_heads, int head_dim);

// How a row's KV head is shared: CTAs of a cluster, 1..8, that take its slots in turn, and warps of each, 2, 4 or 8. A row's bits depend
// on it.
struct AttentionPlan {
  int warps, splits;
};

// `fixed`: one for any n, so that a row's result depends on what it sees only, neither on n, nor on start or slots.
AttentionPlan plan_attention(const Attention& a, bool fixed);

// n up to 65535. Returns the launch's error. It starts when all before it in the stream has ended; what is behind it may overlap.
cudaError_t launch_attention(const Attention& a, const AttentionPlan& plan, cudaStream_t stream);

}  // namespace jaxzip::decode_chain
