// Which configuration of the wgmma matmul a shape gets: the best measured one, or the least modelled cost.
#include <algorithm>

#include "matmul_wgmma.h"
#include "resident.h"

namespace jaxzip::lane_planar {
namespace {

// The fastest of every configuration of `lane_planar_bench speed`, at 11.44 bits, where the model takes one that is over 1% slower.
struct Measured {
  int m, k, n;
  WgmmaConfig config;
};
constexpr Measured kMeasured[] = {
    {1024, 4096, 8, {2, 2, 2, 8, 16}}, {1024, 4096, 16, {2, 2, 2, 8, 16}}, {1024, 4096, 32, {2, 2, 2, 8, 16}},
    {4096, 4096, 64, {2, 1, 2, 7, 32}}, {4096, 4096, 128, {2, 2, 1, 2, 64}}, {5120, 5120, 64, {3, 1, 1, 4, 27}},
    {5120, 17408, 8, {4, 1, 1, 5, 20}}, {5120, 17408, 16, {4, 1, 1, 5, 20}}, {5120, 17408, 64, {3, 1, 1, 4, 27}},
    {6144, 4096, 8, {2, 1, 2, 4, 48}}, {6144, 4096, 64, {2, 1, 2, 4, 48}}, {7168, 5120, 64, {2, 1, 2, 4, 56}},
    {8192, 8192, 128, {2, 2, 1, 1, 128}}, {10240, 8192, 64, {3, 1, 1, 2, 54}}, {14336, 4096, 64, {4, 2, 1, 1, 112}},
    {14336, 4096, 128, {3, 1, 1, 3, 38}}, {28672, 4096, 8, {4, 1, 1, 1, 112}}, {34816, 5120, 8, {2, 1, 2, 5, 46}},
    {34816, 5120, 32, {4, 1, 1, 4, 29}}, {57344, 8192, 16, {4, 1, 1, 1, 128}}, {57344, 8192, 64, {4, 1, 1, 1, 128}},
};

// The model, in us, fitted to 12 shapes (on average it takes what is 1.5% slower than the best): a unit (64 rows x 64 k) of every warp
// group of an SM, by the columns of the instruction; x per KB; the exchange of a row block's sums; what an SM saves with fewer groups.
struct Column {
  int n;
  double unit_us;
};
constexpr Column kColumns[] = {{8, 0.60}, {16, 0.62}, {32, 0.68}, {64, 1.09}, {128, 1.54}, {256, 2.2}};
constexpr double kAnyGroups = 0.25, kXUsPerKb = 0.0107, kFlushUs = 0.148, kFlushUsPerColumn = 0.0022, kClusterUs = 0.068;

struct Shape {
  int groups, k_groups, ctas_per_sm;
};
constexpr Shape kShapes[] = {{4, 1, 1}, {4, 2, 1}, {4, 4, 1}, {3, 1, 1}, {3, 3, 1}, {2, 1, 1}, {2, 2, 1}, {2, 1, 2}, {2, 2, 2}, {1, 1, 1}};

int divide_up(int a, int b) { return (a + b - 1) / b; }

double modelled_us(const Matrix& w, int n, const WgmmaConfig& c) {
  const Column* column = kColumns;
  while (column->n < n) ++column;
  const int passes = divide_up(divide_up(w.m_blocks(), c.clusters), c.groups / c.k_groups), chunks = divide_up(w.k_blocks(), c.cluster);
  const int waves = divide_up(c.clusters, kResident[c.ctas_per_sm - 1][c.cluster - 1]);
  const double share = kAnyGroups + (1 - kAnyGroups) * c.groups * c.ctas_per_sm / 4;
  const double x_kb = column->n * chunks * 0.128 * c.ctas_per_sm * passes;
  double us = passes * divide_up(chunks, c.k_groups) * column->unit_us * share + x_kb * kXUsPerKb;
  if (c.cluster * c.k_groups > 1) us += passes * (kFlushUs + kFlushUsPerColumn * column->n * c.k_groups);
  return waves * us + (c.cluster > 1 ? kClusterUs * c.cluster : 0);
}

WgmmaConfig least_modelled(const Matrix& w, int n, int also_n) {
  WgmmaConfig best = {};
  double least = 1e30;
  for (const Shape& s : kShapes)
    for (int cluster = 1; cluster <= 8; ++cluster) {
      const int teams = s.groups / s.k_groups;
      const int resident = std::min(kResident[s.ctas_per_sm - 1][cluster - 1], w.m_blocks());
      const int rows = (w.m_blocks() + resident - 1) / resident;
      for (const int r : {rows, (rows + teams - 1) / teams * teams, teams}) {
        const WgmmaConfig c = {s.groups, s.k_groups, s.ctas_per_sm, cluster, (w.m_blocks() + r - 1) / r};
        if (!wgmma_shared_bytes(w, n, c) || !wgmma_shared_bytes(w, also_n, c)) continue;
        const double us = modelled_us(w, n, c);
        if (us < least) least = us, best = c;
      }
    }
  return best;
}

}  // namespace

WgmmaConfig choose_wgmma(const Matrix& w, int n) {
  for (const Measured& row : kMeasured)  // sorted by n within a shape
    if (row.m == w.m && row.k == w.k && n <= row.n && (row.n == 8 || n > row.n / 2) && wgmma_shared_bytes(w, n, row.config))
      return row.config;
  return least_modelled(w, n, n);
}

WgmmaConfig choose_batch_invariant(const Matrix& w) { return least_modelled(w, 32, 64); }

}  // namespace jaxzip::lane_planar
