// RMSNorm, a CTA a row. The scale is loaded before the kernel waits for the one that writes x.
#include "rows.cuh"
#include "rows.h"

namespace jaxzip::decode_chain {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMaxVectors = 4;  // of a thread's registers: rows of up to 16384

// The sum over the CTA, in a fixed order, for every thread.
__device__ __forceinline__ float sum_of_all(float sum) {
  __shared__ float sums[kWarps];
#pragma unroll
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = sums[threadIdx.x % kWarps];
#pragma unroll
  for (int distance = kWarps / 2; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}

__device__ __forceinline__ float inverse_rms(float squares, int features, float eps) {
  return rsqrtf(__fdiv_rn(sum_of_all(squares), static_cast<float>(features)) + eps);
}

// Rows of whole vectors: x stays in registers.
template <int kVectors>
__global__ void __launch_bounds__(kThreads) rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* scale, __nv_bfloat16* y, int features, float eps) {
  ptx::launch_dependents();
  const int vectors = features / kVector;
  const size_t row = static_cast<size_t>(blockIdx.x) * vectors;
  uint4 scales[kVectors], values[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (threadIdx.x + i * kThreads < vectors) scales[i] = reinterpret_cast<const uint4*>(scale)[threadIdx.x + i * kThreads];
  ptx::wait_for_previous_grid();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    values[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x + i * kThreads < vectors) values[i] = reinterpret_cast<const uint4*>(x)[row + threadIdx.x + i * kThreads];
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    for (const uint32_t pair : {values[i].x, values[i].y, values[i].z, values[i].w}) {
      const float2 v = unpack(pair);
      squares = fmaf(v.x, v.x, squares);
      squares = fmaf(v.y, v.y, squares);
    }
  const float factor = inverse_rms(squares, features, eps);
  const auto scaled = [&](uint32_t pair, uint32_t scale_pair) {
    const float2 v = unpack(pair), s = unpack(scale_pair);
    return pack(v.x * factor * s.x, v.y * factor * s.y);
  };
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (threadIdx.x + i * kThreads < vectors)
      reinterpret_cast<uint4*>(y)[row + threadIdx.x + i * kThreads] =
          make_uint4(scaled(values[i].x, scales[i].x), scaled(values[i].y, scales[i].y), scaled(values[i].z, scales[i].z),
                     scaled(values[i].w, scales[i].w));
}

// Any row.
__global__ void __launch_bounds__(kThreads) rms_norm_plain(const __nv_bfloat16* x, const __nv_bfloat16* scale, __nv_bfloat16* y, int features, float eps) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grid();
  x += static_cast<size_t>(blockIdx.x) * features;
  y += static_cast<size_t>(blockIdx.x) * features;
  float squares = 0;
  for (int i = threadIdx.x; i < features; i += kThreads) {
    const float v = __bfloat162float(x[i]);
    squares = fmaf(v, v, squares);
  }
  const float factor = inverse_rms(squares, features, eps);
  for (int i = threadIdx.x; i < features; i += kThreads)
    y[i] = __float2bfloat16_rn(__bfloat162float(x[i]) * factor * __bfloat162float(scale[i]));
}

}  // namespace

cudaError_t launch_rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* scale, __nv_bfloat16* y, int n, int features, float eps,
                            cudaStream_t stream, bool overlap) {
  const int vectors = (features + kThreads * kVector - 1) / (kThreads * kVector);
  auto* kernel = vectors == 1 ? rms_norm<1> : vectors == 2 ? rms_norm<2> : rms_norm<kMaxVectors>;
  if (vectors > kMaxVectors || !whole_vectors(features, x, scale, y)) kernel = rms_norm_plain;
  return launch(kernel, n, kThreads, stream, overlap, x, scale, y, features, eps);
}

}  // namespace jaxzip::decode_chain
