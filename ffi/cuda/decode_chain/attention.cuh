// Instructions of the attention kernel that CUDA C++ has no names for.
#pragma once
#include <cstdint>

#include "../ptx.cuh"

namespace jaxzip::ptx {

// An 8x8 matrix of 16-bit elements, two a lane, turned.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t v) {
  uint32_t turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(turned) : "r"(v));
  return turned;
}
// All threads of a cluster meet; what they wrote to shared memory before, all may read.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place of shared memory in another CTA of the cluster.
template <class T>
__device__ __forceinline__ const T* of_rank(const T* p, int rank) {
  const T* there;
  asm("mapa.u64 %0,%1,%2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
}

}  // namespace jaxzip::ptx
