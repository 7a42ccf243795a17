// What Python asks about the configurations of the matmul `jaxzip_lane_planar_gemm`, without a GPU: which there are for a shape, and
// whether one can be given.
#include <cstdio>
#include <string>

#include "lane_planar/matmul_config.h"

#define JAXZIP_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

namespace lp = jaxzip::lane_planar;

lp::Matrix shape(int m, int k) {
  lp::Matrix w = {};
  w.m = m, w.k = k, w.block_words = lp::kMaxBlockWords;
  return w;
}

// As much as there is room for, with a zero at the end; the length without that, as snprintf.
int answer(const std::string& text, char* out, int size) { return std::snprintf(out, size, "%s", text.c_str()); }

}  // namespace

// At most `most` names for n rows of x and a weight [m, k], a line each, the one that is run unasked first.
JAXZIP_EXPORT int jaxzip_lane_planar_configs(int m, int k, int n, int most, char* out, int size) {
  std::string names;
  if (m > 0 && k > 0 && most > 0)
    for (const lp::MatmulConfig& c : lp::matmul_configs(shape(m, k), n, most)) names += lp::show(c, n) + "\n";
  return answer(names, out, size);
}

// Why this configuration cannot be given; empty if it can.
JAXZIP_EXPORT int jaxzip_lane_planar_config_problem(const char* name, int m, int k, int n, bool batch_invariant, bool raw, char* out,
                                                    int size) {
  lp::Matrix w = shape(m, k);
  if (raw) w.block_words = lp::kRawBlockWords;
  return answer(lp::unusable(w, n, name, batch_invariant, raw), out, size);
}
