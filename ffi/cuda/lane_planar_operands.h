// What the handlers of lane-planar's CUDA kernels share: a payload as these take it, and their errors.
#pragma once
#include <cuda_runtime.h>

#include "lane_planar/layout.h"
#include "operands.h"

namespace jaxzip {

// Throws unless a launch went well; `instead` says what to do on a GPU that has no such kernel.
inline void CheckHopper(cudaError_t status, const char* instead) {
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    throw std::runtime_error(std::string("these kernels need a Hopper GPU (compute capability 9.0); ") + instead);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

inline lane_planar::Matrix ToMatrix(const LanePlanarPayload& p) {
  if (p.m > INT32_MAX || p.k > INT32_MAX || p.overflow_length > INT32_MAX)
    throw InvalidArgument("the CUDA kernels take fewer than 2^31 rows, columns and overflow entries");
  return {p.blocks,
          reinterpret_cast<const lane_planar::OverflowEntry*>(p.overflow),
          p.shift,
          static_cast<uint32_t>(p.overflow_length),
          p.block_words,
          static_cast<int>(p.m),
          static_cast<int>(p.k)};
}

}  // namespace jaxzip
