// Choice between the kernels by n, and cutting of what is more than one launch takes.
#include "matmul.h"

#include <algorithm>

#include "matmul_wide.h"

namespace jaxzip::lane_planar {
namespace {

// Up to so many rows the direct kernel is faster; above, mma.sync needs more instructions than there is time.
constexpr int kDirectRows = 4, kDirectRowsSmall = 16;
constexpr int kDirectRowsChained = 2;  // wgmma fills its slots while the kernel before ends

// The rows of x from `first` on, and where their results go.
Epilogue from_row(const Epilogue& e, int m, int first) {
  const size_t offset = static_cast<size_t>(m) * first, y_offset = e.gated ? offset / 2 : offset;
  Epilogue from = e;
  from.y = static_cast<char*>(e.y) + y_offset * (e.fp32_out ? 4 : 2);
  if (e.residual) from.residual += offset;
  return from;
}

// How many of so many rows one launch takes: whole slices, and what is left as well where it is most of one.
int rows_of_launch(int rows) {
  rows = std::min(rows, kWgmmaMaxSlices * kWgmmaMaxN);
  const int left = rows % kWgmmaMaxN;
  return rows < kWgmmaMaxN || left > kWgmmaMaxN / 2 ? rows : rows - left;
}

// One launch or two.
cudaError_t launch_wgmma(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, const MatmulConfig& c, cudaStream_t stream,
                         bool raw, bool overlap) {
  if (!c.tail_row_blocks) return launch_matmul_wgmma(w, x, n, epilogue, c.wgmma, stream, raw, overlap);
  const int others = (w.m_blocks() >> epilogue.gated) - c.tail_row_blocks;
  if (others < 1) return cudaErrorInvalidValue;
  if (const cudaError_t error = launch_matmul_wgmma(w, x, n, epilogue, c.wgmma, stream, raw, overlap, {0, others})) return error;
  return launch_matmul_wgmma(w, x, n, epilogue, c.tail, stream, raw, overlap, {others, c.tail_row_blocks, true});
}

MatmulConfig choose(const Matrix& shape, int rows, bool gated, const MatmulOptions& options) {
  Matrix dealt = shape;  // the direct kernel deals pairs of a gated product as it does row groups of half of it, twice over
  if (gated) dealt.m /= 2;
  MatmulConfig c = {};
  if (options.batch_invariant) {
    c.wgmma = choose_batch_invariant(shape);  // also of a gated one: the same bits
    c.wgmma.clusters = std::min(c.wgmma.clusters, dealt.m_blocks());
    return c;
  }
  const bool small = static_cast<long long>(shape.m) * shape.k < kSmallMatrix;
  const int few = small ? kDirectRowsSmall : options.chained ? kDirectRowsChained : kDirectRows;
  if (rows <= few) c.direct = choose_direct(dealt, rows, options.chained);
  if (c.direct.clusters && !direct_shared_bytes(shape, rows, c.direct, false, gated)) c.direct.clusters = 0;
  return c.direct.clusters ? c : with_tail(shape, rows, choose_wgmma(shape, rows, options.chained, gated), gated);
}

}  // namespace

MatmulConfig choose_matmul(const Matrix& w, int n) {
  Matrix shape = w;
  shape.block_words = kMaxBlockWords;
  return choose(shape, n, false, {});
}

std::vector<MatmulConfig> matmul_configs(const Matrix& w, int n, size_t most) {
  if (n < 1 || n > kWgmmaMaxN) return {};
  Matrix shape = w;
  shape.block_words = kMaxBlockWords;
  std::vector<MatmulConfig> found = {choose_matmul(shape, n)};
  const auto add = [&](const MatmulConfig& c) {
    if (found.size() < most && fits_all_forms(shape, n, c) && std::find(found.begin(), found.end(), c) == found.end()) found.push_back(c);
  };
  const std::vector<WgmmaConfig> wgmma = best_wgmma(shape, n);
  const std::vector<DirectConfig> direct = n <= kDirectRowsSmall ? best_direct(shape, n) : std::vector<DirectConfig>();
  for (size_t i = 0; i < std::max(wgmma.size(), direct.size()); ++i) {
    if (i < wgmma.size()) add({{}, wgmma[i]});
    if (i < direct.size()) add({direct[i], {}});
  }
  return found;
}

cudaError_t launch_matmul(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue,
                          const MatmulOptions& options, cudaStream_t stream) {
  // Encoded and raw blocks must get one configuration, and so must every width of a block.
  Matrix shape = w;
  shape.block_words = kMaxBlockWords;
  if (epilogue.gated && (w.m % (2 * kBlock) || epilogue.fp32_out || epilogue.bias || epilogue.residual)) return cudaErrorInvalidValue;
  if (epilogue.gated && n > kGatedMaxN)
    return options.batch_invariant ? cudaErrorInvalidValue : launch_matmul_wide(w, x, n, epilogue, stream, options.raw, options.overlap);
  int rows;
  for (int first = 0; first < n; first += rows) {
    rows = options.batch_invariant ? std::min(n - first, kInvariantMaxN) : rows_of_launch(n - first);
    const __nv_bfloat16* from = x + static_cast<size_t>(first) * w.k;
    const Epilogue to = from_row(epilogue, w.m, first);
    const bool given = options.config && !options.batch_invariant;
    if (!given && !options.batch_invariant && wide_is_faster(shape, rows) && wide_fits(w, from)) {
      if (const cudaError_t error = launch_matmul_wide(w, from, rows, to, stream, options.raw, options.overlap)) return error;
      continue;
    }
    const MatmulConfig choice = given ? *options.config : choose(shape, rows, epilogue.gated, options);
    const cudaError_t error =
        choice.direct.clusters ? launch_matmul_direct(w, from, rows, to, choice.direct, stream, options.raw, options.overlap)
                               : launch_wgmma(w, from, rows, to, choice, stream, options.raw, options.overlap);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jaxzip::lane_planar
