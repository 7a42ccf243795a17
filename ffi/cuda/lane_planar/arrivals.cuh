// How a warp announces on barriers what its lanes have done.
#pragma once
#include "wgmma.cuh"

namespace jaxzip::lane_planar {

// Lanes of a warp that arrive. They meet before, so one is enough. compute-sanitizer's racecheck follows each lane's own arrivals only: a build
// for it (JAXZIP_RACECHECK, see bench/cuda/Makefile) has all lanes arrive, and otherwise the same code.
#ifdef JAXZIP_RACECHECK
constexpr int kArrivingLanes = 32;
#else
constexpr int kArrivingLanes = 1;
#endif

// On this CTA's barrier, and on the same one of the first `ctas` CTAs of the cluster; by whole warps that have met.
__device__ __forceinline__ void arrive(uint32_t barrier, int lane) {
  if (lane < kArrivingLanes) ptx::barrier_arrive(barrier);
}
__device__ __forceinline__ void arrive_at_all(uint32_t barrier, int ctas, int lane) {
  if constexpr (kArrivingLanes == 1) {
    if (lane < ctas) ptx::barrier_arrive_cluster(barrier, lane);
  } else {
    for (int cta = 0; cta < ctas; ++cta) ptx::barrier_arrive_cluster(barrier, cta);
  }
}

}  // namespace jaxzip::lane_planar
