// What a decode step of a Llama- or Gemma-shaped model computes between one layer's attention and the next's, as a chain of kernels that
// overlap.
//
//   attended -- o_proj --+--> x1 -- RMSNorm --> h1 -- gate_up, SwiGLU --> act -- down --+--> x2 -- RMSNorm --> h2 -- tail --> y
//   residual ------------+     \--------------------------------------------------------+
//
// Attention itself may come first, as the kernel that writes `attended`.
//
// Gemma's layers have GELU, and norms behind both parts: what is added to the residual is RMSNorm(o), o the product of o_proj, and
// RMSNorm(d), d that of down. One kernel then computes both norms and the sum between them.
//
// The activation is part of its product, or, given memory for that product's own results `gu`, a kernel of its own with the same results.
// Every kernel is launched programmatically dependent: it starts while the one before still runs, asks for its weights, and only then
// waits. Each waits before it reads or writes anything that another kernel writes, so that the end of the last is the end of all.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "../lane_planar/layout.h"
#include "../lane_planar/matmul_config.h"
#include "attention.h"
#include "rows.h"

namespace jaxzip::decode_chain {

// A matrix is [m, k]; hidden = o.m, intermediate = down.k. `tail` is the next layer's qkv projection or the head.
struct Chain {
  lane_planar::Matrix o, gate_up, down, tail;
  Norm mlp_norm, tail_norm;  // before gate_up and tail
  int n;
  const __nv_bfloat16* attended;  // [n, o.k]
  const __nv_bfloat16* residual;  // [n, hidden]
  // Results; nothing may overlap. x1, h1, x2, h2 are [n, hidden], act [n, intermediate], gu [n, 2 * intermediate] or null: see
  // Epilogue::gated for when it may be.
  __nv_bfloat16 *x1, *h1, *gu, *act, *x2, *h2;
  void* y;  // [n, tail.m], bf16 or fp32
  bool fp32_out;
  Activation activation = Activation::silu;
  float norm_offset = 0;  // of all norms
  // Norms behind o and down, and the products that they are of, [n, hidden]: all of these or none.
  Norm o_norm, down_norm;
  __nv_bfloat16 *o_product = nullptr, *down_product = nullptr;
  const Attention* attention = nullptr;  // writes `attended`, of `n` rows; if there is none, `attended` is given
};

struct ChainOptions {
  bool batch_invariant = false;
  bool raw = false;
  bool overlap = true;  // false: each kernel starts when the one before has ended
  // What a product runs instead of what would be chosen; not with `batch_invariant`. It must fit.
  const lane_planar::MatmulConfig *o = nullptr, *gate_up = nullptr, *down = nullptr, *tail = nullptr;
};

// For any n >= 1; sm_90. No allocation, no synchronisation, safe to capture. Returns the first error of a launch.
cudaError_t launch_chain(const Chain& chain, const ChainOptions& options, cudaStream_t stream);

}  // namespace jaxzip::decode_chain
