// Which configuration of the wgmma matmul a shape gets: the best measured one, or the least modelled cost.
#include <algorithm>

#include "matmul_wgmma.h"

namespace jaxzip::lane_planar {

WgmmaConfig choose_wgmma(const Matrix& w, int n) {
  WgmmaConfig c = {4, 1, 1, 1, std::min(w.m_blocks(), 132)};
  while (!wgmma_shared_bytes(w, n, c) && c.cluster < 8) ++c.cluster;
  return c;
}

WgmmaConfig choose_batch_invariant(const Matrix& w) { return choose_wgmma(w, 64); }

}  // namespace jaxzip::lane_planar
