// A configuration of the matmul, of either kernel: what the library chooses, what a caller may ask for, and its name.
#pragma once
#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "matmul_direct.h"
#include "matmul_wgmma.h"

namespace jaxzip::lane_planar {

constexpr int kInvariantMaxN = 64;  // of choose_batch_invariant; more rows are cut into as many

struct MatmulConfig {
  DirectConfig direct;  // unless its clusters are 0
  WgmmaConfig wgmma;
  // The last row blocks, or pairs of a gated product, as a second launch: where the others fill all teams of all CTAs, and these would take them
  // another pass, in which most have nothing to do. 0: there is none.
  int tail_row_blocks = 0;
  WgmmaConfig tail = {};
};

bool operator==(const MatmulConfig& a, const MatmulConfig& b);

// "direct t4 w16x1 C2 cl64": tiles of a warp, warps of a CTA x CTAs of an SM, CTAs that split K, clusters. "wgmma 4/2 C2 cl64": warp
// groups, which depend on n alone, / those of them that share a row block and split K; then as above. "wgmma 4/1 C1 cl132 + 16 wgmma 4/4 C8
// cl16": with 16 row blocks as a second launch.
std::string show(const MatmulConfig& config, int n);

// The configuration of this name for n rows of x, if it is one: exactly as `show` spells it.
std::optional<MatmulConfig> parse_config(std::string_view name, int n);

// Whether there is such a kernel and it has room, for w's width of blocks or the raw control.
bool fits(const Matrix& w, int n, const MatmulConfig& config, bool raw = false);

// Why a caller cannot have the configuration of this name; empty if it can. A batch invariant product has one for all n.
std::string unusable(const Matrix& w, int n, std::string_view name, bool batch_invariant, bool raw = false);

// Whether it fits for every width of blocks and for the raw control, so that all of them can give the same bits.
bool fits_all_forms(const Matrix& w, int n, const MatmulConfig& config);

// What a product with n rows of x, 1 to 256, gets unasked. Of `w` only m and k matter, here and below. Asks nothing of the driver.
MatmulConfig choose_matmul(const Matrix& w, int n);

// At most so many configurations that fit in all forms: that choice first, then by the models, the kernels in turns. None for
// other n. Asks nothing of the driver.
std::vector<MatmulConfig> matmul_configs(const Matrix& w, int n, size_t most);

// All that one kernel has for this shape by its model, best first: one for each way to split K. `w.block_words` counts.
std::vector<DirectConfig> best_direct(const Matrix& w, int n);
std::vector<WgmmaConfig> best_wgmma(const Matrix& w, int n, bool gated = false);

// That configuration for all row blocks, or by the model, where these are some more than all teams of all CTAs take at once, for whole passes of
// them and a tail for the others.
MatmulConfig with_tail(const Matrix& w, int n, const WgmmaConfig& whole, bool gated);

template <class Config>
std::vector<Config> by_cost(std::vector<std::pair<double, Config>> found) {
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Config> configs;
  for (const auto& [cost, config] : found) configs.push_back(config);
  return configs;
}

}  // namespace jaxzip::lane_planar
