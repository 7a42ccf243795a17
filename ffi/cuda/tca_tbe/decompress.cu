// Decompression: the warps take blocks in turns and decode them like the product does. Rows of the result leave in runs of 128
// bytes from the plane itself or, transposed, of 64 bytes from two bands arranged in shared memory.
#include "decompress.h"

#include <algorithm>

#include "decode.cuh"

namespace jaxzip::tca_tbe {
namespace {

// Of a CTA. With 6 or 8 warps large matrices take 3 to 5% longer, with 9 to 14 6 to 10%; small ones are short of blocks in flight.
constexpr int kWarps = 7, kMaxWarps = 12, kFewBlocks = 32;
constexpr int kManyRounds = 6;

// Transposed: what is arranged, 64 rows of 4 16-byte pieces. Where a piece lies in its row depends on the row, so that 8 rows of a piece are
// as free of bank conflicts as 2 rows are.
constexpr int kBandsArranged = 2, kPieces = 2 * kBandsArranged, kPitch = kPieces * 16;
__device__ __forceinline__ uint32_t place(uint32_t arranged, int row, int piece) { return arranged + row * kPitch + (piece ^ row / 2 % kPieces) * 16; }
constexpr int kArrangedBytes = layout::kBlock * kPitch;
template <bool kTransposed>
constexpr int kWarpBytes = whole_lines(kStages * kStageBytes + kScratchBytes + (kTransposed ? kArrangedBytes : 0));

struct Arguments {
  Source source;
  uint16_t* out;
  int m, k, k_blocks, row_blocks, share, extra;
};

// Stores 8 elements of a [rows, columns] result from shared memory, those inside it. `kAligned`: its rows start on 16 bytes. Not a branch, since
// the other one's code in the loop would be fetched, too.
template <bool kAligned>
__device__ __forceinline__ void store_piece(const Arguments& g, uint32_t from, int row, int column, int rows, int columns) {
  if (row >= rows || column >= columns) return;
  const uint4 v = load_16(from);
  uint16_t* to = g.out + static_cast<int64_t>(row) * columns + column;
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(to) = v;  // columns are a multiple of 8
  } else {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column + e < columns) to[e] = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
  }
}

// The plane, whose first row and column in the result are row0 and column0.
template <bool kAligned>
__device__ __forceinline__ void store_band(const Arguments& g, uint32_t plane, int row0, int column0, int lane) {
  // 8 lanes next to each other take two rows: no bank conflicts.
  const int piece = lane & 3 | lane >> 1 & 4, row = lane >> 2 & 1 | lane >> 3 & 2;
#pragma unroll
  for (int i = 0; i < layout::kBandRows / 4; ++i) {
    const int r = i * 4 + row;
    store_piece<kAligned>(g, plane + (piece * 2 + i / 2) * kFragBytes + r % 8 * kRowBytes, row0 + r, column0 + piece * 8, g.m, g.k);
  }
}

// A band of the plane, transposed, to its columns of what is arranged.
__device__ __forceinline__ void transpose_band(uint32_t plane, uint32_t arranged, int band, int lane) {
  const uint32_t from = plane + lane / 8 * kFragBytes + lane % 8 * kRowBytes;
  const int piece = band % kBandsArranged * 2;
#pragma unroll
  for (int tile = 0; tile < layout::kFragsPerBand / 4; ++tile) {
    uint32_t v[4];  // of FragTiles below each other, then of those to their right
    load_matrices_transposed(v, from + tile * 4 * kFragBytes);
#if __CUDA_ARCH__ >= 900
    store_matrices<false>(place(arranged, tile * 16 + lane / 16 * 8 + lane % 8, piece + lane / 8 % 2), v);
#else
#pragma unroll
    for (int f = 0; f < 4; ++f) store_word(place(arranged, tile * 16 + f / 2 * 8 + lane / 4, piece + f % 2) + lane % 4 * 4, v[f]);
#endif
  }
}

template <bool kAligned>
__device__ __forceinline__ void store_arranged(const Arguments& g, uint32_t arranged, int row0, int column0, int lane) {
#pragma unroll
  for (int i = 0; i < layout::kBlock / 8; ++i) {
    const int r = i * 8 + lane / kPieces, piece = lane % kPieces;
    store_piece<kAligned>(g, place(arranged, r, piece), row0 + r, column0 + piece * 8, g.k, g.m);
  }
}

template <bool kTransposed, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decompress(const __grid_constant__ Arguments g) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = warp_index(), warps = blockDim.x / 32;
  const int cta = blockIdx.x;
  // All CTAs side by side, so that what is written at a time lies together in memory; where that makes few rounds, which an
  // uneven last one would show in, a range a CTA.
  const bool together = g.share >= kManyRounds * warps;
  const int first = cta * g.share + min(cta, g.extra);
  const int last = together ? g.k_blocks * g.row_blocks : first + g.share + (cta < g.extra);
  const int mine = (together ? cta * warps : first) + warp, step = together ? static_cast<int>(gridDim.x) * warps : warps;
  const uint32_t own = shared_address(shared) + warp * kWarpBytes<kTransposed>, arranged = own + kStages * kStageBytes;
  const uint32_t scratch = arranged + (kTransposed ? kArrangedBytes : 0), plane = scratch + 3 * kBitmapBytes, start_exp = *g.source.start_exp;
  // Neighbours in the result are neighbours in this order.
  const auto block_at = [&](int i) { return kTransposed ? i % g.row_blocks * g.k_blocks + i / g.row_blocks : i; };
  const Ring ring(own, scratch, lane);
  Runs runs = {}, next_runs = {};  // of the next block to copy, loaded a turn ahead; of the last whose copies were started
  const auto load_runs = [&](int turn) {
    const int i = mine + turn * step;
    if (i < last) runs.load(g.source, block_at(i), block_at(i) + 1);
  };
  const auto copy = [&](int turn) {
    const int i = mine + turn * step;
    if (i < last) ring.copy(g.source, turn, block_at(i), runs, lane);
    next_runs = runs;
    load_runs(turn + 1);
  };
  load_runs(0);
  copy(0);

  Decoder decoder(start_exp, plane, lane);
  for (int turn = 0, i = mine; i < last; ++turn, i += step) {
    const int block = block_at(i), row0 = block / g.k_blocks * layout::kBlock, k0 = block % g.k_blocks * layout::kBlock;
    ring.wait(turn);
    Bitmaps bits;
    bits.load(ring.bitmaps, lane);
    __syncwarp();
    const Runs its_runs = next_runs;
    copy(turn + 1);
    Ranks ranks;
    ranks.count(bits);
    decoder.begin_block(g.source, block, ring.stage(turn), its_runs, ranks, lane);
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      decoder.band(bits.b[band], ranks.before[band], band, lane, [] {});
      __syncwarp();
      if (!kTransposed) {
        store_band<kAligned>(g, plane, row0 + band * layout::kBandRows, k0, lane);
      } else {
        transpose_band(plane, arranged, band, lane);
        if (band % kBandsArranged == kBandsArranged - 1) {
          __syncwarp();
          store_arranged<kAligned>(g, arranged, k0, row0 + (band + 1 - kBandsArranged) * layout::kBandRows, lane);
        }
      }
      __syncwarp();
    }
  }
}

template <bool kTransposed>
cudaError_t launch(Arguments& g, bool aligned, cudaStream_t stream) {
  int device, multiprocessors, limit;
  const auto kernel = aligned ? decompress<kTransposed, true> : decompress<kTransposed, false>;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int64_t blocks = int64_t{g.row_blocks} * g.k_blocks;
  const int ctas = static_cast<int>(std::min<int64_t>(blocks, multiprocessors));
  g.share = static_cast<int>(blocks / ctas);
  g.extra = static_cast<int>(blocks % ctas);
  const int warps = std::min(g.share < kFewBlocks ? kMaxWarps : kWarps, limit / kWarpBytes<kTransposed>), bytes = warps * kWarpBytes<kTransposed>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
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
  const bool aligned = (transposed ? g.m : g.k) % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  return transposed ? launch<true>(g, aligned, stream) : launch<false>(g, aligned, stream);
}

}  // namespace jaxzip::tca_tbe
