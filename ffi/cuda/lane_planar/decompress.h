// Host interface of lane-planar decompression to plain bf16.
#pragma once
#include <cuda_runtime.h>

#include "layout.h"

namespace jaxzip::lane_planar {

// Writes the exact bits of every weight, as [m, k], or as [k, m] if `transposed`. `out` is 16-byte aligned. No
// allocation, safe to capture.
cudaError_t launch_decompress(const Matrix& w, uint16_t* out, bool transposed, cudaStream_t stream);

}  // namespace jaxzip::lane_planar
