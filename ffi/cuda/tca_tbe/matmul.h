// y[n, m] = sum_k x[n, k] w[m, k] of a TCA-TBE payload: decoded in registers, multiplied by Tensor Cores, sums in fp32.
//
// sm_80 and later. The same bits on every run on the same device; no atomics, no allocation, no synchronisation. Two launches:
// the product, and the sums of row blocks that two or more CTAs share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../epilogue.h"
#include "jaxzip/kernels.h"

namespace jaxzip::tca_tbe {

constexpr int kMaxCtas = 256;     // of one launch; bounds the workspace
constexpr int kMaxColumns = 256;  // n

// Columns that are computed for n: 8, 16, or a multiple of 32.
constexpr int padded_columns(int n) { return n <= 8 ? 8 : n <= 16 ? 16 : (n + 31) / 32 * 32; }
// fp32 values of workspace; holds nothing between calls and need not be cleared.
constexpr int64_t matmul_workspace(int64_t m, int n) {
  return ((m + 63) / 64 + 2 * kMaxCtas) * 64 * padded_columns(n);
}

struct MatmulOptions {
  int max_warps = 0;     // of a CTA; 0: as many as fit
  int max_ctas = 0;      // 0: one a multiprocessor
  bool overlap = false;  // programmatic dependent launch of the second kernel (sm_90 and later)
};

// All pointers are device memory; the payload's arrays are 16-byte aligned (XLA's and cudaMalloc's are), x needs 2 bytes. 1 <= n <=
// kMaxColumns. `raw`: instead of the payload, bf16 weights in the order of the payload's positions [block][FragTile][64], zero
// padded, 16-byte aligned: the control, same tiling and order of sums. Returns cudaErrorInvalidValue for sizes out of range.
cudaError_t launch_matmul(const Payload& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, float* workspace,
                          cudaStream_t stream, const MatmulOptions& options = {}, const uint16_t* raw = nullptr);

}  // namespace jaxzip::tca_tbe
