// The small kernels between the matmuls of a decode step: norms and gated activations, rows of bf16, fp32 inside, rounded once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "../epilogue.h"

namespace jaxzip::decode_chain {

// All launch on `stream`: no allocation, no synchronisation, safe to capture. `overlap` asks for programmatic dependent launch:
// nothing but scales may then be read before the kernel before has ended.

// RMSNorm of rows x[features]: x / sqrt(mean(x^2) + eps) * (scale[features] + offset). The order of the sum depends on `features` only.
struct Norm {
  const __nv_bfloat16* scale = nullptr;
  float eps = 0;
};
// What changes no scale, not even that of -0.
constexpr float kNoOffset = -0.0f;

// y[n, features] = norm(x).
cudaError_t launch_rms_norm(const __nv_bfloat16* x, const Norm& norm, float offset, __nv_bfloat16* y, int n, int features, cudaStream_t stream,
                            bool overlap);

// sum[n, features] = residual + inner(x), y = outer(sum); inner(x) and sum are rounded, as they are where each is a kernel of its own.
cudaError_t launch_norm_add_norm(const __nv_bfloat16* x, const Norm& inner, const __nv_bfloat16* residual, __nv_bfloat16* sum, const Norm& outer,
                                 float offset, __nv_bfloat16* y, int n, int features, cudaStream_t stream, bool overlap);

// y[n, features] = activation(gate) * up of x[n, 2 * features], whose rows hold gate, then up.
cudaError_t launch_gated_activation(Activation activation, const __nv_bfloat16* x, __nv_bfloat16* y, int n, int features, cudaStream_t stream,
                                    bool overlap);

}  // namespace jaxzip::decode_chain
