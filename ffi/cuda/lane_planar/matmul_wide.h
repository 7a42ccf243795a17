// Host interface of the wgmma matmul of many columns: y[n, m] = x[n, k] @ W[m, k].T, W lane-planar or raw, for prompts.
#pragma once
#include "matmul_wgmma.h"

namespace jaxzip::lane_planar {

constexpr int kWideShare = 2;  // CTAs of a cluster, which bring parts of x to each other
constexpr int kWideTeams = 2;  // warp groups of a CTA, a row block each

// Whether x can be brought by tensor copies: k is a multiple of 8 and x aligned to 16 bytes.
bool wide_fits(const Matrix& w, const __nv_bfloat16* x);

// Whether it is expected to take less time than the wgmma matmul in slices. Asks nothing of the driver.
bool wide_is_faster(const Matrix& w, int n);

// Launches on `stream`: no allocation, no synchronisation, safe to capture. Sums are added in the order of k, whatever n is. `raw` and
// `overlap` as of launch_matmul_wgmma. Returns cudaErrorInvalidValue where it does not fit.
cudaError_t launch_matmul_wide(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, cudaStream_t stream,
                               bool raw = false, bool overlap = false);

}  // namespace jaxzip::lane_planar
