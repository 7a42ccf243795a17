// Whether what the library chooses for a shape fits into an SM, for each width of a block, for the raw control and for gated products; and
// whether what it lists for the autotuner does, under names that say what it is; and whether all clusters of what it chooses for the matrices
// that are measured run at once. Needs no GPU.
#include "check_kernels.h"

#include <cstdio>
#include <random>

#include "matmul_config.h"
#include "resident.h"

using namespace jaxzip::lane_planar;

namespace {

constexpr int kRows[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 700, 2048, 4096};

Matrix shape(int m, int k, int block_words) {
  Matrix w = {};
  w.m = m, w.k = k, w.block_words = block_words;
  return w;
}

// The shared memory of the choice in each form that may run it; 0 if one does not fit.
template <class Bytes>
bool fits(int m, int k, const Bytes& bytes) {
  for (const int words : kBlockWidths)
    if (!bytes(shape(m, k, words), false)) return false;
  return bytes(shape(m, k, kRawBlockWords), true) != 0;
}

bool choices_fit(int m, int k, int n, bool gated) {
  const Matrix dealt = shape(gated ? m / 2 : m, k, kMaxBlockWords);
  const auto wgmma = [&](const WgmmaConfig& c) {
    return c.clusters > 0 && fits(m, k, [&](const Matrix& w, bool raw) { return wgmma_shared_bytes(w, n, c, raw, gated); });
  };
  if (n <= kInvariantMaxN) {
    WgmmaConfig invariant = choose_batch_invariant(shape(m, k, kMaxBlockWords));
    if (gated) invariant.clusters = std::min(invariant.clusters, dealt.m_blocks());  // as the product does
    if (!wgmma(invariant)) return false;
  }
  for (const bool chained : {false, true}) {
    const WgmmaConfig whole = choose_wgmma(shape(m, k, kMaxBlockWords), n, chained, gated);
    if (!wgmma(whole)) return false;
    const MatmulConfig parts = with_tail(shape(m, k, kMaxBlockWords), n, whole, gated);
    const auto part_fits = [&](int count, const WgmmaConfig& c) {
      return fits(m, k, [&](const Matrix& w, bool raw) { return wgmma_shared_bytes(with_row_blocks(w, count, gated), n, c, raw, gated); });
    };
    const int others = (shape(m, k, 0).m_blocks() >> gated) - parts.tail_row_blocks;
    if (parts.tail_row_blocks && (others < 1 || !part_fits(others, parts.wgmma) || !part_fits(parts.tail_row_blocks, parts.tail))) return false;
    const DirectConfig c = choose_direct(dealt, n, chained);
    // A gated one that does not fit leaves the product to wgmma.
    if (c.clusters && !gated && !fits(m, k, [&](const Matrix& w, bool raw) { return direct_shared_bytes(w, n, c, raw); })) return false;
  }
  return true;
}

// Whether a name can be asked for, by the rules of the handler.
bool usable(const Matrix& w, int n, const std::string& name, bool batch_invariant = false) {
  return unusable(w, n, name, batch_invariant).empty();
}

// The configurations listed for a shape: the choice first, each once, with a name that is read back as the same one.
bool lists_configs(int m, int k, int n) {
  constexpr size_t kMost = 6;
  const Matrix w = shape(m, k, kMaxBlockWords);
  const std::vector<MatmulConfig> listed = matmul_configs(w, n, kMost);
  if (listed.empty() || listed.size() > kMost || !(listed[0] == choose_matmul(w, n))) return false;
  for (size_t i = 0; i < listed.size(); ++i) {
    const std::string name = show(listed[i], n);
    const std::optional<MatmulConfig> read = parse_config(name, n);
    if (!read || !(*read == listed[i]) || !usable(w, n, name) || !fits_all_forms(w, n, listed[i])) return false;
    for (size_t j = 0; j < i; ++j)
      if (listed[j] == listed[i]) return false;
    for (const char* wrong : {" ", ".", " cl1", "99999999"})
      if (parse_config(name + wrong, n)) return false;
    if (parse_config(" " + name, n) || parse_config(name.substr(1), n) || parse_config(name.substr(0, name.rfind(' ')), n)) return false;
  }
  const std::string invariant = show({{}, choose_batch_invariant(w)}, kInvariantMaxN);
  return usable(w, n, invariant, true) && !usable(w, n, invariant + "0", true) && !usable(w, n, "wgmma 4/3 C1 cl1") && !usable(w, n, "") &&
         !usable(w, n, "wgmma 4/4 C9 cl1") && !usable(w, n, "direct t4 w16x1 C1 cl0") && !usable(w, n, "direct t3 w16x1 C1 cl1") &&
         !usable(w, n, "wgmma 4/1 C1 cl99999999999") && !usable(w, 257, show(listed[0], 256));
}

int check_configs() {
  std::mt19937 random(2);
  int cases = 0, wrong = 0;
  for (int i = 0; i < 300; ++i) {
    const int m = 1 + static_cast<int>(random() % (i % 2 ? 400 : 40000)), k = 1 + static_cast<int>(random() % (i % 3 ? 20000 : 300));
    for (const int n : kRows) {
      if (n > kWgmmaMaxN) continue;
      ++cases;
      if (!lists_configs(m, k, n) && ++wrong <= 10) std::printf("WRONG: configurations of M%d K%d N%d\n", m, k, n);
    }
  }
  std::printf("check configurations: %d cases, %d wrong\n", cases, wrong);
  return wrong;
}

// Configurations are for clusters that run at once: a kernel may have registers and shared memory for more, until it is compiled another time.
int check_waves() {
  constexpr int kShapes[][2] = {{1024, 4096},  {4096, 4096},  {5120, 5120},   {6144, 4096},  {7168, 5120},   {4096, 14336}, {14336, 4096}, {8192, 8192},
                                {10240, 8192}, {5120, 17408}, {28672, 4096},  {34816, 5120}, {8192, 28672},  {57344, 8192}, {128256, 4096}};
  constexpr int kMostRows = 128;  // beyond, K is split for a second wave
  int cases = 0, wrong = 0;
  for (const auto& [m, k] : kShapes)
    for (const int n : kRows) {
      if (n > kMostRows) continue;
      const MatmulConfig c = choose_matmul(shape(m, k, kMaxBlockWords), n);
      const bool at_once = c.direct.clusters ? c.direct.clusters <= kResident[c.direct.ctas_per_sm - 1][c.direct.cluster - 1]
                                             : c.wgmma.clusters <= kResident[0][c.wgmma.cluster - 1];
      ++cases;
      if (!at_once && ++wrong <= 10) std::printf("WRONG: more clusters than run at once, M%d K%d N%d %s\n", m, k, n, show(c, n).c_str());
    }
  std::printf("check waves: %d cases, %d wrong\n", cases, wrong);
  return wrong;
}

}  // namespace

int check_choices() {
  std::mt19937 random(1);
  const auto up_to = [&](int most) { return 1 + static_cast<int>(random() % most); };
  int cases = 0, wrong = 0;
  for (int i = 0; i < 3000; ++i) {
    const int m = up_to(i % 3 == 0 ? 300 : i % 3 == 1 ? 20000 : 260000), k = up_to(i % 2 ? 40000 : 3000);
    const int pairs = (m + 2 * kBlock - 1) / (2 * kBlock) * 2 * kBlock;
    for (const int n : kRows)
      for (const bool gated : {false, true}) {
        if (gated && n > jaxzip::kGatedMaxN) continue;
        ++cases;
        if (choices_fit(gated ? pairs : m, k, n, gated)) continue;
        if (++wrong <= 10) std::printf("WRONG: no room for the choice of M%d K%d N%d%s\n", gated ? pairs : m, k, n, gated ? " gated" : "");
      }
  }
  std::printf("check choices: %d cases, %d wrong\n", cases, wrong);
  return wrong + check_configs() + check_waves();
}
