// What happens to a sum before it is stored: the row's shift is taken back, bias and residual are added in fp32 in this order, and
// the result is rounded once.
#pragma once
#include <cstdint>

#include "../epilogue.h"
#include "../swiglu.cuh"

namespace jaxzip::lane_planar {

// 2^-shift, exact.
__device__ __forceinline__ float unscale(int shift) { return __int_as_float((127 - shift) << 23); }

__device__ __forceinline__ float finish(const Epilogue& e, float sum, int shift, int row, size_t at) {
  float v = sum * unscale(shift);
  if (e.bias) v += __bfloat162float(e.bias[row]);
  if (e.residual) v += __bfloat162float(e.residual[at]);
  return v;
}

// Four consecutive rows of column n of a gated result: `gate` and `up` are two pairs of bf16 each.
__device__ __forceinline__ void store_gated(const Epilogue& e, int m, int n, int row, uint2 gate, uint2 up) {
  __nv_bfloat16* y = static_cast<__nv_bfloat16*>(e.y) + static_cast<size_t>(n) * (m / 2) + row;
  *reinterpret_cast<uint2*>(y) = make_uint2(swiglu_of(gate.x, up.x), swiglu_of(gate.y, up.y));
}
__device__ __forceinline__ uint2 finish_rounded(const Epilogue& e, float4 sum, int row, uint32_t shifts) {
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
  for (int i = 0; i < 4; ++i) v[i] = finish(e, v[i], static_cast<int8_t>(shifts >> (8 * i)), row + i, 0);
  return make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
}

// A gated result by a thread that has the gate's rows before those that they are for: they wait in y.
__device__ __forceinline__ void store_rows_of_pair(const Epilogue& e, int m, int n, int row, float4 sum, uint32_t shifts) {
  const uint2 rounded = finish_rounded(e, sum, row, shifts);
  const int of = row < m / 2 ? row : row - m / 2;
  uint2* y = reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(e.y) + static_cast<size_t>(n) * (m / 2) + of);
  if (of == row)
    *y = rounded;
  else
    store_gated(e, m, n, of, *y, rounded);
}

// Finishes and stores four consecutive rows of column n; `shifts` are their four int8. Rows past m are left out.
__device__ __forceinline__ void store_rows(const Epilogue& e, int m, int n, int row, float4 sum, uint32_t shifts) {
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
  const size_t at = static_cast<size_t>(n) * m + row;
  const bool whole = m % 4 == 0 && row < m;
  for (int i = 0; i < 4; ++i)
    if (whole || row + i < m) v[i] = finish(e, v[i], static_cast<int8_t>(shifts >> (8 * i)), row + i, at + i);
  if (e.fp32_out) {
    float* y = static_cast<float*>(e.y) + at;
    for (int i = 0; i < 4; ++i)
      if (whole || row + i < m) y[i] = v[i];
    return;
  }
  const __nv_bfloat162 rounded[2] = {__floats2bfloat162_rn(v[0], v[1]), __floats2bfloat162_rn(v[2], v[3])};
  __nv_bfloat16* y = static_cast<__nv_bfloat16*>(e.y) + at;
  if (whole && (reinterpret_cast<uintptr_t>(y) & 7) == 0) {
    *reinterpret_cast<uint2*>(y) = *reinterpret_cast<const uint2*>(rounded);
  } else {
    for (int i = 0; i < 4; ++i)
      if (row + i < m) y[i] = reinterpret_cast<const __nv_bfloat16*>(rounded)[i];
  }
}

}  // namespace jaxzip::lane_planar
