// Arguments of the wgmma matmul, and how its x comes to shared memory: tensor copies that swizzle, or a plain loop where x has no
// tensor map (k not a multiple of 8, or x not aligned to 16 bytes).
#pragma once
#include <cuda_bf16.h>

#include "../epilogue.h"
#include "wgmma.cuh"
#include "wgmma_plan.h"

namespace jaxzip::lane_planar {

enum class XLoad : int { kSlot, kChunk, kPlain };  // one tensor copy a slot (k % 64 == 0), one a chunk, or no tensor map

struct WgmmaArgs {
  CUtensorMap x_map;
  Matrix w;
  const __nv_bfloat16* x;  // [n][k]
  Epilogue epilogue;
  int n;
  bool overlap;  // launched while the kernel before may still run: only then do weights go before x
  XLoad x_load;
  WgmmaPlan plan;
};

// Asks for `chunks` chunks of x from row `first_n` on, the first of them chunk `first` of K, at `to`; one thread calls it. What is
// outside of x becomes zero.
template <int kN>
__device__ __forceinline__ void copy_x(const WgmmaArgs& args, uint32_t to, uint32_t barrier, int first_n, int first, int chunks) {
  if (args.x_load == XLoad::kSlot) {
    ptx::tensor_copy(to, &args.x_map, 0, first_n, first, barrier);
  } else {
#pragma unroll 1
    for (int i = 0; i < chunks; ++i) ptx::tensor_copy(to + i * chunk_bytes(kN), &args.x_map, (first + i) * kBlock, first_n, 0, barrier);
  }
}

// The same by a warp, without a tensor map; x is there when it returns.
template <int kN>
__device__ __forceinline__ void load_plain_x(const WgmmaArgs& args, uint32_t to, int first_n, int first, int chunks, int lane) {
#pragma unroll 1
  for (int i = lane; i < chunks * kN * kBlock; i += 32) {
    const int k = i % kBlock, n = i / kBlock % kN, chunk = i / (kBlock * kN), column = (first + chunk) * kBlock + k;
    uint16_t v = 0;
    if (first_n + n < args.n && column < args.w.k)
      v = reinterpret_cast<const uint16_t*>(args.x)[static_cast<size_t>(first_n + n) * args.w.k + column];
    const uint32_t at = n * kBlock * 2 + k * 2;
    ptx::store_shared_u16(to + chunk * chunk_bytes(kN) + (at ^ ((n & 7) << 4)), v);
  }
  ptx::fence_async_proxy();
  __syncwarp();
}

}  // namespace jaxzip::lane_planar
