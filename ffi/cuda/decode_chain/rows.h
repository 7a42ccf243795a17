// The small kernels around the matmuls of a decode step: attention's gather, RMSNorm and SwiGLU; fp32 inside, rows of bf16, rounded once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace jaxzip::decode_chain {

// What attention computed of chunks of each sequence's slots, and has not put together.
struct AttentionChunks {
  const float* sums;      // [n, kv_heads, chunks, group, head_dim]
  const float* largest;   // [n, kv_heads, group, chunks]: scores
  const float* total;     // the same shape: of exponentials
  const int32_t* start;   // [n]: first slot of each sequence
  const int32_t* own;     // [1]: the slot of each sequence's query
  int kv_heads, group, chunks, head_dim, chunk_slots;
  int window;               // slots that a query sees; 0: all
  __nv_bfloat16* gathered;  // result: [n, kv_heads * group * head_dim], zero for a query in the padding
};

// All launch on `stream`: no allocation, no synchronisation, safe to capture. `overlap` asks for programmatic dependent launch:
// only x and y, or the arrays of `a`, may then depend on the kernel before.

// A sequence's chunks are added in their order, each with its exponential; head_dim <= 1024.
cudaError_t launch_gather_chunks(const AttentionChunks& a, int n, cudaStream_t stream, bool overlap);

// y[n, features] = x / sqrt(mean(x^2) + eps) * scale[features]. The order of the sum depends on `features` only.
cudaError_t launch_rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* scale, __nv_bfloat16* y, int n, int features, float eps,
                            cudaStream_t stream, bool overlap);

// y[n, features] = silu(gate) * up of x[n, 2 * features], whose rows hold gate, then up.
cudaError_t launch_swiglu(const __nv_bfloat16* x, __nv_bfloat16* y, int n, int features, cudaStream_t stream, bool overlap);

}  // namespace jaxzip::decode_chain
