// Rows of an encoded matrix (embedding lookup): a warp decodes the 64 weights that a row has in one block.
#include "take.h"

#include <algorithm>

#include "weights.cuh"

namespace jaxzip::lane_planar {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxGridRows = 65535;
constexpr uint16_t kNaN = 0x7FC0;

// Three bits of register p's half h out of the lane's three code words.
__device__ uint32_t code_of(const uint32_t (&c)[3], int p, int h) {
  constexpr uint32_t kPlaces = 7 | 4 << 4 | 1 << 8 | 10 << 12 | 13 << 16;
  uint32_t words[3];
  for (int i = 0; i < 3; ++i) words[i] = c[i] >> (16 * h);
  if (p < 15) return words[p / 5] >> (kPlaces >> (4 * (p % 5)) & 15) & 7;
  return (words[0] & 1) | (words[1] & 1) << 1 | (words[2] & 1) << 2;
}

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
    const int j = lane >> 3, r = upper | (lane & 4) >> 1, owner = 4 * g + (lane & 3), p = 4 * j + r;
    const int word = 2 * j + (r >> 1);
    const uint32_t packed = block[tile * kSignMantissaWords + (word >> 2) * 128 + owner * 4 + (word & 3)];
    const uint32_t* c = block + kCodeStart + tile * kCodeWords;
    const uint32_t codes[3] = {c[2 * owner], c[2 * owner + 1], c[64 + owner]};
    const uint32_t pair = r & 1 ? __byte_perm(packed, 0, 0x2301) : packed;
    for (int h = 0; h < 2; ++h)
      decoded[warp][2 * lane + h] = static_cast<uint16_t>((pair >> (16 * h) & 0x807F) | kConstantHigh | code_of(codes, p, h) << 7);
    __syncwarp();

    // Escapes of this row: their positions name it.
    const auto patch = [&](uint32_t position, uint32_t high) {
      const int of_lane = position >> 3 & 31, of_register = position >> 1 & 3;
      if (static_cast<int>(position >> 10) != tile || fragment_row(of_lane, of_register) != row % kTileRows) return;
      uint16_t& v = decoded[warp][fragment_column(position >> 8 & 3, of_lane, of_register, position & 1)];
      v = static_cast<uint16_t>((v & ~kHighMask) | high);
    };
    const uint32_t ends = block[kHeaderStart], overflow = block[kOverflowWord];
    const uint32_t room = 2 * (w.block_words - kEntryStart), first = (ends << 8) >> (8 * tile) & 255;
    const uint32_t last = min(ends >> (8 * tile) & 255, room);
    const uint16_t* entries = reinterpret_cast<const uint16_t*>(block + kEntryStart);
    for (uint32_t e = first + lane; e < last; e += 32) patch(entries[e] & 0xFFFu, high_of_code(entries[e] >> 12));
    if (overflow)
      for (uint32_t e = overflow - 1 + lane; e < w.overflow_length && w.overflow[e].block == index + 1; e += 32)
        patch(w.overflow[e].entry & 0xFFFu, w.overflow[e].entry >> 12 << 10 & kHighMask);
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
