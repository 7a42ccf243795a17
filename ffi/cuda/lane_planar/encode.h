// Host interface of the lane-planar encoder on the device: the bytes of the reference encoder, in three steps.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace jaxzip::lane_planar {

// bf16 bits on the device: [m][k], or [k][m] if `transposed`.
struct DenseBits {
  const uint16_t* bits;
  int m, k;
  bool transposed;
};

// 1. shift[m_blocks * 64]: what to add to the exponents of each row; 0 past m.
cudaError_t launch_choose_shifts(const DenseBits& w, int8_t* shift, cudaStream_t stream);

// 2. counts[m_blocks * k_blocks]: escapes of each block. From these the caller chooses the width of blocks, and where each block's overflow entries start.
cudaError_t launch_count_escapes(const DenseBits& w, const int8_t* shift, uint32_t* counts, cudaStream_t stream);

// 3. blocks[m_blocks][k_blocks][block_words] and overflow entries: those of block i go to overflow[starts[i]...], of `overflow_length`
// in all; what is past the last one is set to zero. starts[m_blocks * k_blocks + 1] is not trusted: nothing is written past the end.
cudaError_t launch_encode(const DenseBits& w, const int8_t* shift, const uint32_t* starts, int block_words, uint32_t* blocks,
                          OverflowEntry* overflow, uint32_t overflow_length, cudaStream_t stream);

}  // namespace jaxzip::lane_planar
