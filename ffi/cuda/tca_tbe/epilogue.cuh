// What happens to sums before they are stored, two at a time in the order of an mma's result.
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

// Rows 2 t and 2 t + 1 of a FragTile's 8, lane 4 g + t's, and column g of x's 8. `pair` counts the sums of a row block: FragTile row *
// (kColumns / 8) + column tile; `row`, `column` are the block's first.
template <int kColumns>
__device__ __forceinline__ void store_pair(const Epilogue& e, int m, int n, int row, int column, int pair, int lane, float2 v) {
  row += pair / (kColumns / 8) * 8 + lane % 4 * 2;
  column += pair % (kColumns / 8) * 8 + lane / 4;
  store_one(e, m, n, row, column, v.x);
  store_one(e, m, n, row + 1, column, v.y);
}

}  // namespace jaxzip::tca_tbe
