// What the kernels over rows of bf16 share: eight values in a register vector, and their launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../gated_activation.cuh"
#include "../launch.h"
#include "../ptx.cuh"

namespace jaxzip::decode_chain {

constexpr int kVector = 8;  // bf16 in 16 bytes

template <class... Pointers>
bool whole_vectors(int features, Pointers... rows) {
  const uintptr_t any = (reinterpret_cast<uintptr_t>(rows) | ...);
  return features % kVector == 0 && any % 16 == 0;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int grid, int threads, cudaStream_t stream, bool overlap, Arguments... arguments) {
  const Launch launch(dim3(grid), threads, 0, stream, 1, overlap);
  return cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace jaxzip::decode_chain
