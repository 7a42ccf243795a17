// What a matmul does with its sums before it stores them, in fp32 and with one rounding at the end.
#pragma once
#include <cuda_bf16.h>

namespace jaxzip {

// Where results go: y[n, m], bf16 or fp32. `bias` [m] and `residual` [n, m] are bf16 or null, and are added in this order.
struct Epilogue {
  void* y;
  bool fp32_out;
  const __nv_bfloat16* bias;
  const __nv_bfloat16* residual;
};

}  // namespace jaxzip
