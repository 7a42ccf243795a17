// Pairs of bf16 in a register, and gated activations of them.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "epilogue.h"

namespace jaxzip {

__device__ __forceinline__ float2 unpack(uint32_t pair) { return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)); }
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// activation(gate) * up. Both activations are gate * sigmoid(t): of SiLU t is the gate, and 0.5 * (1 + tanh(u)) is sigmoid(2 * u). Exponential
// and reciprocal are the hardware's, a few units in fp32's last place off, which bf16 results rarely show.
__device__ __forceinline__ float gated_activation(Activation activation, float gate, float up) {
  constexpr float kTwiceRoot = 1.59576912f, kCubic = 0.044715f, kLog2E = 1.44269504f;  // the first: 2 * sqrt(2 / pi)
  float t = -kLog2E * gate;
  if (activation == Activation::gelu_tanh) t = gate * fmaf(-kLog2E * kTwiceRoot * kCubic, gate * gate, -kLog2E * kTwiceRoot);
  float power, sigmoid;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(power) : "f"(t));
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(sigmoid) : "f"(1 + power));
  return gate * sigmoid * up;
}
__device__ __forceinline__ uint32_t gated_activation(Activation activation, uint32_t gates, uint32_t ups) {
  const float2 gate = unpack(gates), up = unpack(ups);
  return pack(gated_activation(activation, gate.x, up.x), gated_activation(activation, gate.y, up.y));
}

}  // namespace jaxzip
