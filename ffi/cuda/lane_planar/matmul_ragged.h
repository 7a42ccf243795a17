// Host interface of the grouped matmul of a decoding step: y[i] = x[i] @ W[expert of row i].T, rows sorted by expert.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "../epilogue.h"
#include "layout.h"

namespace jaxzip::lane_planar {

constexpr int kRaggedMaxExperts = 1024;   // what two votes of a warp find one in
constexpr int kRaggedMaxRows = 1 << 20;  // so that sums of sizes stay below 2^31, whatever the sizes

// Encoded experts of one shape, one after the other in each array.
struct Stack {
  Matrix first;  // expert 0
  int experts;
};

// Rows of x, and how many each expert has; both in device memory, where a kernel before may just have put them.
struct Groups {
  const __nv_bfloat16* x;  // [n][pitch], rows on 16 bytes; what lies past column k is zero
  int n, pitch;            // a multiple of 8, k or a little more
  const int32_t* sizes;    // [experts]; rows past their sum give zeros
};

struct RaggedConfig {
  int tiles_per_warp;  // 2 or 4: a work item has 32 or 64 rows of an expert ...
  int column_tiles;    // ... and up to 8, 16 or 32 of the expert's rows of x
  int warps;           // of a team: K is split over so many; a result's bits depend on this alone
  int teams;           // of a CTA, of which there is one an SM
};

// The configuration for these shapes on an H200; asks nothing of the driver. `warps` depends on k alone.
RaggedConfig choose_ragged(const Stack& w, int n);

// Shared memory that a CTA needs, or 0 if there is no such kernel.
int ragged_shared_bytes(const Stack& w, const RaggedConfig& config, bool raw = false);

// Launches on `stream`: no allocation, no synchronisation, safe to capture. Only the blocks of experts that have rows are
// read. `raw` as in launch_matmul_direct. Returns cudaErrorInvalidValue for what does not fit.
cudaError_t launch_matmul_ragged(const Stack& w, const Groups& groups, void* y, bool fp32_out, const RaggedConfig& config,
                                 cudaStream_t stream, bool raw = false);

}  // namespace jaxzip::lane_planar
