// The launch of a kernel with what Hopper adds: clusters, and a start before the kernel before has ended.
#pragma once
#include <cuda_runtime.h>

namespace jaxzip {

struct Launch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  // `cluster` CTAs that follow each other in x are a cluster, unless it is 1. `overlap`: programmatic dependent launch; the kernel itself
  // waits for the one before.
  Launch(dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream, int cluster, bool overlap) {
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    if (overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Launch(const Launch&) = delete;  // the configuration points to the attributes
};

}  // namespace jaxzip
