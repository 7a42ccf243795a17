// The launches of a decode step's chain.
#include "chain.h"

#include "../lane_planar/matmul.h"
#include "rows.h"

namespace jaxzip::decode_chain {

cudaError_t launch_chain(const Chain& c, const ChainOptions& options, cudaStream_t stream) {
  using lane_planar::Matrix;
  const auto matmul = [&](const Matrix& w, const __nv_bfloat16* x, const Epilogue& epilogue, bool overlap, const lane_planar::MatmulConfig* config) {
    return launch_matmul(w, x, c.n, epilogue, {options.batch_invariant, options.raw, overlap, true, config}, stream);
  };
  const bool overlap = options.overlap, gated = !c.gu;
  // The first starts when all before it has ended: what that writes may be weights. From then on weights are there.
  if (const cudaError_t error = matmul(c.o, c.attended, {c.x1, false, nullptr, c.residual}, false, options.o)) return error;
  if (const cudaError_t error = launch_rms_norm(c.x1, c.mlp_scale, c.h1, c.n, c.o.m, c.mlp_eps, stream, overlap)) return error;
  if (const cudaError_t error = matmul(c.gate_up, c.h1, {gated ? c.act : c.gu, false, nullptr, nullptr, gated}, overlap, options.gate_up)) return error;
  if (!gated)
    if (const cudaError_t error = launch_swiglu(c.gu, c.act, c.n, c.down.k, stream, overlap)) return error;
  if (const cudaError_t error = matmul(c.down, c.act, {c.x2, false, nullptr, c.x1}, overlap, options.down)) return error;
  if (const cudaError_t error = launch_rms_norm(c.x2, c.tail_scale, c.h2, c.n, c.o.m, c.tail_eps, stream, overlap)) return error;
  return matmul(c.tail, c.h2, {c.y, c.fp32_out, nullptr, nullptr}, overlap, options.tail);
}

}  // namespace jaxzip::decode_chain
