// How one launch of the wgmma matmul splits its work and its shared memory, computed on the host.
#pragma once
#include "matmul_wgmma.h"

namespace jaxzip::lane_planar {

struct WgmmaPlan {
  int k_groups, teams, log_k_groups;
  int cluster;     // CTAs that share a row block, each with its part of K
  int clusters;
  int slices;      // of the columns; as many clusters, one behind the other, read the same row blocks
  int first, dealt;  // of the matrix's row blocks, or pairs of them, this launch has `dealt` from `first` on
  int row_blocks;    // of the clusters with most
  int takers, log_takers;  // teams that take one of these at a time, or pairs of teams
  int busy;        // teams that get one of these; the others end at once and have no room
  // Of a gated product row blocks are dealt in pairs, of a gate's and the one `half` further down. This is the next team's, or the same team's next
  // pass: one of these is 1, whichever takes fewer passes, each of which reads x.
  int pair_of_teams, pair_of_passes, half;
  int chunks, k_longer;  // chunks of 64 k of a rank; the first k_longer ranks have one more
  int early;       // slots filled before the kernel before has ended
  int slots;       // of the ring: each has a chunk of x for every k group and an encoded block for every busy warp group
  int slot_bytes;  // of its encoded blocks
  int team_bytes;  // from a team's blocks of a slot to the next one's
  // 127 where blocks lie in a slot as they do in memory, as far from the start of a line of 128 bytes: copies are faster so (bench/NOTES.md,
  // 62). 0 where all blocks start with a line, and where a row block's first one does not.
  int line_mask;
  int items;       // 64 x 8 sums of a row block are items of 512 bytes: (8 columns, 16 rows); item i belongs to rank i % cluster
  int owned;       // of the rank with most
  int owning_most;    // ranks that own so many; the others own one less
  int ranks_inverse;  // 2^16 / cluster, rounded up
  int received_bytes;  // a team's
  bool sums_in_slots;  // they arrive where the slots were, when all warps of the cluster have done with these
  int blocks, planes, received, barriers, overflow, bytes;  // offsets in shared memory; x is at 0
  bool overflow_listed;  // the CTA has a list of its overflow entries
  // These pass through every slot, also where their cluster has fewer row blocks than others.
  __host__ __device__ int busy_warps() const { return busy * k_groups * 4; }
  // Before the barriers is an area of each warp's own: shifts of 16 rows, and a byte a lane that nobody reads, where lanes without an escape store.
};

constexpr int kItemBytes = 512;
constexpr int kFewColumns = 16;  // up to so many every warp sends its own sums: adding them in the CTA first costs more than it saves
constexpr int kMaxGroups = 4, kMaxCluster = 8;
constexpr int kShiftBytes = 16, kWarpAreaBytes = kShiftBytes + 32, kWarpAreasBytes = kWarpAreaBytes * 4 * kMaxGroups;
constexpr int kMaxSlots = 16, kMinSlots = 2;

// Barriers of a slot: it is full, it was used.
constexpr int kFull = 0, kEmpty = 8, kSlotBarriers = 16;
// Then of each team: sums of other CTAs have arrived, and may be sent again.
constexpr int kArrived = kMaxSlots * kSlotBarriers, kMaySend = kArrived + 8 * kMaxGroups;
// And one of the CTA: no warp of the cluster needs a slot any more.
constexpr int kIdle = kMaySend + 8 * kMaxGroups;
constexpr int kBarrierBytes = kIdle + 16;

// A CTA's list of overflow entries has room for one a lane: of a matrix of 525 million weights at 11.44 bits, it has 26. A matrix' own list is
// gathered from up to kMaxGathered entries; a longer one would take too long.
constexpr int kOverflowListHeader = 16, kOverflowRoom = 32, kMaxGathered = 1024;
constexpr int kOverflowListBytes = kOverflowListHeader + kOverflowRoom * 8;

__host__ __device__ constexpr int chunk_bytes(int instruction_n) { return instruction_n * kBlock * 2; }

constexpr int kLineBytes = 128;

// Places of a slot's blocks: `team_blocks` lie one behind the other.
inline void plan_slots(WgmmaPlan& plan, const Matrix& w, int teams, int team_blocks) {
  const int block_bytes = w.block_words * 4, bytes = team_blocks * block_bytes;
  const bool in_lines = block_bytes % kLineBytes && static_cast<long long>(w.k_blocks()) * block_bytes % kLineBytes == 0;
  plan.line_mask = in_lines ? kLineBytes - 1 : 0;
  plan.team_bytes = in_lines ? (bytes + kLineBytes - 1) / kLineBytes * kLineBytes : bytes;
  plan.slot_bytes = teams * plan.team_bytes + (in_lines ? kLineBytes : 0);
}

// For `groups` warp groups that multiply. `bytes` is 0 if it does not fit into `limit`.
WgmmaPlan plan_wgmma(const Matrix& w, int n, int instruction_n, int groups, const WgmmaConfig& config, bool gated, int plane_bytes,
                     int limit);

}  // namespace jaxzip::lane_planar
