// Choice between the kernels by n, and cutting of what is more than one launch takes.
#include "matmul.h"

#include <algorithm>

#include "matmul_direct.h"

namespace jaxzip::lane_planar {
namespace {

// The rows of x from `first` on, and where their results go.
Epilogue from_row(const Epilogue& e, int m, int first) {
  const size_t offset = static_cast<size_t>(m) * first;
  return {static_cast<char*>(e.y) + offset * (e.fp32_out ? 4 : 2), e.fp32_out, e.bias,
          e.residual ? e.residual + offset : nullptr};
}

}  // namespace

cudaError_t launch_matmul(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue,
                          const MatmulOptions& options, cudaStream_t stream) {
  for (int first = 0; first < n;) {
    int rows = std::min(n - first, kDirectMaxN);
    DirectConfig config = choose_direct(w, rows);
    while (!config.clusters && rows > 1) config = choose_direct(w, rows /= 2);
    const cudaError_t error = launch_matmul_direct(w, x + static_cast<size_t>(first) * w.k, rows,
                                                   from_row(epilogue, w.m, first), config, stream, options.raw);
    if (error != cudaSuccess) return error;
    first += rows;
  }
  return cudaSuccess;
}

}  // namespace jaxzip::lane_planar
