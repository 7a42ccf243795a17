// Which configuration of the wgmma matmul a shape gets: the best measured one, or the least modelled time.
#include <algorithm>
#include <cmath>
#include <utility>

#include "matmul_config.h"
#include "resident.h"
#include "wgmma_plan.h"

namespace jaxzip::lane_planar {
namespace {

// The fastest of every configuration of `lane_planar_bench speed`, at 11.44 bits, where the model takes one that is over 1% slower; of large
// matrices with 32 and 64 columns under steady load, at the power limit.
struct Measured {
  int m, k, n;
  WgmmaConfig config;
};
constexpr Measured kMeasured[] = {
    {1024, 4096, 8, {4, 4, 16}}, {1024, 4096, 16, {2, 5, 16}}, {1024, 4096, 32, {2, 6, 16}}, {4096, 4096, 8, {2, 2, 64}},
    {4096, 4096, 32, {2, 2, 64}}, {4096, 14336, 8, {1, 6, 16}}, {4096, 14336, 64, {1, 5, 22}}, {4096, 14336, 256, {1, 3, 32}},
    {6144, 4096, 64, {2, 2, 48}}, {7168, 5120, 64, {1, 3, 38}}, {7168, 5120, 128, {2, 1, 112}}, {8192, 8192, 64, {2, 2, 64}},
    {8192, 8192, 128, {2, 2, 64}}, {10240, 8192, 8, {2, 1, 80}}, {10240, 8192, 16, {2, 1, 80}}, {28672, 4096, 8, {1, 2, 64}},
    {34816, 5120, 8, {4, 2, 61}}, {34816, 5120, 32, {2, 1, 91}}, {34816, 5120, 64, {2, 1, 109}}, {57344, 8192, 32, {1, 1, 128}},
    {57344, 8192, 64, {1, 1, 128}},
};

// The same of a decode step's chain, where kernels overlap (`chain_bench search=12`; 4096x4096 at 64 and 4096x14336 at 32 by `load=2`).
constexpr Measured kMeasuredChained[] = {
    {4096, 4096, 8, {2, 3, 32}}, {4096, 4096, 32, {2, 3, 32}}, {4096, 4096, 64, {2, 3, 32}}, {4096, 14336, 8, {4, 2, 64}},
    {4096, 14336, 32, {1, 6, 16}}, {3840, 15360, 32, {4, 2, 60}},
};
// And of its gated products, also under load.
constexpr Measured kMeasuredGated[] = {
    {28672, 4096, 8, {1, 1, 112}}, {30720, 3840, 32, {1, 1, 120}}, {30720, 3840, 64, {2, 1, 120}}, {34816, 5120, 8, {4, 2, 55}},
    {34816, 5120, 16, {2, 1, 91}}, {34816, 5120, 64, {1, 2, 55}}, {57344, 8192, 8, {4, 2, 64}},
};

// The model, in us, fitted to 15 shapes (on average it takes what is 1.0% slower than the best, also of shapes that were left out). A
// slot of a CTA's ring takes some time, more with more warp groups at work, and waits where the ring is short.
struct Column {
  int n;
  double slot_us, groups_us;
};
constexpr Column kColumns[] = {{8, 0.163, 0.152},  {16, 0.165, 0.173},  {32, 0.155, 0.196},
                               {64, 0.110, 0.322}, {128, 0.155, 0.410}, {256, 0.095, 0.449}};
constexpr double kShortRing = 1.133;
// A launch; what memory gives to all, less where teams and CTAs of a cluster read in different places; what an SM takes; storing a row
// block's results; the exchange of a pass's between CTAs; and clusters that start when others have ended.
constexpr double kLaunchUs = 2.50, kMemoryUs = 1.92, kBytesPerUs = 4.57e6, kPlaces = 0.029, kBytesPerUsAndSm = 124.6e3;
constexpr double kStoreUsPerColumn = 0.429 / 64, kExchangeUs = 1.768, kWaveUs = 2.28;

// What a tail's launch takes less than alone, since it starts while the one before ends, and since a pass less over x is less energy, which the
// model does not know. Tails of more than a quarter of what all teams take at once were 2.4% faster at best.
constexpr double kTailOverlapUs = 3.5, kTailWorth = 0.995;
constexpr int kTailShare = 4;

double smooth_max(double a, double b, int power) { return std::pow(std::pow(a, power) + std::pow(b, power), 1.0 / power); }

int divide_up(int a, int b) { return (a + b - 1) / b; }

// Of a gated product a cluster has as many row blocks as its pairs have, and needs as many passes for them.
double modelled_us(const Matrix& w, int n, const WgmmaConfig& c, bool gated) {
  const Column* column = kColumns;
  while (column->n < std::min(n, kWgmmaMaxN)) ++column;
  const int groups = wgmma_groups(n), teams = groups / c.k_groups, row_blocks = divide_up(w.m_blocks() >> gated, c.clusters) << gated;
  const int passes = divide_up(row_blocks, teams), slots = divide_up(divide_up(w.k_blocks(), c.cluster), c.k_groups);
  const int in_last_pass = row_blocks - (passes - 1) * teams;
  const double block_bytes = kMaxBlockWords * 4, chunks = divide_up(w.k_blocks(), c.cluster);
  const double compute = slots * (passes * column->slot_us + column->groups_us * (passes - 1 + static_cast<double>(in_last_pass) / teams)) *
                         (1 + kShortRing / (std::max(2, wgmma_slots(w, n, c, false, gated)) - 1));
  const double stream = chunks * (row_blocks * block_bytes + passes * column->n * kBlock * 2.0) / kBytesPerUsAndSm;
  const double store = kStoreUsPerColumn * column->n * row_blocks + (c.cluster > 1 ? passes * kExchangeUs : 0);
  const double waves = divide_up(c.clusters * wgmma_slices(n), kResident[0][c.cluster - 1]);
  const double places = 1 + kPlaces * std::log2(std::min(teams, row_blocks) * c.cluster);
  const double memory = kMemoryUs + static_cast<double>(w.m_blocks()) * w.k_blocks() * block_bytes / kBytesPerUs * places;
  return kLaunchUs + smooth_max(waves * (smooth_max(compute, stream, 5) + store) + kWaveUs * (waves - 1), memory, 6);
}

// What x costs at the power limit, where time is energy: every pass of a CTA reads its part through the L2. Large matrices meet the limit from 32
// columns on, and there four warp groups that split K read it once for every row block: 128256x4096 took 198 us, 180 with a row block each. With
// fewer columns there is no such limit, with more the model finds the same without this, or better.
constexpr double kXUsPerByte = 3.6e-8;
constexpr int kXColumns = 32;
constexpr long long kLargeMatrix = 50000000;

double x_us(const Matrix& w, int n, const WgmmaConfig& c) {
  if (n <= kXColumns / 2 || n > kXColumns || static_cast<long long>(w.m) * w.k < kLargeMatrix) return 0;
  const int passes = divide_up(divide_up(w.m_blocks(), c.clusters), wgmma_groups(n) / c.k_groups);
  return kXUsPerByte * c.clusters * passes * w.k_blocks() * kBlock * kXColumns * 2.0;
}

// Calls `visit(config)` with what fits n columns, and so fewer, for so many groups that split K and such a cluster.
template <class Visit>
void each_fitting(const Matrix& w, int n, int k_groups, int cluster, bool gated, const Visit& visit) {
  const int dealt = w.m_blocks() >> gated, takers = std::max(1, wgmma_groups(n) / k_groups >> gated);
  const int resident = std::min(std::max(1, kResident[0][cluster - 1] / wgmma_slices(n)), dealt), each = divide_up(dealt, resident);
  for (const int r : {each, divide_up(each, takers) * takers, std::max(1, each / takers) * takers, takers}) {
    const WgmmaConfig c = {k_groups, cluster, divide_up(dealt, r)};
    if (wgmma_slots(w, n, c, false, gated)) visit(c);
  }
}

// The one that fits n columns and has the least `us_of(config)`.
template <class UsOf>
WgmmaConfig least_modelled(const Matrix& w, int n, bool gated, const UsOf& us_of) {
  WgmmaConfig best = {};
  double least = 1e30;
  for (int k_groups = 1; k_groups <= wgmma_groups(n); k_groups *= 2)
    for (int cluster = 1; cluster <= 8; ++cluster)
      each_fitting(w, n, k_groups, cluster, gated, [&](const WgmmaConfig& c) {
        const double us = us_of(c);
        if (us < least) least = us, best = c;
      });
  return best;
}

}  // namespace

WgmmaConfig choose_wgmma(const Matrix& w, int n, bool chained, bool gated) {
  const auto find = [&](const auto& table) -> const Measured* {
    for (const Measured& row : table)  // its n stands for all that the instruction does
      if (row.m == w.m && row.k == w.k && n <= row.n && (row.n == 8 || n > row.n / 2) && wgmma_slots(w, n, row.config, false, gated)) return &row;
    return nullptr;
  };
  const Measured* row = gated ? find(kMeasuredGated) : chained ? find(kMeasuredChained) : nullptr;
  if (!row && !gated) row = find(kMeasured);
  if (row) return row->config;
  return least_modelled(w, n, gated, [&](const WgmmaConfig& c) { return modelled_us(w, n, c, gated) + x_us(w, n, c); });
}

MatmulConfig with_tail(const Matrix& w, int n, const WgmmaConfig& whole, bool gated) {
  const MatmulConfig one = {{}, whole};
  const int ctas = kResident[0][0], dealt = w.m_blocks() >> gated, at_once = ctas * wgmma_groups(n) >> gated, left = dealt % at_once;
  if (n > kWgmmaMaxN || dealt < at_once || !left || left * kTailShare > at_once) return one;
  const WgmmaConfig main = {1, 1, ctas};
  const Matrix others = with_row_blocks(w, dealt - left, gated), last = with_row_blocks(w, left, gated);
  if (!wgmma_slots(others, n, main, false, gated)) return one;
  const WgmmaConfig tail = least_modelled(last, n, gated, [&](const WgmmaConfig& c) { return modelled_us(last, n, c, gated); });
  const double us = modelled_us(others, n, main, gated) + modelled_us(last, n, tail, gated) - kTailOverlapUs;
  return us < kTailWorth * modelled_us(w, n, whole, gated) ? MatmulConfig{{}, main, left, tail} : one;
}

std::vector<WgmmaConfig> best_wgmma(const Matrix& w, int n, bool gated) {
  std::vector<std::pair<double, WgmmaConfig>> found;
  for (int k_groups = 1; k_groups <= wgmma_groups(n); k_groups *= 2)
    for (int cluster = 1; cluster <= 8; ++cluster) {
      std::pair<double, WgmmaConfig> least = {1e30, {}};
      each_fitting(w, n, k_groups, cluster, gated, [&](const WgmmaConfig& c) {
        const double us = modelled_us(w, n, c, gated);
        if (us < least.first) least = {us, c};
      });
      if (least.second.clusters) found.push_back(least);
    }
  return by_cost(std::move(found));
}

// For few, some and many columns, of which the last have the least room: of 15 shapes 7.4, 6.5, 2.4 and 3.7% slower than the best for 8,
// 16, 32 and 64 on average. The least for 32 alone is 4.1, 3.1, 1.5 and 22.6% slower.
WgmmaConfig choose_batch_invariant(const Matrix& w) {
  return least_modelled(w, kInvariantMaxN, false, [&](const WgmmaConfig& c) {
    return modelled_us(w, 8, c, false) + modelled_us(w, 32, c, false) + modelled_us(w, kInvariantMaxN, c, false);
  });
}

}  // namespace jaxzip::lane_planar
