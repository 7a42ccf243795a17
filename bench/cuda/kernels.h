// The kernels under test behind one interface: each lists its configurations for a problem and runs one of them.
#pragma once
#include <string>
#include <vector>

#include "matmul_direct.h"

struct Candidate {
  std::string name;
  jaxzip::lane_planar::DirectConfig direct;
};

inline cudaError_t run_candidate(const Candidate& c, const jaxzip::lane_planar::Matrix& w, const __nv_bfloat16* x, void* y,
                                 int n, bool fp32, cudaStream_t stream, bool raw, bool overlap) {
  return jaxzip::lane_planar::launch_matmul_direct(w, x, y, n, fp32, c.direct, stream, raw, overlap);
}

// Every configuration that fits the problem, on a device of `sms` multiprocessors.
inline std::vector<Candidate> candidates(const jaxzip::lane_planar::Matrix& w, int n, int sms) {
  using namespace jaxzip::lane_planar;
  std::vector<Candidate> found;
  for (const int ctas : {1, 2})
    for (const int warps : {16, 8})
      for (const int tiles : {1, 2, 4})
        for (int log_cluster = 0; log_cluster <= 3; ++log_cluster) {
          const int slots = (sms * ctas) >> log_cluster;
          // The fewest clusters with that number of rounds; a few of a large cluster's slots may not exist.
          for (const int usable : {slots, slots - 1, slots * 15 / 16}) {
            if (usable < 1) continue;
            const int rounds = (w.m_blocks() + usable - 1) / usable;
            DirectConfig c = {tiles, warps, ctas, log_cluster, (w.m_blocks() + rounds - 1) / rounds};
            if (!direct_shared_bytes(w, n, c)) continue;
            char name[96];
            std::snprintf(name, sizeof(name), "direct t%d w%dx%d C%d cl%d R%d", tiles, warps, ctas, 1 << log_cluster, c.clusters, rounds);
            if (!found.empty() && found.back().name == name) continue;
            found.push_back({name, c});
          }
        }
  return found;
}
