// The small kernels between the matmuls of a decode step: RMSNorm and SwiGLU, rows of bf16, fp32 inside, rounded once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace jaxzip::decode_chain {

// Both launch on `stream`: no allocation, no synchronisation, safe to capture. `overlap` asks for programmatic dependent launch:
// only x and y may then depend on the kernel before.

// y[n, features] = x / sqrt(mean(x^2) + eps) * scale[features]. The order of the sum depends on `features` only.
cudaError_t launch_rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* scale, __nv_bfloat16* y, int n, int features, float eps,
                            cudaStream_t stream, bool overlap);

// y[n, features] = silu(gate) * up of x[n, 2 * features], whose rows hold gate, then up.
cudaError_t launch_swiglu(const __nv_bfloat16* x, __nv_bfloat16* y, int n, int features, cudaStream_t stream, bool overlap);

}  // namespace jaxzip::decode_chain
