// The tensor maps by which kernels bring rows to shared memory, x or a cache's keys and values, and results back.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace jaxzip {

// rows[n][k] as [k / 64][n][64], so that one copy brings `chunks_at_once` chunks of 64 k of up to `rows_at_once` rows, or as one [n][k] where
// k is ragged (not `whole_chunks`), with 128-byte swizzle. What lies outside reads as zero. k is a multiple of 8 and `rows` aligned to
// 16 bytes. Returns cudaErrorNotSupported where the driver has no tensor maps.
cudaError_t make_rows_map(CUtensorMap* map, const __nv_bfloat16* rows, int n, int k, int rows_at_once, int chunks_at_once, bool whole_chunks);

// y[n][rows] in boxes of `columns_at_once` by 64 rows, with 128-byte swizzle. rows is a multiple of 8 and y aligned to 16 bytes.
cudaError_t make_y_map(CUtensorMap* map, __nv_bfloat16* y, int n, int rows, int columns_at_once);

}  // namespace jaxzip
