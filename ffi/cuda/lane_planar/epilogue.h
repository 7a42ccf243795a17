// What a matmul does with its sums, besides taking each row's shift back.
#pragma once
#include <cuda_bf16.h>

namespace jaxzip::lane_planar {

// Where results go: y[n, m], bf16 or fp32. `bias` [m] and `residual` [n, m] are bf16 or null.
struct Epilogue {
  void* y;
  bool fp32_out;
  const __nv_bfloat16* bias;
  const __nv_bfloat16* residual;
};

}  // namespace jaxzip::lane_planar
