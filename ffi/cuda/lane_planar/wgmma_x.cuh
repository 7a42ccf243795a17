// Arguments of the wgmma matmul, and how its x comes to shared memory: tensor copies that swizzle, or a plain loop where x has no
// tensor map (k not a multiple of 8, or x not aligned to 16 bytes).
#pragma once
#include <cuda_bf16.h>

#include "../epilogue.h"
#include "wgmma.cuh"
#include "wgmma_plan.h"

namespace jaxzip::lane_planar {

enum class XLoad : int { kStage, kChunk, kPlain };  // one tensor copy a stage (k % 64 == 0), one a chunk, or no tensor map

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

// Puts stage `stage` of this rank's x into `slot`; a warp calls it.
template <int kN>
__device__ __forceinline__ void fill_stage(const WgmmaArgs& args, uint32_t x_at, uint32_t barrier, int first_block, int my_blocks,
                                           int stage, int lane) {
  constexpr int kChunkBytes = chunk_bytes(kN);
  const int chunks = args.plan.stage_chunks;
  const int block = first_block + stage * chunks;
  if (args.x_load != XLoad::kPlain) {
    if (ptx::elect_one()) {
      ptx::barrier_expect(barrier, chunks * kChunkBytes);
      if (args.x_load == XLoad::kStage)
        ptx::tensor_copy(x_at, &args.x_map, 0, 0, block, barrier);
      else
        for (int i = 0; i < chunks; ++i)
          ptx::tensor_copy(x_at + i * kChunkBytes, &args.x_map, (block + i) * kBlock, 0, 0, barrier);
    }
    __syncwarp();
    return;
  }
  const int used = min(chunks, my_blocks - stage * chunks);
#pragma unroll 1
  for (int i = lane; i < used * kN * kBlock; i += 32) {
    const int k = i % kBlock, n = i / kBlock % kN, chunk = i / (kBlock * kN), column = (block + chunk) * kBlock + k;
    uint16_t v = 0;
    if (n < args.n && column < args.w.k)
      v = reinterpret_cast<const uint16_t*>(args.x)[static_cast<size_t>(n) * args.w.k + column];
    const uint32_t at = n * kBlock * 2 + k * 2;
    ptx::store_shared_u16(x_at + chunk * kChunkBytes + (at ^ ((n & 7) << 4)), v);
  }
  ptx::fence_async_proxy();
  __syncwarp();
  if (lane == 0) ptx::barrier_arrive(barrier);
}

}  // namespace jaxzip::lane_planar
