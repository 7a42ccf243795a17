// Rows of an encoded matrix (embedding lookup): a warp decodes the 64 weights that a row has in one block.
#include "take.h"

#include <algorithm>

#include "weights.cuh"

namespace jaxzip::lane_planar {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxGridRows = 65535;
constexpr uint16_t kNaN = 0x7FC0;

__global__ void __launch_bounds__(32 * kWarps) take(const __grid_constant__ Matrix w, const int32_t* ids, int count,
                                                    uint16_t* out) {
  __shared__ uint16_t decoded[kWarps][kBlock];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int kb = blockIdx.x * kWarps + warp, columns = min(kBlock, w.k - kb * kBlock);
  if (columns <= 0) return;
  for (int i = blockIdx.y; i < count; i += gridDim.y) {
    uint16_t* to = out + static_cast<size_t>(i) * w.k + static_cast<size_t>(kb) * kBlock;
    const int row = ids[i];
    if (row < 0 || row >= w.m) {
      for (int c = lane; c < columns; c += 32) to[c] = kNaN;
      continue;
    }
    const uint32_t index = static_cast<uint32_t>(row / kBlock) * w.k_blocks() + kb;
    const uint32_t* block = w.blocks + static_cast<size_t>(index) * w.block_words;
    const int tile = row % kBlock / kTileRows, g = row % 8, upper = row % kTileRows / 8;
    // This lane decodes columns 2 lane and 2 lane + 1: register r of k-step j of lane `owner`.
    const int j = lane >> 3, r = upper | (lane & 4) >> 1, owner = 4 * g + (lane & 3);
    uint32_t words[LanePlanar::kRegisters], registers[4], a[4] = {};
    LanePlanar::load(words, block, tile, owner);
    // All k-steps and the one that is wanted, so that words stay in registers.
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      LanePlanar::decode(registers, words, {kPlaneWord, kPlaneWord, kPlaneWord, kPlaneWord}, step);
      for (int i = 0; i < 4; ++i) a[i] = step == j ? registers[i] : a[i];
    }
    const uint32_t lower = upper ? a[1] : a[0], higher = upper ? a[3] : a[2], pair = r & 2 ? higher : lower;
    decoded[warp][2 * lane] = static_cast<uint16_t>(pair);
    decoded[warp][2 * lane + 1] = static_cast<uint16_t>(pair >> 16);
    __syncwarp();

    // Escapes of this row: their positions name it.
    const auto patch = [&](uint32_t position, uint32_t high) {
      const Place at = place_of(position);
      if (fragment_row(at.lane, at.r) != row % kTileRows) return;
      uint16_t& v = decoded[warp][fragment_column(at.j, at.lane, at.r, at.h)];
      v = static_cast<uint16_t>((v & ~kHighMask) | high << 10);
    };
    const uint32_t ends = block[kHeaderStart], overflow = block[kOverflowWord];
    const uint32_t room = 2 * (w.block_words - kEntryStart), first = (ends << 8) >> (8 * tile) & 255;
    const uint32_t last = min(ends >> (8 * tile) & 255, room);
    const uint16_t* entries = reinterpret_cast<const uint16_t*>(block + kEntryStart);
    for (uint32_t e = first + lane; e < last; e += 32) patch(entries[e] & (kTileElements - 1), entries[e] >> kEntryPositionBits);
    if (overflow)
      for (uint32_t e = overflow - 1 + lane; e < w.overflow_length && w.overflow[e].block == index + 1; e += 32)
        if (const uint32_t entry = w.overflow[e].entry; (entry >> 10 & 3) == tile) patch(entry, entry >> kPositionBits & 31);
    __syncwarp();

    const int shift = w.shift[row];
    for (int c = lane; c < columns; c += 32) {
      const uint32_t v = decoded[warp][c];
      to[c] = static_cast<uint16_t>((v & 0x807F) | (unshift_exponent(v >> 7 & 255, shift) & 255) << 7);
    }
    __syncwarp();
  }
}

}  // namespace

cudaError_t launch_take(const Matrix& w, const int32_t* ids, int count, uint16_t* out, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const dim3 grid((w.k_blocks() + kWarps - 1) / kWarps, std::min(count, kMaxGridRows));
  take<<<grid, 32 * kWarps, 0, stream>>>(w, ids, count, out);
  return cudaGetLastError();
}

}  // namespace jaxzip::lane_planar
