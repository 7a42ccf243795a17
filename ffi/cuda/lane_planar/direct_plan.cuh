// Arguments of one launch of the small-N matmul, and how its work and its shared memory are dealt.
#pragma once
#include <algorithm>

#include "../epilogue.h"
#include "layout.h"

namespace jaxzip::lane_planar {

constexpr int kListHeader = 16;  // its barrier
constexpr uint32_t kMaxListed = 512;  // overflow entries: of longer lists each block's are read when it needs them
constexpr int kSumPad = 4;  // floats after a column of sums: a warp's stores then fall into different banks

// Work split and shared memory (bytes from its start) of one launch, computed on the host. A row group is what a warp takes
// of a block: 16, 32 or 64 rows.
struct DirectPlan {
  int cluster;                // CTAs that share a row group, each with its part of K
  int clusters;               // row groups are dealt to them in turn
  int groups, groups_longer;  // of a cluster; the first groups_longer clusters have one more, or a pair more
  int gated, half;            // 1: groups are dealt in pairs, of a gate's and of those half further down
  int k_blocks, k_longer;     // of a rank; the first k_longer ranks have one more
  int all_k_blocks;
  int log_n;    // of the columns in the buffers of sums
  int x_pitch;  // 16 bytes over a multiple of 128: eight rows start in eight different bank groups
  int area;     // of a warp: its patch planes, and in the end the sum of the row group that it did not finish
  int chunks;   // of four rows that a rank owns of every row group: chunk c is the (c / cluster)th of rank c % cluster
  int magic;    // c / cluster = c * magic >> 16
  int barrier, owners, shift, x, finished, received, overflow, bytes;
  bool overflow_listed;  // the matrix' overflow entries are copied to shared memory
};

struct DirectArgs {
  Matrix w;
  const __nv_bfloat16* x;  // [n][k]
  int n;
  bool overlap;  // launched while the kernel before may still run: only then do weights go before x
  DirectPlan plan;
  Epilogue epilogue;
};

template <class Weights>
DirectPlan plan_direct(const Matrix& w, int n, int tiles_per_warp, int warps, int cluster, int clusters, bool gated, int limit) {
  DirectPlan p = {};
  const int group_rows = tiles_per_warp * kTileRows, all_groups = (w.m + group_rows - 1) / group_rows;
  p.cluster = cluster;
  p.clusters = clusters;
  p.gated = gated;
  p.half = all_groups / 2;
  p.groups = (all_groups >> p.gated) / clusters << p.gated;
  p.groups_longer = (all_groups >> p.gated) % clusters;
  p.all_k_blocks = w.k_blocks();
  p.k_blocks = p.all_k_blocks / cluster;
  p.k_longer = p.all_k_blocks % cluster;
  while (1 << p.log_n < n) ++p.log_n;
  p.x_pitch = (p.k_blocks + (p.k_longer > 0)) * kBlock * 2 + 16;
  p.chunks = (group_rows / 4 + cluster - 1) / cluster;
  p.magic = 65536 / cluster + 1;
  const int most_groups = p.groups + ((p.groups_longer > 0) << p.gated);
  const int sum_bytes = ((group_rows + kSumPad) << p.log_n) * 4;
  const int plane_bytes = tiles_per_warp * Weights::kPlaneBytes;
  p.area = sum_bytes > plane_bytes ? sum_bytes : plane_bytes;
  p.barrier = warps * p.area;
  p.owners = p.barrier + 16;
  p.shift = p.owners + (most_groups * 2 + 15) / 16 * 16;
  p.x = p.shift + most_groups * group_rows;
  p.finished = p.x + n * p.x_pitch;
  p.received = p.finished + most_groups * sum_bytes;
  p.overflow = p.received + (cluster > 1 ? cluster * (most_groups * p.chunks << p.log_n) * 16 : 0);
  const int list_bytes = kListHeader + static_cast<int>(std::min<uint32_t>(w.overflow_length, kMaxListed + 1) * sizeof(OverflowEntry));
  p.overflow_listed = w.overflow_length && w.overflow_length <= kMaxListed && p.overflow + list_bytes <= limit;
  p.bytes = p.overflow + (p.overflow_listed ? list_bytes : 0);
  return p;
}

}  // namespace jaxzip::lane_planar
