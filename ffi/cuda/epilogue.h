// What a matmul does with its sums before it stores them, in fp32 and with one rounding at the end.
#pragma once
#include <cuda_bf16.h>

namespace jaxzip {

constexpr int kGatedMaxN = 64;  // of decode steps; more are a prompt's, which one kernel for many columns takes

// Of a gate: gate / (1 + exp(-gate)), or GELU as its tanh approximation has it.
enum class Activation : bool { silu, gelu_tanh };

// Where results go: y[n, m], bf16 or fp32. `bias` [m] and `residual` [n, m] are bf16 or null, and are added in this order.
struct Epilogue {
  void* y;
  bool fp32_out;
  const __nv_bfloat16* bias;
  const __nv_bfloat16* residual;
  // The first half of the m rows is a gate for the second: y[n, m / 2] is activation(gate) * up of both rounded to bf16. For bf16 results
  // without bias and residual, m / 2 whole row blocks, and, above kGatedMaxN columns, for what the wide matmul takes.
  bool gated = false;
  Activation activation = Activation::silu;
};

}  // namespace jaxzip
