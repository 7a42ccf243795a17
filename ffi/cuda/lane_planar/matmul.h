// The matmul that a caller gets: which kernel, which configuration, and the launches.
#pragma once
#include <cuda_runtime.h>

#include "../epilogue.h"
#include "layout.h"
#include "matmul_config.h"

namespace jaxzip::lane_planar {

struct MatmulOptions {
  // One configuration for every n, so that a column's bits do not depend on how many others are computed with it.
  bool batch_invariant = false;
  // `blocks` holds bf16 in fragment order instead (2048 words a block, no entries, zero shifts): the control of exactness.
  bool raw = false;
  // Programmatic dependent launch: only x, bias, residual and y may depend on the kernel before, which may still run.
  bool overlap = false;
  // One of a chain of kernels that overlap: configurations for that, in which others may be faster.
  bool chained = false;
  // What to run instead of what would be chosen; not with `batch_invariant`. It must fit, see `fits`.
  const MatmulConfig* config = nullptr;
};

// y[n, m] = x[n, k] @ W[m, k].T for any n >= 1, in as many launches on `stream` as n needs, and one more for a tail (see MatmulConfig); sm_90. No allocation, no
// synchronisation, safe to capture. Returns the first error of a launch, cudaErrorInvalidValue where no kernel fits.
cudaError_t launch_matmul(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue,
                          const MatmulOptions& options, cudaStream_t stream);

}  // namespace jaxzip::lane_planar
