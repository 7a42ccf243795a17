// The tensor maps by which wgmma kernels bring x to shared memory, and results back.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace jaxzip::lane_planar {

// x[n][k] as [k / 64][n][64], so that one copy brings a slot's `slot_chunks` chunks of up to `instruction_n` rows, or as one [n][k] where
// k is ragged (not `whole_chunks`). What lies outside reads as zero. k is a multiple of 8 and x aligned to 16 bytes. Returns
// cudaErrorNotSupported where the driver has no tensor maps.
cudaError_t make_x_map(CUtensorMap* map, const __nv_bfloat16* x, int n, int k, int instruction_n, int slot_chunks, bool whole_chunks);

// y[n][rows] in boxes of `columns_at_once` by 64 rows, with 128-byte swizzle. rows is a multiple of 8 and y aligned to 16 bytes.
cudaError_t make_y_map(CUtensorMap* map, __nv_bfloat16* y, int n, int rows, int columns_at_once);

}  // namespace jaxzip::lane_planar
