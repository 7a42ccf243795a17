// Which configuration of the small-N matmul a shape gets: the best measured one, or the least modelled cost.
#include <algorithm>
#include <utility>

#include "matmul_config.h"
#include "resident.h"

namespace jaxzip::lane_planar {
namespace {

// The fastest of about a hundred configurations a shape, plain launches, at 11.44 bits; none where wgmma is faster still.
struct Measured {
  int m, k, n;
  DirectConfig config;
};
constexpr Measured kMeasured[] = {
    {1024, 4096, 8, {4, 8, 1, 4, 16}}, {1024, 4096, 16, {2, 8, 2, 6, 16}}, {4096, 4096, 4, {4, 16, 1, 2, 64}},
    {4096, 14336, 1, {4, 16, 1, 2, 64}}, {4096, 14336, 4, {}}, {5120, 5120, 1, {4, 16, 1, 1, 80}}, {5120, 5120, 2, {}},
    {5120, 5120, 4, {4, 16, 1, 4, 27}}, {5120, 17408, 4, {}}, {6144, 4096, 1, {4, 16, 1, 1, 96}}, {6144, 4096, 4, {}},
    {7168, 5120, 1, {4, 16, 1, 1, 112}}, {7168, 5120, 2, {4, 16, 1, 2, 56}}, {7168, 5120, 4, {}}, {8192, 8192, 4, {}},
    {8192, 28672, 4, {}}, {10240, 8192, 4, {}}, {14336, 4096, 1, {4, 16, 1, 1, 112}},
    {14336, 4096, 2, {4, 16, 1, 2, 56}}, {14336, 4096, 4, {}}, {28672, 4096, 1, {4, 16, 1, 1, 112}},
    {28672, 4096, 4, {4, 16, 1, 2, 64}}, {34816, 5120, 1, {4, 8, 1, 1, 109}}, {34816, 5120, 4, {4, 8, 1, 2, 61}},
    {57344, 8192, 4, {}}, {128256, 4096, 4, {}},
};

// The same of a decode step's chain, where kernels overlap. There wgmma, whose ring fills while the kernel before ends, is faster for
// all other large matrices: with direct kernels a step of one sequence took longer than one of eight.
constexpr Measured kMeasuredChained[] = {
    {4096, 4096, 2, {4, 16, 1, 2, 64}}, {4096, 14336, 2, {4, 16, 1, 2, 64}}, {6144, 4096, 1, {4, 8, 2, 2, 96}},
    {14336, 4096, 2, {4, 8, 2, 2, 112}},
};

// The model: KB that an SM streams, and what comes on top in the same unit; fitted to 114 measured (shape, n). It costs some 2% against
// the best configuration, up to 10% for matrices of a few MB.
struct Kernel {
  int tiles_per_warp, warps, ctas_per_sm, first_n, last_n;
  double stream_factor;  // of the bytes streamed
  double start;          // what a launch of it costs before the stream runs
};
constexpr Kernel kKernels[] = {
    {4, 16, 1, 1, 8, 1.02, 22},  {4, 8, 2, 1, 8, 0.95, 18},  {4, 8, 1, 1, 8, 1.14, 0},   {2, 16, 1, 1, 8, 1.13, 54},
    {4, 8, 1, 9, 16, 0.96, 26},  {2, 16, 1, 9, 16, 0.94, 36}, {4, 8, 1, 17, 32, 0.89, 8}, {2, 16, 1, 17, 32, 0.93, 20},
    {2, 8, 1, 17, 32, 1.4, 96},
};
constexpr double kBlockKb = 5.86, kXFactor = 0.8, kClusterCost = 9;
constexpr double kWaveCost = 400;  // of clusters that start when others have ended

// Calls `visit(cost, config)` with what fits: one for each kernel and number of CTAs that split K.
template <class Visit>
void each_modelled(const Matrix& w, int n, const Visit& visit) {
  for (const Kernel& kernel : kKernels) {
    if (n < kernel.first_n || n > kernel.last_n) continue;
    for (int cluster = 1; cluster <= 8; ++cluster) {
      const int group_rows = kernel.tiles_per_warp * kTileRows, groups = (w.m + group_rows - 1) / group_rows;
      const int resident = std::min(kResident[kernel.ctas_per_sm - 1][cluster - 1], groups);
      // More rounds need more shared memory, so a config that does not fit gets more clusters than run at once.
      int rounds = (groups + resident - 1) / resident;
      DirectConfig c = {kernel.tiles_per_warp, kernel.warps, kernel.ctas_per_sm, cluster, 0};
      for (int fit = rounds; fit > 0; --fit) {
        c.clusters = (groups + fit - 1) / fit;
        if (direct_shared_bytes(w, n, c)) break;
        c.clusters = 0;
      }
      if (!c.clusters) continue;
      const int waves = (c.clusters + resident - 1) / resident;
      rounds = (groups + c.clusters - 1) / c.clusters * waves;
      const int sharing = kernel.ctas_per_sm;  // also where half as many would do: clusters are not spread out
      const int k_blocks = (w.k_blocks() + cluster - 1) / cluster;
      const double stream = sharing * rounds * k_blocks * kBlockKb * kernel.tiles_per_warp / kTiles * kernel.stream_factor;
      const double x = sharing * kXFactor * n * k_blocks * kBlock * 2 / 1000.0;
      visit(stream + x + kClusterCost * cluster + kernel.start + kWaveCost * (waves - 1), c);
    }
  }
}

}  // namespace

DirectConfig choose_direct(const Matrix& w, int n, bool chained) {
  for (const Measured& row : kMeasuredChained)
    if (chained && row.m == w.m && row.k == w.k && n <= row.n) return row.config;
  if (chained && static_cast<long long>(w.m) * w.k >= kSmallMatrix) return {};
  for (const Measured& row : kMeasured)  // sorted by n within a shape
    if (row.m == w.m && row.k == w.k && n <= row.n && (!row.config.clusters || direct_shared_bytes(w, n, row.config))) return row.config;
  DirectConfig best = {};
  double least = 1e30;
  each_modelled(w, n, [&](double cost, const DirectConfig& c) {
    if (cost < least) least = cost, best = c;
  });
  return best;
}

std::vector<DirectConfig> best_direct(const Matrix& w, int n) {
  std::vector<std::pair<double, DirectConfig>> found;
  each_modelled(w, n, [&](double cost, const DirectConfig& c) { found.emplace_back(cost, c); });
  return by_cost(std::move(found));
}

}  // namespace jaxzip::lane_planar
