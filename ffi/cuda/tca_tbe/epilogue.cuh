// What happens to sums before they are stored, four at a time in the order of an mma's result.
#pragma once
#include "matmul.h"

namespace jaxzip::tca_tbe {

__device__ __forceinline__ void store_one(const Epilogue& e, int m, int n, int row, int column, float v) {
  if (row >= m || column >= n) return;
  const size_t at = static_cast<size_t>(column) * m + row;
  if (e.bias) v += __bfloat162float(e.bias[row]);
  if (e.residual) v += __bfloat162float(e.residual[at]);
  if (e.fp32_out) {
    static_cast<float*>(e.y)[at] = v;
  } else {
    static_cast<__nv_bfloat16*>(e.y)[at] = __float2bfloat16(v);
  }
}

// `quad` counts the results of a row block: band * kColumnTiles + column tile; `row`, `column` are the block's first.
template <int kColumnTiles>
__device__ __forceinline__ void store_quad(const Epilogue& e, int m, int n, int row, int column, int quad, int lane, float4 v) {
  row += quad / kColumnTiles * 16 + lane / 4;
  column += quad % kColumnTiles * 8 + lane % 4 * 2;
  store_one(e, m, n, row, column, v.x);
  store_one(e, m, n, row, column + 1, v.y);
  store_one(e, m, n, row + 8, column, v.z);
  store_one(e, m, n, row + 8, column + 1, v.w);
}

}  // namespace jaxzip::tca_tbe
