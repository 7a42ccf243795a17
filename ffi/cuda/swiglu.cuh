// Pairs of bf16 in a register, and SwiGLU of them.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace jaxzip {

__device__ __forceinline__ float2 unpack(uint32_t pair) { return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)); }
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float swiglu_of(float gate, float up) { return gate * __frcp_rn(1 + expf(-gate)) * up; }
__device__ __forceinline__ uint32_t swiglu_of(uint32_t gates, uint32_t ups) {
  const float2 gate = unpack(gates), up = unpack(ups);
  return pack(swiglu_of(gate.x, up.x), swiglu_of(gate.y, up.y));
}

}  // namespace jaxzip
