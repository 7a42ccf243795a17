// What the handlers of the TCA-TBE kernels check beyond shapes.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "handlers/common.h"

namespace jaxzip::tca_tbe {

// The kernels copy 16 bytes at a time. XLA's buffers are aligned; a slice of a batch is too, where lengths are what
// jaxzip's encoder pads them to.
inline void ExpectAligned(const Payload& p) {
  const auto expect = [](const char* name, const void* data, int64_t size, unsigned alignment) {
    if (size && reinterpret_cast<uintptr_t>(data) % alignment)
      throw InvalidArgument(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
  };
  expect("sign_mantissa", p.sign_mantissa, p.sign_mantissa_len, 16);
  expect("full", p.full, p.full_len, 16);
  expect("tile_offsets", p.tile_offsets, 1, 8);
}

inline void RequireSuccess(cudaError_t status) {
  if (status == cudaErrorInvalidValue) throw InvalidArgument("sizes are out of the kernels' range");
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace jaxzip::tca_tbe
