// Which configuration of the wgmma matmul a shape gets: the best measured one, or the least modelled time.
#include <algorithm>
#include <cmath>

#include "matmul_wgmma.h"
#include "resident.h"
#include "wgmma_plan.h"

namespace jaxzip::lane_planar {
namespace {

// The fastest of every configuration of `lane_planar_bench speed`, at 11.44 bits, where the model takes one that is over 2% slower.
struct Measured {
  int m, k, n;
  WgmmaConfig config;
};
constexpr Measured kMeasured[] = {
    {4096, 14336, 32, {4, 2, 64}}, {4096, 14336, 64, {4, 2, 64}}, {4096, 14336, 128, {1, 5, 22}}, {5120, 5120, 16, {1, 4, 27}},
    {5120, 5120, 32, {1, 4, 27}}, {5120, 5120, 64, {1, 4, 27}}, {5120, 17408, 16, {1, 4, 27}}, {5120, 17408, 64, {1, 4, 27}},
    {6144, 4096, 16, {4, 1, 96}}, {6144, 4096, 32, {4, 1, 96}}, {6144, 4096, 64, {4, 1, 96}}, {7168, 5120, 16, {4, 1, 112}},
    {7168, 5120, 32, {4, 1, 112}}, {7168, 5120, 64, {2, 2, 56}}, {8192, 8192, 16, {4, 1, 128}}, {8192, 8192, 32, {4, 1, 128}},
    {8192, 8192, 128, {2, 2, 64}}, {8192, 28672, 16, {4, 1, 128}}, {8192, 28672, 32, {4, 1, 128}}, {8192, 28672, 128, {2, 2, 64}},
    {10240, 8192, 16, {1, 2, 54}}, {10240, 8192, 32, {1, 2, 54}}, {14336, 4096, 16, {4, 1, 112}}, {14336, 4096, 32, {2, 1, 112}},
    {14336, 4096, 64, {2, 1, 112}}, {28672, 4096, 16, {4, 1, 112}}, {28672, 4096, 256, {1, 1, 224}}, {34816, 5120, 16, {4, 1, 109}},
    {34816, 5120, 32, {2, 1, 109}}, {34816, 5120, 64, {1, 3, 39}}, {34816, 5120, 128, {1, 4, 136}}, {34816, 5120, 256, {1, 2, 272}},
    {57344, 8192, 16, {4, 1, 128}},
};

// The model, in us, fitted to 15 shapes (on average it takes what is 3.5% slower than the best). A slot of a CTA's ring takes some
// time, more with more warp groups at work, and waits where the ring is short.
struct Column {
  int n;
  double slot_us, groups_us;
};
constexpr Column kColumns[] = {{16, 0.115, 0.379}, {32, 0.076, 0.423}, {64, 0.079, 0.541}, {128, 0.070, 0.820}, {256, 0.255, 0.431}};
constexpr double kShortRingUs = 0.521, kKGroupUsPerColumn = -0.131 / 64;
// The exchange of a pass's sums, a launch, and memory.
constexpr double kFlushUs = 1.088, kFlushUsPerColumn = 0.664 / 64, kFlushUsPerColumnAndRank = 0.053 / 64, kWaveUs = 3.54;
constexpr double kBytesPerUs = 5.50e6, kMemoryUs = 4.16, kSmooth = 6;

int divide_up(int a, int b) { return (a + b - 1) / b; }

double modelled_us(const Matrix& w, int n, const WgmmaConfig& c) {
  const Column* column = kColumns;
  while (column->n < n) ++column;
  const int groups = wgmma_groups(n), teams = groups / c.k_groups, row_blocks = divide_up(w.m_blocks(), c.clusters);
  const int passes = divide_up(row_blocks, teams), slots = divide_up(divide_up(w.k_blocks(), c.cluster), c.k_groups);
  const int in_last_pass = row_blocks - (passes - 1) * teams;
  const double any = column->slot_us + kKGroupUsPerColumn * column->n * (c.k_groups - 1) +
                     kShortRingUs / (std::max(2, wgmma_slots(w, n, c)) - 1);
  double us = kWaveUs + slots * (passes * any + column->groups_us * (passes - 1 + static_cast<double>(in_last_pass) / teams));
  if (c.cluster * c.k_groups > 1)
    us += passes * (kFlushUs + column->n * (kFlushUsPerColumn * c.k_groups + kFlushUsPerColumnAndRank * c.cluster));
  us *= divide_up(c.clusters, kResident[0][c.cluster - 1]);
  const double blocks = static_cast<double>(w.m_blocks()) * w.k_blocks();
  const double memory = kMemoryUs + blocks * (kMaxBlockWords * 4 + 128.0 * column->n / teams) / kBytesPerUs;
  return std::pow(std::pow(us, kSmooth) + std::pow(memory, kSmooth), 1 / kSmooth);
}

// The least modelled time for n columns among the configurations that also do for `also_n`.
WgmmaConfig least_modelled(const Matrix& w, int n, int also_n) {
  WgmmaConfig best = {};
  double least = 1e30;
  for (int k_groups = 1; k_groups <= wgmma_groups(n); k_groups *= 2)
    for (int cluster = 1; cluster <= 8; ++cluster) {
      const int teams = wgmma_groups(n) / k_groups;
      const int resident = std::min(kResident[0][cluster - 1], w.m_blocks()), rows = divide_up(w.m_blocks(), resident);
      for (const int r : {rows, divide_up(rows, teams) * teams, std::max(1, rows / teams) * teams, teams}) {
        const WgmmaConfig c = {k_groups, cluster, divide_up(w.m_blocks(), r)};
        if (!wgmma_slots(w, n, c) || !wgmma_slots(w, also_n, c)) continue;
        const double us = modelled_us(w, n, c);
        if (us < least) least = us, best = c;
      }
    }
  return best;
}

}  // namespace

WgmmaConfig choose_wgmma(const Matrix& w, int n) {
  for (const Measured& row : kMeasured)  // n of a row stands for all that its instruction does
    if (row.m == w.m && row.k == w.k && n <= row.n && (row.n == 16 || n > row.n / 2) && wgmma_slots(w, n, row.config)) return row.config;
  return least_modelled(w, n, n);
}

WgmmaConfig choose_batch_invariant(const Matrix& w) { return least_modelled(w, 32, 64); }

}  // namespace jaxzip::lane_planar
