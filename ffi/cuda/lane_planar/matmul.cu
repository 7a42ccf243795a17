// Choice between the kernels by n, and cutting of what is more than one launch takes.
#include "matmul.h"

#include <algorithm>

#include "matmul_direct.h"
#include "matmul_wgmma.h"

namespace jaxzip::lane_planar {
namespace {

// Up to so many rows the direct kernel is faster; above, mma.sync needs more instructions than there is time.
constexpr int kDirectRows = 8, kDirectRowsSmall = 16;
constexpr long long kSmall = 8000000;  // weights
constexpr int kInvariantMaxN = 64;  // of choose_batch_invariant

// The rows of x from `first` on, and where their results go.
Epilogue from_row(const Epilogue& e, int m, int first) {
  const size_t offset = static_cast<size_t>(m) * first;
  return {static_cast<char*>(e.y) + offset * (e.fp32_out ? 4 : 2), e.fp32_out, e.bias,
          e.residual ? e.residual + offset : nullptr};
}

}  // namespace

cudaError_t launch_matmul(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue,
                          const MatmulOptions& options, cudaStream_t stream) {
  // Encoded and raw blocks must get one configuration, and so must every width of a block.
  Matrix shape = w;
  shape.block_words = kMaxBlockWords;
  const int most = options.batch_invariant ? kInvariantMaxN : kWgmmaMaxN;
  for (int first = 0; first < n; first += most) {
    const int rows = std::min(n - first, most);
    const __nv_bfloat16* from = x + static_cast<size_t>(first) * w.k;
    const Epilogue to = from_row(epilogue, w.m, first);
    const bool small = static_cast<long long>(w.m) * w.k < kSmall;
    const bool few = !options.batch_invariant && rows <= (small ? kDirectRowsSmall : kDirectRows);
    const DirectConfig direct = few ? choose_direct(shape, rows) : DirectConfig{};
    const cudaError_t error =
        direct.clusters ? launch_matmul_direct(w, from, rows, to, direct, stream, options.raw, options.overlap)
                        : launch_matmul_wgmma(w, from, rows, to,
                                              options.batch_invariant ? choose_batch_invariant(shape) : choose_wgmma(shape, rows), stream,
                                              options.raw, options.overlap);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jaxzip::lane_planar
