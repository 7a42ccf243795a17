// Decodes a TCA-TBE payload into dense bf16. sm_80 and later.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "jaxzip/kernels.h"

namespace jaxzip::tca_tbe {

// out: bf16 bits [m, k], or with `transposed` [k, m]. All pointers are device memory; the payload's arrays are 16-byte aligned, out
// needs 2 bytes and is faster where rows start on 16. Returns cudaErrorInvalidValue for sizes out of range.
cudaError_t launch_decompress(const Payload& w, uint16_t* out, bool transposed, cudaStream_t stream);

}  // namespace jaxzip::tca_tbe
