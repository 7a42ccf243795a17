// How one launch of the wgmma matmul splits its work and its shared memory, computed on the host.
#pragma once
#include "matmul_wgmma.h"

namespace jaxzip::lane_planar {

struct WgmmaPlan {
  int groups, k_groups, teams;
  int inverse_k_groups, inverse_teams, inverse_stage_chunks;  // x / y = x * inverse >> 16 for x < kMaxDivided
  int cluster;     // CTAs that share a row block, each with its part of K
  int clusters;
  int row_blocks;  // of the clusters with most
  int k_blocks, k_longer;  // chunks of 64 k of a rank; the first k_longer ranks have one more
  // x lies in stages of `stage_chunks` chunks. `resident`: all of a rank's K has its place and is loaded once; else the stages
  // are a ring, filled anew for every row block of a team.
  int stage_chunks, stages;
  bool resident;
  int items;       // 64 x 8 sums of a row block are items of 512 bytes: (8 columns, 16 rows); item i belongs to rank i % cluster
  int owned;       // of the rank with most
  int received_bytes;  // a team's
  int ring;        // encoded blocks that each warp group has room for
  int blocks, planes, received, barriers, unused, bytes;  // offsets in shared memory; x is at 0
};

// A kernel that divides by multiplying keeps its counters uniform. y <= 64.
constexpr int kMaxDivided = 1024;
constexpr int inverse(int y) { return 65536 / y + 1; }

constexpr int kItemBytes = 512;
constexpr int kMaxStages = 64;
constexpr int kMinStages = 3;  // of x, where they are a ring
constexpr int kRefillLag = 2;  // a stage is filled anew so many stages after it was used
constexpr int kMaxGroups = 4;
constexpr int kMaxRing = 16;
// full[kMaxStages], empty[kMaxStages], received[kMaxGroups], free[kMaxGroups], ring full[kMaxGroups][kMaxRing], ring empty[...]
constexpr int kBarrierBytes = (2 * kMaxStages + 2 * kMaxGroups + 2 * kMaxGroups * kMaxRing) * 8;
constexpr int kUnusedBytes = kMaxGroups * 4 * 4;  // a word a warp, where lanes without an escape store

__host__ __device__ constexpr int chunk_bytes(int instruction_n) { return instruction_n * kBlock * 2; }

// `bytes` is 0 if it does not fit into `limit`.
WgmmaPlan plan_wgmma(const Matrix& w, int instruction_n, const WgmmaConfig& config, int plane_bytes, int limit);

}  // namespace jaxzip::lane_planar
