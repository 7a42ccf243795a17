// RMSNorm, and two of them with a sum in between, a CTA a row. Scales are loaded before a kernel waits for the one that writes its rows.
#include "rows.cuh"
#include "rows.h"

namespace jaxzip::decode_chain {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMaxVectors = 4;  // of a thread's registers: rows of up to 16384

// The sum over the CTA, in a fixed order, for every thread. `sums` must not be in use.
__device__ __forceinline__ float sum_of_all(float sum, float (&sums)[kWarps]) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = sums[threadIdx.x % kWarps];
#pragma unroll
  for (int distance = kWarps / 2; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}

__device__ __forceinline__ float inverse_rms(float squares, int features, float eps, float (&sums)[kWarps]) {
  return rsqrtf(__fdiv_rn(sum_of_all(squares, sums), static_cast<float>(features)) + eps);
}

__device__ __forceinline__ float normed(float x, float factor, float scale, float offset) { return x * factor * (scale + offset); }

// What a thread has of a row of whole vectors, which stay in registers.
template <int kVectors>
struct RowOfThread {
  uint4 values[kVectors];

  static __device__ __forceinline__ int at(int i) { return threadIdx.x + i * kThreads; }
  __device__ __forceinline__ void load(const __nv_bfloat16* row, int vectors) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      values[i] = make_uint4(0, 0, 0, 0);
      if (at(i) < vectors) values[i] = reinterpret_cast<const uint4*>(row)[at(i)];
    }
  }
  __device__ __forceinline__ void store(__nv_bfloat16* row, int vectors) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (at(i) < vectors) reinterpret_cast<uint4*>(row)[at(i)] = values[i];
  }
  __device__ __forceinline__ float squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      for (const uint32_t pair : {values[i].x, values[i].y, values[i].z, values[i].w}) {
        const float2 v = unpack(pair);
        sum = fmaf(v.x, v.x, sum);
        sum = fmaf(v.y, v.y, sum);
      }
    return sum;
  }
  // op(pair of this, pair of the other) for all pairs, in place.
  template <class Op>
  __device__ __forceinline__ void combine(const RowOfThread& other, Op op) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      values[i] = make_uint4(op(values[i].x, other.values[i].x), op(values[i].y, other.values[i].y), op(values[i].z, other.values[i].z),
                             op(values[i].w, other.values[i].w));
  }
  __device__ __forceinline__ void norm(float factor, const RowOfThread& scale, float offset) {
    combine(scale, [=](uint32_t pair, uint32_t scale_pair) {
      const float2 v = unpack(pair), s = unpack(scale_pair);
      return pack(normed(v.x, factor, s.x, offset), normed(v.y, factor, s.y, offset));
    });
  }
  __device__ __forceinline__ void add(const RowOfThread& other) {
    combine(other, [](uint32_t pair, uint32_t other_pair) {
      const float2 v = unpack(pair), o = unpack(other_pair);
      return pack(v.x + o.x, v.y + o.y);
    });
  }
};

template <int kVectors>
__global__ void __launch_bounds__(kThreads)
    rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* scale, __nv_bfloat16* y, int features, float eps, float offset) {
  ptx::launch_dependents();
  __shared__ float sums[kWarps];
  const int vectors = features / kVector;
  const size_t row = static_cast<size_t>(blockIdx.x) * features;
  RowOfThread<kVectors> scales, values;
  scales.load(scale, vectors);
  ptx::wait_for_previous_grid();
  values.load(x + row, vectors);
  values.norm(inverse_rms(values.squares(), features, eps, sums), scales, offset);
  values.store(y + row, vectors);
}

template <int kVectors>
__global__ void __launch_bounds__(kThreads)
    norm_add_norm(const __nv_bfloat16* x, const __nv_bfloat16* inner_scale, const __nv_bfloat16* residual, __nv_bfloat16* sum,
                  const __nv_bfloat16* outer_scale, __nv_bfloat16* y, int features, float inner_eps, float outer_eps, float offset) {
  ptx::launch_dependents();
  __shared__ float inner_sums[kWarps], outer_sums[kWarps];
  const int vectors = features / kVector;
  const size_t row = static_cast<size_t>(blockIdx.x) * features;
  RowOfThread<kVectors> inner_scales, outer_scales, values, added;
  inner_scales.load(inner_scale, vectors);
  outer_scales.load(outer_scale, vectors);
  ptx::wait_for_previous_grid();
  values.load(x + row, vectors);
  added.load(residual + row, vectors);  // also of a kernel before
  values.norm(inverse_rms(values.squares(), features, inner_eps, inner_sums), inner_scales, offset);
  values.add(added);
  values.store(sum + row, vectors);
  values.norm(inverse_rms(values.squares(), features, outer_eps, outer_sums), outer_scales, offset);
  values.store(y + row, vectors);
}

// Any row: a thread has every kThreads-th value of it.
__device__ __forceinline__ float squares_of(const __nv_bfloat16* row, int features) {
  float squares = 0;
  for (int i = threadIdx.x; i < features; i += kThreads) {
    const float v = __bfloat162float(row[i]);
    squares = fmaf(v, v, squares);
  }
  return squares;
}

__global__ void __launch_bounds__(kThreads)
    rms_norm_plain(const __nv_bfloat16* x, const __nv_bfloat16* scale, __nv_bfloat16* y, int features, float eps, float offset) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grid();
  __shared__ float sums[kWarps];
  x += static_cast<size_t>(blockIdx.x) * features;
  y += static_cast<size_t>(blockIdx.x) * features;
  const float factor = inverse_rms(squares_of(x, features), features, eps, sums);
  for (int i = threadIdx.x; i < features; i += kThreads)
    y[i] = __float2bfloat16_rn(normed(__bfloat162float(x[i]), factor, __bfloat162float(scale[i]), offset));
}

__global__ void __launch_bounds__(kThreads)
    norm_add_norm_plain(const __nv_bfloat16* x, const __nv_bfloat16* inner_scale, const __nv_bfloat16* residual, __nv_bfloat16* sum,
                        const __nv_bfloat16* outer_scale, __nv_bfloat16* y, int features, float inner_eps, float outer_eps, float offset) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grid();
  __shared__ float inner_sums[kWarps], outer_sums[kWarps];
  const size_t row = static_cast<size_t>(blockIdx.x) * features;
  x += row, residual += row, sum += row, y += row;
  float factor = inverse_rms(squares_of(x, features), features, inner_eps, inner_sums);
  for (int i = threadIdx.x; i < features; i += kThreads) {
    const __nv_bfloat16 inner = __float2bfloat16_rn(normed(__bfloat162float(x[i]), factor, __bfloat162float(inner_scale[i]), offset));
    sum[i] = __float2bfloat16_rn(__bfloat162float(inner) + __bfloat162float(residual[i]));
  }
  factor = inverse_rms(squares_of(sum, features), features, outer_eps, outer_sums);  // of what this thread wrote
  for (int i = threadIdx.x; i < features; i += kThreads)
    y[i] = __float2bfloat16_rn(normed(__bfloat162float(sum[i]), factor, __bfloat162float(outer_scale[i]), offset));
}

int vectors_of_thread(int features) { return (features + kThreads * kVector - 1) / (kThreads * kVector); }

}  // namespace

cudaError_t launch_rms_norm(const __nv_bfloat16* x, const Norm& norm, float offset, __nv_bfloat16* y, int n, int features, cudaStream_t stream,
                            bool overlap) {
  const int vectors = vectors_of_thread(features);
  auto* kernel = vectors == 1 ? rms_norm<1> : vectors == 2 ? rms_norm<2> : rms_norm<kMaxVectors>;
  if (vectors > kMaxVectors || !whole_vectors(features, x, norm.scale, y)) kernel = rms_norm_plain;
  return launch(kernel, n, kThreads, stream, overlap, x, norm.scale, y, features, norm.eps, offset);
}

cudaError_t launch_norm_add_norm(const __nv_bfloat16* x, const Norm& inner, const __nv_bfloat16* residual, __nv_bfloat16* sum, const Norm& outer,
                                 float offset, __nv_bfloat16* y, int n, int features, cudaStream_t stream, bool overlap) {
  const int vectors = vectors_of_thread(features);
  auto* kernel = vectors == 1 ? norm_add_norm<1> : vectors == 2 ? norm_add_norm<2> : norm_add_norm<kMaxVectors>;
  if (vectors > kMaxVectors || !whole_vectors(features, x, inner.scale, residual, sum, outer.scale, y)) kernel = norm_add_norm_plain;
  return launch(kernel, n, kThreads, stream, overlap, x, inner.scale, residual, sum, outer.scale, y, features, inner.eps, outer.eps, offset);
}

}  // namespace jaxzip::decode_chain
