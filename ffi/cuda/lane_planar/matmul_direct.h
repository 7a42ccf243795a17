// Host interface of the small-N matmul: y[n, m] = x[n, k] @ W[m, k].T for n <= 32, W lane-planar or raw.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "../epilogue.h"
#include "layout.h"

namespace jaxzip::lane_planar {

constexpr int kDirectMaxN = 32;
constexpr long long kSmallMatrix = 8000000;  // weights: below, the direct kernel is the faster one for more rows

struct DirectConfig {
  int tiles_per_warp;  // 1, 2 or 4: a warp takes so many of a block's four 16x64 tiles, a row group of 16, 32 or 64 rows
  int warps;           // 8 or 16
  int ctas_per_sm;
  int cluster;         // K is split over so many CTAs, at most 8
  int clusters;        // 1 .. row groups of the matrix; row groups are dealt to them in turn
};

// The configuration for this shape by a model fitted to an H200's 132 SMs; `clusters` is 0 where wgmma is known to be faster, and where
// no kernel fits (n too large for its x slice). Asks nothing of the driver. `chained`: for kernels that overlap.
DirectConfig choose_direct(const Matrix& w, int n, bool chained = false);

// Shared memory that a CTA needs, or 0 if there is no such kernel or more is needed than an SM has. Of a gated product (see Epilogue)
// row groups are dealt in pairs, so `clusters` is at most half as many.
int direct_shared_bytes(const Matrix& w, int n, const DirectConfig& config, bool raw = false, bool gated = false);

// How many clusters of this configuration run at once on the current device; asks the driver.
int direct_resident_clusters(const Matrix& w, int n, const DirectConfig& config);

// A column's bits depend on the configuration, not on n or on the other columns: a configuration that fits n = 32 gives each
// column the same bits at any n (tiles_per_warp 4, warps 8, ctas_per_sm 1, for example, exists for all n).
// Launches on `stream`: no allocation, no synchronisation, safe to capture. `w.blocks` holds bf16 in fragment order
// (2048 words a block, no entries, zero shifts) if `raw`. `overlap` asks for programmatic dependent launch: only x and y may
// then depend on the kernel before. Returns cudaErrorInvalidValue for a configuration that does not fit.
cudaError_t launch_matmul_direct(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue,
                                 const DirectConfig& config, cudaStream_t stream, bool raw = false,
                                 bool overlap = false);

}  // namespace jaxzip::lane_planar
