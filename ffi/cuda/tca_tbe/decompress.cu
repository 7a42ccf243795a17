// Decompression: the warps take blocks in turns, decode them like the product does, and arrange what they
// decoded in shared memory, a band (or, transposed, two) at a time, so that rows of the result leave in runs of 128 (64) bytes.
#include "decompress.h"

#include <algorithm>

#include "decode.cuh"

namespace jaxzip::tca_tbe {
namespace {

constexpr int kMaxWarps = 12;  // more are slower: 16, 19 by 1-4%
constexpr int kManyRounds = 6;

// What is staged: `rows` rows of `pieces` 16-byte pieces, padded so that they are free of bank conflicts.
template <bool kTransposed>
struct Staged {
  static constexpr int bands = kTransposed ? 2 : 1;
  static constexpr int rows = kTransposed ? layout::kBlock : layout::kBandRows;
  static constexpr int pieces = kTransposed ? 2 * 2 : 8;
  static constexpr int pitch = pieces * 16 + 16;
  // A band takes the place of the plane that it was read from.
  static constexpr int warp_bytes = kStages * kStageBytes + kScratchBytes + (kTransposed ? rows * pitch : 0);
  static_assert(kTransposed || rows * pitch <= kPlaneBytes + kRankBytes, "a band fits into the plane's place");
};

struct Arguments {
  Source source;
  uint16_t* out;
  int m, k, k_blocks, row_blocks, share, extra;
  bool aligned;  // rows of the result start on 16 bytes
};

// Stores the staged rows: result rows from row0 on, columns from column0 on, of a [rows, columns] result.
template <class S>
__device__ __forceinline__ void store_rows(const Arguments& g, uint32_t staged, int row0, int column0, int rows, int columns, int lane) {
  constexpr int kAtOnce = 32 / S::pieces;
  const int piece = lane % S::pieces, column = column0 + piece * 8;
#pragma unroll
  for (int i = 0; i < S::rows / kAtOnce; ++i) {
    const int r = i * kAtOnce + lane / S::pieces, row = row0 + r;
    if (row >= rows || column >= columns) continue;
    const uint4 v = load_16(staged + r * S::pitch + piece * 16);
    uint16_t* to = g.out + static_cast<int64_t>(row) * columns + column;
    if (g.aligned) {
      *reinterpret_cast<uint4*>(to) = v;  // columns are a multiple of 8
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (column + e < columns) to[e] = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
    }
  }
}

template <bool kTransposed>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decompress(const __grid_constant__ Arguments g) {
  using S = Staged<kTransposed>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int cta = blockIdx.x;
  // All CTAs side by side, so that what is written at a time lies together in memory; where that makes few rounds, which an
  // uneven last one would show in, a range a CTA.
  const bool together = g.share >= kManyRounds * warps;
  const int first = cta * g.share + min(cta, g.extra);
  const int last = together ? g.k_blocks * g.row_blocks : first + g.share + (cta < g.extra);
  const int mine = (together ? cta * warps : first) + warp, step = together ? static_cast<int>(gridDim.x) * warps : warps;
  const uint32_t own = shared_address(shared) + warp * S::warp_bytes, scratch = own + kStages * kStageBytes;
  const uint32_t staged = kTransposed ? scratch + kScratchBytes : scratch;
  const uint32_t exponent = *g.source.start_exp * 0x00800080u;
  // Neighbours in the result are neighbours in this order.
  const auto block_at = [&](int i) { return kTransposed ? i % g.row_blocks * g.k_blocks + i / g.row_blocks : i; };
  const Ring ring(own, scratch, lane);
  uint2 from = {}, to = {};  // of the next block to copy, loaded a turn ahead
  const auto load_offsets = [&](int turn) {
    const int i = mine + turn * step;
    if (i >= last) return;
    const int block = block_at(i);
    from = g.source.tile_offsets[block], to = g.source.tile_offsets[block + 1];
  };
  const auto copy = [&](int turn) {
    if (mine + turn * step < last) ring.copy(g.source, turn, from, to, lane);
    copy_async_commit();
    load_offsets(turn + 1);
  };
  Bitmaps bits;
  if (mine < last) {
    bits.aim(g.source, block_at(mine), lane);
#pragma unroll
    for (int band = 0; band < kBands; ++band) bits.load_band(band);
  }
  load_offsets(0);
  for (int i = 0; i < kStages; ++i) copy(i);

  const Reader read(scratch, lane);
  const uint32_t spot = staged + lane / 4 * S::pitch + lane % 4 * 4;
  for (int turn = 0, i = mine; i < last; ++turn, i += step) {
    const int block = block_at(i), row0 = block / g.k_blocks * layout::kBlock, k0 = block % g.k_blocks * layout::kBlock;
    const uint32_t stage = ring.stage(turn);
    copy_async_wait<kStages - 1>();
    ring.wait(turn);
    __syncwarp();
    Ranks ranks;
    ranks.count(bits, lane);
    bits.aim(g.source, block_at(min(i + step, last - 1)), lane);
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
      uint32_t a[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) read(tile, a[tile]);
      if (!kTransposed) __syncwarp();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const int m8 = f & 1, k8 = tile * 2 + (f >> 1);
          if (kTransposed) {
            store_word(spot + k8 * 8 * S::pitch + (band % S::bands * 2 + m8) * 16, transpose_matrix(a[tile][f]));
          } else {
            store_word(spot + m8 * 8 * S::pitch + k8 * 16, a[tile][f]);
          }
        }
      __syncwarp();
      if (band == kBands - 1) copy(turn + kStages);
      if (band % S::bands == S::bands - 1) {
        const int m0 = row0 + (band + 1 - S::bands) * layout::kBandRows;
        if (kTransposed) {
          store_rows<S>(g, staged, k0, m0, g.k, g.m, lane);
        } else {
          store_rows<S>(g, staged, m0, k0, g.m, g.k, lane);
        }
        __syncwarp();
      }
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
  const int warps = std::min(kMaxWarps, limit / Staged<kTransposed>::warp_bytes), bytes = warps * Staged<kTransposed>::warp_bytes;
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
