// What happens to a sum before it is stored: the row's shift is taken back, bias and residual are added in fp32 in this order, and
// the result is rounded once.
#pragma once
#include <cstdint>

#include "../epilogue.h"
#include "../gated_activation.cuh"

namespace jaxzip::lane_planar {

// 2^-shift, exact.
__device__ __forceinline__ float unscale(int shift) { return __int_as_float((127 - shift) << 23); }

// What sums of four consecutive rows are multiplied by, and then get added: the same for all columns.
struct FourRows {
  int first;
  float scale[4], bias[4];

  // `shifts`: of the rows, four int8.
  __device__ __forceinline__ FourRows(const Epilogue& e, int m, int first, uint32_t shifts) : first(first) {
    for (int i = 0; i < 4; ++i) {
      scale[i] = unscale(static_cast<int8_t>(shifts >> (8 * i)));
      bias[i] = -0.0f;  // which changes no sum
    }
    if (e.bias)
      for (int i = 0; i < 4; ++i)
        if (first + i < m) bias[i] = __bfloat162float(e.bias[first + i]);
  }
  __device__ __forceinline__ float4 finish(float4 sum) const {
    return make_float4(fmaf(sum.x, scale[0], bias[0]), fmaf(sum.y, scale[1], bias[1]), fmaf(sum.z, scale[2], bias[2]), fmaf(sum.w, scale[3], bias[3]));
  }
};

__device__ __forceinline__ uint2 rounded(float4 v) { return make_uint2(pack(v.x, v.y), pack(v.z, v.w)); }

// Whether four rows that begin at a multiple of four can be read and written at once.
__device__ __forceinline__ bool in_fours(const Epilogue& e, int m) {
  return m % 4 == 0 && ((reinterpret_cast<uintptr_t>(e.y) | reinterpret_cast<uintptr_t>(e.residual)) & 15) == 0;
}

// Finishes and stores four rows of column n, element by element. Rows past m are left out.
static __device__ __noinline__ void store_one_by_one(const Epilogue& e, int m, int n, int first, float4 finished) {
  const float v[4] = {finished.x, finished.y, finished.z, finished.w};
  for (int i = 0; i < 4; ++i) {
    if (first + i >= m) return;
    const size_t at = static_cast<size_t>(n) * m + first + i;
    const float whole = e.residual ? v[i] + __bfloat162float(e.residual[at]) : v[i];
    if (e.fp32_out)
      static_cast<float*>(e.y)[at] = whole;
    else
      static_cast<__nv_bfloat16*>(e.y)[at] = __float2bfloat16_rn(whole);
  }
}

// The residual of four rows of column n of `columns`, for store_rows; zeros where it adds none of these.
__device__ __forceinline__ uint2 residual_of(const Epilogue& e, int m, bool fours, int n, int columns, int row) {
  if (!e.residual || !fours || n >= columns || row >= m) return make_uint2(0, 0);
  return *reinterpret_cast<const uint2*>(e.residual + static_cast<size_t>(n) * m + row);
}

// Finishes and stores four rows of column n; `fours` as from in_fours, `residual()` as residual_of. Few instructions: at the end of a kernel
// all warps do this at once.
template <class Residual>
__device__ __forceinline__ void store_rows(const Epilogue& e, int m, bool fours, int n, const FourRows& rows, float4 sum, const Residual& residual) {
  float4 v = rows.finish(sum);
  if (!fours) {
    store_one_by_one(e, m, n, rows.first, v);
    return;
  }
  if (rows.first >= m) return;
  const size_t at = static_cast<size_t>(n) * m + rows.first;
  if (e.residual) {
    const uint2 four = residual();
    const float2 low = unpack(four.x), high = unpack(four.y);
    v = make_float4(v.x + low.x, v.y + low.y, v.z + high.x, v.w + high.y);
  }
  if (e.fp32_out)
    *reinterpret_cast<float4*>(static_cast<float*>(e.y) + at) = v;
  else
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(e.y) + at) = rounded(v);
}

__device__ __forceinline__ void store_rows(const Epilogue& e, int m, bool fours, int n, const FourRows& rows, float4 sum) {
  store_rows(e, m, fours, n, rows, sum, [&] { return *reinterpret_cast<const uint2*>(e.residual + static_cast<size_t>(n) * m + rows.first); });
}

// Four consecutive rows of column n of a gated result: `gate` and `up` are two pairs of bf16 each.
__device__ __forceinline__ void store_gated(const Epilogue& e, int m, int n, int row, uint2 gate, uint2 up) {
  __nv_bfloat16* y = static_cast<__nv_bfloat16*>(e.y) + static_cast<size_t>(n) * (m / 2) + row;
  *reinterpret_cast<uint2*>(y) = make_uint2(gated_activation(e.activation, gate.x, up.x), gated_activation(e.activation, gate.y, up.y));
}

// A gated result's rows. Those of a gate come first, from this thread or one that it has met since, and wait in y for those that they are for.
__device__ __forceinline__ void store_rows_of_pair(const Epilogue& e, int m, int n, const FourRows& rows, float4 sum) {
  const uint2 pairs = rounded(rows.finish(sum));
  const int of = rows.first < m / 2 ? rows.first : rows.first - m / 2;
  uint2* y = reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(e.y) + static_cast<size_t>(n) * (m / 2) + of);
  if (of == rows.first)
    *y = pairs;
  else
    store_gated(e, m, n, of, *y, pairs);
}

}  // namespace jaxzip::lane_planar
