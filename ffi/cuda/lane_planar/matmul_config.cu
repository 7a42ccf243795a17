// Names of configurations, and whether they fit.
#include "matmul_config.h"

#include <cstdio>

namespace jaxzip::lane_planar {
namespace {

constexpr size_t kLongestName = 64;

bool same(const WgmmaConfig& a, const WgmmaConfig& b) {
  return a.k_groups == b.k_groups && a.cluster == b.cluster && a.clusters == b.clusters && a.slots == b.slots;
}

}  // namespace

bool operator==(const MatmulConfig& a, const MatmulConfig& b) {
  if (a.direct.clusters || b.direct.clusters)
    return a.direct.tiles_per_warp == b.direct.tiles_per_warp && a.direct.warps == b.direct.warps &&
           a.direct.ctas_per_sm == b.direct.ctas_per_sm && a.direct.cluster == b.direct.cluster && a.direct.clusters == b.direct.clusters;
  return same(a.wgmma, b.wgmma) && a.tail_row_blocks == b.tail_row_blocks && (!a.tail_row_blocks || same(a.tail, b.tail));
}

std::string unusable(const Matrix& w, int n, std::string_view name, bool batch_invariant, bool raw) {
  const std::string what = "configuration \"" + std::string(name.substr(0, kLongestName)) + "\" ",
                    shape = "x [" + std::to_string(n) + ", " + std::to_string(w.k) + "] and a weight of " + std::to_string(w.m) + " outputs";
  if (batch_invariant) {
    const std::string only = show({{}, choose_batch_invariant(w)}, kInvariantMaxN);
    return name == only ? "" : what + "is not the batch invariant one, which for " + shape + " is \"" + only + "\": give that or none";
  }
  if (n < 1 || n > kWgmmaMaxN) return what + "cannot be given for " + shape + ": expected 1 to " + std::to_string(kWgmmaMaxN) + " rows of x";
  const std::optional<MatmulConfig> config = parse_config(name, n);
  const std::string instead = "; give one like \"" + show(choose_matmul(w, n), n) + "\", or none";
  if (!config) return what + "is none for " + shape + ": it is misspelt, or for another number of rows" + instead;
  return fits(w, n, *config, raw) ? "" : what + "does not fit " + shape + instead;
}

std::string show(const MatmulConfig& c, int n) {
  char name[128];
  const DirectConfig& d = c.direct;
  if (d.clusters) {
    std::snprintf(name, sizeof(name), "direct t%d w%dx%d C%d cl%d", d.tiles_per_warp, d.warps, d.ctas_per_sm, d.cluster, d.clusters);
    return name;
  }
  const auto wgmma = [&](const WgmmaConfig& w) {
    std::snprintf(name, sizeof(name), "wgmma %d/%d C%d cl%d", wgmma_groups(n), w.k_groups, w.cluster, w.clusters);
    return std::string(name);
  };
  return wgmma(c.wgmma) + (c.tail_row_blocks ? " + " + std::to_string(c.tail_row_blocks) + " " + wgmma(c.tail) : "");
}

std::optional<MatmulConfig> parse_config(std::string_view name, int n) {
  if (name.size() > kLongestName) return std::nullopt;
  const std::string text(name);
  MatmulConfig c = {};
  DirectConfig& d = c.direct;
  int groups;
  // At most eight digits, so that no number overflows.
  const bool is_direct = std::sscanf(text.c_str(), "direct t%8d w%8dx%8d C%8d cl%8d", &d.tiles_per_warp, &d.warps, &d.ctas_per_sm, &d.cluster,
                                     &d.clusters) == 5;
  const int found = std::sscanf(text.c_str(), "wgmma %8d/%8d C%8d cl%8d + %8d wgmma %8d/%8d C%8d cl%8d", &groups, &c.wgmma.k_groups,
                                &c.wgmma.cluster, &c.wgmma.clusters, &c.tail_row_blocks, &groups, &c.tail.k_groups, &c.tail.cluster,
                                &c.tail.clusters);
  const bool is_wgmma = found == 4 || found == 9;
  if (is_direct == is_wgmma || show(c, n) != text) return std::nullopt;  // nothing before, between or after, and as many groups
  return c;
}

bool fits(const Matrix& w, int n, const MatmulConfig& c, bool raw) {
  if (c.direct.clusters) return c.direct.cluster <= w.k_blocks() && direct_shared_bytes(w, n, c.direct, raw) > 0;
  if (!c.tail_row_blocks) return wgmma_shared_bytes(w, n, c.wgmma, raw) > 0;
  const int others = w.m_blocks() - c.tail_row_blocks;
  return c.tail_row_blocks > 0 && others > 0 && wgmma_shared_bytes(with_row_blocks(w, others, false), n, c.wgmma, raw) > 0 &&
         wgmma_shared_bytes(with_row_blocks(w, c.tail_row_blocks, false), n, c.tail, raw) > 0;
}

bool fits_all_forms(const Matrix& w, int n, const MatmulConfig& c) {
  Matrix form = w;
  for (const int words : kBlockWidths) {
    form.block_words = words;
    if (!fits(form, n, c)) return false;
  }
  form.block_words = kRawBlockWords;
  return fits(form, n, c, true);
}

}  // namespace jaxzip::lane_planar
