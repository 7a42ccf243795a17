// Host interface of the row lookup.
#pragma once
#include <cuda_runtime.h>

#include "layout.h"

namespace jaxzip::lane_planar {

// Writes rows `ids` of the weight to out[count][k] as bf16, the bits that were encoded; a row of NaN for an id outside [0, m).
// Reads the blocks of those rows only. No allocation, no synchronisation, safe to capture.
cudaError_t launch_take(const Matrix& w, const int32_t* ids, int count, uint16_t* out, cudaStream_t stream);

}  // namespace jaxzip::lane_planar
