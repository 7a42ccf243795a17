// Host interface of the wgmma matmul: y[n, m] = x[n, k] @ W[m, k].T, W lane-planar or raw.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "../epilogue.h"
#include "layout.h"

namespace jaxzip::lane_planar {

constexpr int kWgmmaMaxN = 256;  // of one instruction: more columns are slices of so many, each with CTAs of its own that decode for it
constexpr int kWgmmaMaxSlices = 16;

struct WgmmaConfig {
  int k_groups;   // 1, 2 or 4: so many of a CTA's warp groups share a row block and split its part of K, chunk by chunk
  int cluster;    // K is split over so many CTAs, 1..8
  int clusters;   // any number in 1..ceil(m / 64); row blocks are dealt to them in turn
  int slots = 0;  // of the ring, 3..16; 0: as many as fit
};

constexpr int wgmma_slices(int n) { return (n + kWgmmaMaxN - 1) / kWgmmaMaxN; }

// Warp groups of a CTA that multiply, each 64 rows at a time.
constexpr int wgmma_groups(int n) { return n <= 128 ? 4 : 2; }

// What a launch multiplies: of the matrix's row blocks, or of the pairs of a gated product, `count` from `first` on; 0: all of them.
struct RowBlocks {
  int first = 0, count = 0;
  bool behind_other = false;  // the launch before has the others: this one may start while it still runs
};

// For plans and choices: as `w`, with so many row blocks, or pairs of them.
inline Matrix with_row_blocks(const Matrix& w, int count, bool gated) {
  Matrix part = w;
  part.m = (count << gated) * kBlock;
  return part;
}

// The configuration for this shape: measured on an H200, else by a model fitted to its 132 SMs. There is one for every m, k >= 1 and
// n of at most kWgmmaMaxSlices. Asks nothing of the driver. `chained`: for kernels that overlap. `gated`: of a gated product (see Epilogue).
WgmmaConfig choose_wgmma(const Matrix& w, int n, bool chained = false, bool gated = false);

// One configuration for every n in 1..64: the order of summation depends on m and k only, so a column's bits do not depend on n.
WgmmaConfig choose_batch_invariant(const Matrix& w);

// Shared memory that a CTA needs, or 0 if there is no such kernel or more is needed than an SM has. Of a gated product (see Epilogue)
// row blocks are dealt in pairs, so `clusters` is at most half as many.
int wgmma_shared_bytes(const Matrix& w, int n, const WgmmaConfig& config, bool raw = false, bool gated = false);

// Slots of the ring then; 0 as well.
int wgmma_slots(const Matrix& w, int n, const WgmmaConfig& config, bool raw = false, bool gated = false);

// How many clusters of this configuration run at once on the current device; asks the driver.
int wgmma_resident_clusters(const Matrix& w, int n, const WgmmaConfig& config);

// Launches on `stream`: no allocation, no synchronisation, safe to capture. `w.blocks` holds bf16 in fragment order
// (2048 words a block, no entries, zero shifts) if `raw`. `overlap` asks for programmatic dependent launch: only x, bias, residual
// and y may then depend on the kernel before. Returns cudaErrorInvalidValue for a configuration that does not fit, and
// cudaErrorNotSupported where the driver has no tensor maps.
cudaError_t launch_matmul_wgmma(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue,
                                const WgmmaConfig& config, cudaStream_t stream, bool raw = false, bool overlap = false,
                                const RowBlocks& part = {});

}  // namespace jaxzip::lane_planar
