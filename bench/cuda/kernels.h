// The kernels under test behind one interface: each lists its configurations for a problem and runs one of them.
#pragma once
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "matmul_direct.h"
#include "matmul_wide.h"
#include "matmul_wgmma.h"

struct Candidate {
  std::string name;
  bool is_wgmma;
  jaxzip::lane_planar::DirectConfig direct;
  jaxzip::lane_planar::WgmmaConfig wgmma;
  bool is_wide = false;  // instead of both: it has no configurations
};

inline Candidate candidate(const std::string& name, const jaxzip::lane_planar::DirectConfig& c) { return {name, false, c, {}}; }
inline Candidate candidate(const std::string& name, const jaxzip::lane_planar::WgmmaConfig& c) { return {name, true, {}, c}; }

inline cudaError_t run_candidate(const Candidate& c, const jaxzip::lane_planar::Matrix& w, const __nv_bfloat16* x, void* y,
                                 int n, bool fp32, cudaStream_t stream, bool raw, bool overlap) {
  const jaxzip::Epilogue epilogue = {y, fp32, nullptr, nullptr};
  if (c.is_wide) return launch_matmul_wide(w, x, n, epilogue, stream, raw, overlap);
  return c.is_wgmma ? launch_matmul_wgmma(w, x, n, epilogue, c.wgmma, stream, raw, overlap)
                    : launch_matmul_direct(w, x, n, epilogue, c.direct, stream, raw, overlap);
}

// Whether the candidate also runs on raw weights.
inline bool has_control(const Candidate& c, const jaxzip::lane_planar::Matrix& raw, int n) {
  return c.is_wide || (c.is_wgmma ? wgmma_shared_bytes(raw, n, c.wgmma, true) : direct_shared_bytes(raw, n, c.direct, true)) > 0;
}

inline void add_direct_candidates(const jaxzip::lane_planar::Matrix& w, int n, std::vector<Candidate>& found) {
  using namespace jaxzip::lane_planar;
  if (n > kDirectMaxN) return;
  for (const int ctas : {1, 2})
    for (const int warps : {16, 8})
      for (const int tiles : {1, 2, 4})
        for (int cluster = 1; cluster <= 8; ++cluster) {
          // As few clusters as the number of rounds allows that those resident at once need.
          DirectConfig c = {tiles, warps, ctas, cluster, 1};
          const int groups = (w.m + tiles * kTileRows - 1) / (tiles * kTileRows);
          for (c.clusters = groups; c.clusters > 0 && !direct_shared_bytes(w, n, c);) --c.clusters;
          const DirectConfig any = {tiles, warps, ctas, cluster, std::max(1, c.clusters)};
          const int resident = std::max(1, std::min(direct_resident_clusters(w, n, any), groups));
          int rounds = (groups + resident - 1) / resident;
          for (; rounds > 0; --rounds) {  // fewer where the sums of so many row groups do not fit, in several waves
            c.clusters = (groups + rounds - 1) / rounds;
            if (direct_shared_bytes(w, n, c)) break;
          }
          if (!rounds) continue;
          char name[96];
          std::snprintf(name, sizeof(name), "direct t%d w%dx%d C%d cl%d R%d", tiles, warps, ctas, cluster, c.clusters, rounds);
          found.push_back(candidate(name, c));
        }
}

inline void add_wgmma_candidates(const jaxzip::lane_planar::Matrix& w, int n, std::vector<Candidate>& found) {
  using namespace jaxzip::lane_planar;
  const int groups = wgmma_groups(n);
  for (int k_groups = 1; k_groups <= groups; k_groups *= 2)
    for (int cluster = 1; cluster <= 8; ++cluster) {
      WgmmaConfig c = {k_groups, cluster, w.m_blocks()};
      const int at_once = wgmma_resident_clusters(w, n, c), resident = std::min(std::max(1, at_once / wgmma_slices(n)), w.m_blocks());
      if (!at_once) continue;
      // As few clusters as the rounds allow that those resident at once need; then whole rounds of all teams, in one or two waves.
      const int teams = groups / k_groups, rounds = (w.m_blocks() + resident - 1) / resident;
      std::vector<int> tried;
      for (const int r : {rounds, (rounds + teams - 1) / teams * teams, std::max(1, rounds / teams) * teams, teams}) {
        c.clusters = (w.m_blocks() + r - 1) / r;
        if (std::find(tried.begin(), tried.end(), c.clusters) != tried.end()) continue;
        tried.push_back(c.clusters);
        if (!wgmma_shared_bytes(w, n, c)) continue;
        char name[96];
        std::snprintf(name, sizeof(name), "wgmma %d/%d C%d cl%d R%d", groups, k_groups, cluster, c.clusters, r);
        found.push_back(candidate(name, c));
      }
    }
}

// Every configuration that fits the problem.
inline std::vector<Candidate> candidates(const jaxzip::lane_planar::Matrix& w, int n) {
  std::vector<Candidate> found;
  add_direct_candidates(w, n, found);
  add_wgmma_candidates(w, n, found);
  if (n > jaxzip::lane_planar::kWgmmaMaxN && w.k % 8 == 0) found.push_back({"wide", false, {}, {}, true});
  return found;
}

// What the library would run.
inline std::vector<Candidate> chosen_candidates(const jaxzip::lane_planar::Matrix& w, int n) {
  using namespace jaxzip::lane_planar;
  std::vector<Candidate> found;
  if (n <= kDirectMaxN) {
    const DirectConfig direct = choose_direct(w, n);
    if (direct.clusters) found.push_back(candidate("chosen direct", direct));
  }
  if (wgmma_shared_bytes(w, n, choose_wgmma(w, n))) found.push_back(candidate("chosen wgmma", choose_wgmma(w, n)));
  if (n <= 64) found.push_back(candidate("invariant wgmma", choose_batch_invariant(w)));
  return found;
}
