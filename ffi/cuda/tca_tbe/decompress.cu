// Decompression: the warps of a CTA take blocks of its range in turns, decodes it like the product does, and arranges what it
// decoded in shared memory so that rows of the result leave in 128-byte runs.
#include "decompress.h"

#include <algorithm>

#include "decode.cuh"

namespace jaxzip::tca_tbe {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kRowBytes = 64 * 2 + 16;  // of a staged row: free of bank conflicts

// Rows staged at once: those of a band, or, transposed, the 64 k of a block.
template <bool kTransposed>
constexpr int kStagedRows = kTransposed ? layout::kBlock : layout::kBandRows;
template <bool kTransposed>
constexpr int kWarpBytes = kStages * kStageBytes + kScratchBytes + kStagedRows<kTransposed> * kRowBytes;

struct Arguments {
  Source source;
  uint16_t* out;
  int m, k, k_blocks, row_blocks, share, extra;
  bool aligned;  // rows of the result start on 16 bytes
};

// Stores `kRows` staged rows of 64 elements: result rows from row0 on, columns from column0 on, of a [rows, columns] result.
template <int kRows>
__device__ __forceinline__ void store_rows(const Arguments& g, uint32_t staged, int row0, int column0, int rows, int columns, int lane) {
  const int piece = lane % 8, column = column0 + piece * 8;
#pragma unroll 4
  for (int i = 0; i < kRows / 4; ++i) {
    const int r = i * 4 + lane / 8, row = row0 + r;
    if (row >= rows || column >= columns) continue;
    const uint4 v = load_16(staged + r * kRowBytes + piece * 16);
    uint16_t* to = g.out + static_cast<int64_t>(row) * columns + column;
    if (g.aligned) {
      *reinterpret_cast<uint4*>(to) = v;  // columns are a multiple of 8
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      for (int e = 0; e < 8 && column + e < columns; ++e) to[e] = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
    }
  }
}

template <bool kTransposed>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decompress(const __grid_constant__ Arguments g) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int cta = blockIdx.x;
  const int first = cta * g.share + min(cta, g.extra), last = first + g.share + (cta < g.extra);
  const uint32_t own = shared_address(shared) + warp * kWarpBytes<kTransposed>, scratch = own + kStages * kStageBytes;
  const uint32_t staged = scratch + kScratchBytes;
  const uint32_t exponent = *g.source.start_exp * 0x00800080u;
  // Neighbours in the result are neighbours in this order.
  const auto block_at = [&](int i) { return kTransposed ? i % g.row_blocks * g.k_blocks + i / g.row_blocks : i; };
  const Ring ring(own, scratch, lane);
  const auto copy = [&](int turn) {
    const int i = first + warp + turn * warps;
    if (i < last) {
      const int block = block_at(i);
      ring.copy(g.source, turn, g.source.tile_offsets[block], g.source.tile_offsets[block + 1], lane);
    }
    copy_async_commit();
  };
  Bitmaps bits;
  if (first + warp < last) {
    bits.aim(g.source, block_at(first + warp), lane);
#pragma unroll
    for (int band = 0; band < kBands; ++band) bits.load_band(band);
  }
  for (int i = 0; i < kStages; ++i) copy(i);

  const Reader read(scratch, lane);
  const uint32_t spot = staged + lane / 4 * kRowBytes + lane % 4 * 4;
  for (int turn = 0, i = first + warp; i < last; ++turn, i += warps) {
    const int block = block_at(i), row0 = block / g.k_blocks * layout::kBlock, k0 = block % g.k_blocks * layout::kBlock;
    const uint32_t stage = ring.stage(turn);
    copy_async_wait<kStages - 1>();
    ring.wait(turn);
    __syncwarp();
    Ranks ranks;
    ranks.count(bits, lane);
    bits.aim(g.source, block_at(min(i + warps, last - 1)), lane);
    const uint16_t* fallbacks = nullptr;
    int64_t fallbacks_left = 0;
    if (layout::kBlockSize - ranks.inside > kFullStaged) {
      const int64_t start = g.source.tile_offsets[block].y;
      fallbacks = g.source.full + start, fallbacks_left = g.source.full_len - start;
    }
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      fill_plane(bits.b[band], ranks.before[band], band, exponent, stage, scratch, fallbacks, fallbacks_left, lane);
      bits.load_band(band);
      __syncwarp();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[4];
        read(tile, a);
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const int m8 = f & 1, k8 = tile * 2 + (f >> 1);
          if (kTransposed) {
            store_word(spot + k8 * 8 * kRowBytes + (band * 2 + m8) * 16, transpose_matrix(a[f]));
          } else {
            store_word(spot + m8 * 8 * kRowBytes + k8 * 16, a[f]);
          }
        }
      }
      __syncwarp();
      if (!kTransposed) {
        store_rows<layout::kBandRows>(g, staged, row0 + band * layout::kBandRows, k0, g.m, g.k, lane);
        __syncwarp();
      }
    }
    copy(turn + kStages);
    if (kTransposed) {
      store_rows<layout::kBlock>(g, staged, k0, row0, g.k, g.m, lane);
      __syncwarp();
    }
  }
  copy_async_wait<0>();
}

template <bool kTransposed>
cudaError_t launch(Arguments& g, cudaStream_t stream) {
  int device, multiprocessors, limit;
  const auto kernel = decompress<kTransposed>;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int warps = std::min(kMaxWarps, limit / kWarpBytes<kTransposed>), bytes = warps * kWarpBytes<kTransposed>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int64_t blocks = int64_t{g.row_blocks} * g.k_blocks;
  const int ctas = static_cast<int>(std::min<int64_t>(blocks, multiprocessors));
  g.share = static_cast<int>(blocks / ctas);
  g.extra = static_cast<int>(blocks % ctas);
  kernel<<<ctas, 32 * warps, bytes, stream>>>(g);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_decompress(const Payload& w, uint16_t* out, bool transposed, cudaStream_t stream) {
  if (w.m < 1 || w.k < 1 || w.m > INT32_MAX - 64 || w.k > INT32_MAX - 64 || layout::NumBlocks(w.m, w.k) > INT32_MAX / 32)
    return cudaErrorInvalidValue;
  Arguments g = {};
  g.source = MakeSource(w);
  g.out = out;
  g.m = static_cast<int>(w.m), g.k = static_cast<int>(w.k);
  g.k_blocks = static_cast<int>(layout::CeilDiv(w.k, layout::kBlock));
  g.row_blocks = static_cast<int>(layout::CeilDiv(w.m, layout::kBlock));
  g.aligned = (transposed ? g.m : g.k) % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  return transposed ? launch<true>(g, stream) : launch<false>(g, stream);
}

}  // namespace jaxzip::tca_tbe
