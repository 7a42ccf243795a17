// Whether what the library chooses for a shape fits into an SM, for each width of a block, for the raw control and for gated products.
// Needs no GPU.
#include "check_kernels.h"

#include <cstdio>
#include <random>

#include "matmul_direct.h"
#include "matmul_wgmma.h"

using namespace jaxzip::lane_planar;

namespace {

constexpr int kRows[] = {1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256};
constexpr int kInvariantRows = 64;  // as in matmul.cu

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
  if (!wgmma(choose_wgmma(dealt, n))) return false;
  if (!gated && n <= kInvariantRows && !wgmma(choose_batch_invariant(dealt))) return false;
  for (const bool chained : {false, true}) {
    const DirectConfig c = choose_direct(dealt, n, chained);
    // A gated one that does not fit leaves the product to wgmma.
    if (c.clusters && !gated && !fits(m, k, [&](const Matrix& w, bool raw) { return direct_shared_bytes(w, n, c, raw); })) return false;
  }
  return true;
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
  return wrong;
}
