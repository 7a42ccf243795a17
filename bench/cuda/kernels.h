// The kernels under test behind one interface: each lists its configurations for a problem and runs one of them.
#pragma once
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "matmul_direct.h"

struct Candidate {
  std::string name;
  jaxzip::lane_planar::DirectConfig direct;
};

inline cudaError_t run_candidate(const Candidate& c, const jaxzip::lane_planar::Matrix& w, const __nv_bfloat16* x, void* y,
                                 int n, bool fp32, cudaStream_t stream, bool raw, bool overlap) {
  return jaxzip::lane_planar::launch_matmul_direct(w, x, n, {y, fp32, nullptr, nullptr}, c.direct, stream, raw, overlap);
}

// Every configuration that fits the problem.
inline std::vector<Candidate> candidates(const jaxzip::lane_planar::Matrix& w, int n) {
  using namespace jaxzip::lane_planar;
  std::vector<Candidate> found;
  for (const int ctas : {1, 2})
    for (const int warps : {16, 8})
      for (const int tiles : {1, 2, 4})
        for (int cluster = 1; cluster <= 8; ++cluster) {
          // As few clusters as the number of rounds allows that those resident at once need.
          DirectConfig c = {tiles, warps, ctas, cluster, 1};
          for (c.clusters = w.m_blocks(); c.clusters > 0 && !direct_shared_bytes(w, n, c);) --c.clusters;
          const int resident = std::max(1, std::min(direct_resident_clusters(w, n, {tiles, warps, ctas, cluster, std::max(1, c.clusters)}), w.m_blocks()));
          int rounds = (w.m_blocks() + resident - 1) / resident;
          for (; rounds > 0; --rounds) {  // fewer where the sums of so many row blocks do not fit, in several waves
            c.clusters = (w.m_blocks() + rounds - 1) / rounds;
            if (direct_shared_bytes(w, n, c)) break;
          }
          if (!rounds) continue;
          char name[96];
          std::snprintf(name, sizeof(name), "direct t%d w%dx%d C%d cl%d R%d", tiles, warps, ctas, cluster, c.clusters, rounds);
          found.push_back({name, c});
        }
  return found;
}
