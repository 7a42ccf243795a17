// The launches of a decode step's chain.
#include "chain.h"

#include "../lane_planar/matmul.h"

namespace jaxzip::decode_chain {

cudaError_t launch_chain(const Chain& c, const ChainOptions& options, cudaStream_t stream) {
  using lane_planar::Matrix;
  using lane_planar::MatmulConfig;
  const auto matmul = [&](const Matrix& w, const __nv_bfloat16* x, const Epilogue& epilogue, bool overlap, const MatmulConfig* config) {
    return launch_matmul(w, x, c.n, epilogue, {options.batch_invariant, options.raw, overlap, true, config}, stream);
  };
  const bool gated = !c.gu;
  const float offset = c.norm_offset == 0 ? kNoOffset : c.norm_offset;
  // sum = residual + x @ w, or residual + behind(x @ w) where `product` is given; h = norm(sum).
  const auto add_and_norm = [&](const Matrix& w, const __nv_bfloat16* x, const __nv_bfloat16* residual, __nv_bfloat16* sum, const Norm& norm,
                                __nv_bfloat16* h, const Norm& behind, __nv_bfloat16* product, bool overlap, const MatmulConfig* config) {
    const Epilogue added = {sum, false, nullptr, residual}, alone = {product, false, nullptr, nullptr};
    if (const cudaError_t error = matmul(w, x, product ? alone : added, overlap, config)) return error;
    return product ? launch_norm_add_norm(product, behind, residual, sum, norm, offset, h, c.n, c.o.m, stream, options.overlap)
                   : launch_rms_norm(sum, norm, offset, h, c.n, c.o.m, stream, options.overlap);
  };
  // The first starts when all before it has ended: what that writes may be weights. From then on weights are there.
  if (c.attention)
    if (const cudaError_t error = launch_attention(*c.attention, plan_attention(*c.attention, options.batch_invariant), stream)) return error;
  if (const cudaError_t error = add_and_norm(c.o, c.attended, c.residual, c.x1, c.mlp_norm, c.h1, c.o_norm, c.o_product,
                                             c.attention && options.overlap, options.o))
    return error;
  const Epilogue activated = {gated ? c.act : c.gu, false, nullptr, nullptr, gated, c.activation};
  if (const cudaError_t error = matmul(c.gate_up, c.h1, activated, options.overlap, options.gate_up)) return error;
  if (!gated)
    if (const cudaError_t error = launch_gated_activation(c.activation, c.gu, c.act, c.n, c.down.k, stream, options.overlap)) return error;
  if (const cudaError_t error =
          add_and_norm(c.down, c.act, c.x1, c.x2, c.tail_norm, c.h2, c.down_norm, c.down_product, options.overlap, options.down))
    return error;
  return matmul(c.tail, c.h2, {c.y, c.fp32_out, nullptr, nullptr}, options.overlap, options.tail);
}

}  // namespace jaxzip::decode_chain
