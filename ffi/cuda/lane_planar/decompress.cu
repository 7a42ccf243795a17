// Lane-planar decompression: four warps decode a 64x64 block, turn it in shared memory, and store 128-byte rows.
#include "decompress.h"

#include "weights.cuh"

namespace jaxzip::lane_planar {
namespace {

constexpr int kThreads = 32 * kTiles;
constexpr int kBlocksPerCta = 2;  // consecutive in k; with 4 or 8 the stores of one wait for the loads of the next
constexpr int kPitch = kBlock + 8;  // u16; rows stay aligned to 16 bytes and start in different banks

// Takes the row's shift back from both halves.
__device__ __forceinline__ uint32_t unshift(uint32_t pair, int shift) {
  const uint32_t low = unshift_exponent((pair >> 7) & 0xFFu, shift), high = unshift_exponent((pair >> 23) & 0xFFu, shift);
  return (pair & 0x807F807Fu) | (low << 7) | (high << 23);
}

template <bool kTransposed>
__global__ void __launch_bounds__(kThreads) decompress(const __grid_constant__ Matrix w, uint16_t* out, int strips) {
  __shared__ __align__(128) uint16_t planes[kTiles * kTileElements];
  __shared__ __align__(128) uint16_t turned[kBlock * kPitch];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int row_block = blockIdx.x / strips, first = (blockIdx.x - row_block * strips) * kBlocksPerCta;
  const int k_blocks = w.k_blocks(), last = min(first + kBlocksPerCta, k_blocks);
  const PatchPlane<1> plane{ptx::shared_address(planes + warp * kTileElements), lane};
  plane.fill();
  __syncwarp();
  int shift[2];
  for (int i = 0; i < 2; ++i) shift[i] = w.shift[row_block * kBlock + warp * kTileRows + fragment_row(lane, i)];

  for (int kb = first; kb < last; ++kb) {
    const uint32_t index = static_cast<uint32_t>(row_block) * k_blocks + kb;
    const uint32_t* block = w.blocks + static_cast<size_t>(index) * w.block_words;
    uint32_t registers[LanePlanar::kRegisters], words[2] = {};
    if (2 * lane < w.block_words - kHeaderStart) ptx::load_stream<2>(words, block + kHeaderStart + 2 * lane);
    LanePlanar::load(registers, block, warp, lane);
    const uint2 entries = make_uint2(words[0], words[1]);
    const uint32_t count = __shfl_sync(~0u, entries.x, 0) >> 24, overflow = __shfl_sync(~0u, entries.y, 0);
    plane.scatter<false>(entries, count, warp);
    if (overflow)
      scatter_overflow(w.overflow, w.overflow_length, overflow - 1, index, plane.base, warp * kTileElements,
                       plane.kPositions);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[4];
      LanePlanar::decode(a, registers, plane.base + lane * 16, j);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t pair = unshift(a[r], shift[r & 1]);
        const int row = warp * kTileRows + fragment_row(lane, r), column = fragment_column(j, lane, r, 0);
        if (kTransposed) {
          turned[column * kPitch + row] = static_cast<uint16_t>(pair);
          turned[(column + 1) * kPitch + row] = static_cast<uint16_t>(pair >> 16);
        } else {
          *reinterpret_cast<uint32_t*>(turned + row * kPitch + column) = pair;
        }
      }
    }
    __syncthreads();
    if (overflow)
      plane.fill();
    else
      plane.scatter<true>(entries, count, warp);
    const int rows = kTransposed ? w.k : w.m, columns = kTransposed ? w.m : w.k;
    const int row0 = (kTransposed ? kb : row_block) * kBlock, column0 = (kTransposed ? row_block : kb) * kBlock;
    for (int i = threadIdx.x; i < kBlock * kBlock / 8; i += kThreads) {
      const int row = i >> 3, column = (i & 7) * 8;
      if (row0 + row >= rows) continue;
      uint16_t* to = out + static_cast<size_t>(row0 + row) * columns + column0 + column;
      const uint16_t* from = turned + row * kPitch + column;
      if (columns % 8 == 0 && column0 + column < columns) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int c = 0; c < 8 && column0 + column + c < columns; ++c) to[c] = from[c];
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_decompress(const Matrix& w, uint16_t* out, bool transposed, cudaStream_t stream) {
  const int strips = (w.k_blocks() + kBlocksPerCta - 1) / kBlocksPerCta;
  const long long ctas = static_cast<long long>(strips) * w.m_blocks();
  if (ctas < 1 || ctas > 0x7FFFFFFFll) return cudaErrorInvalidValue;
  const auto kernel = transposed ? decompress<true> : decompress<false>;
  kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(w, out, strips);
  return cudaGetLastError();
}

}  // namespace jaxzip::lane_planar
