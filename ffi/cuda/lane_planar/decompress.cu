// Lane-planar decompression: a warp decodes a 16x64 tile and lays it into shared memory in output order by stmatrix, puts
// the escapes into their bytes there, and the CTA stores rows of 256 bytes, each weight's shift taken back on the way.
#include "decompress.h"

#include "weights.cuh"

namespace jaxzip::lane_planar {
namespace {

constexpr int kWide = 2;  // blocks of a CTA, side by side in an output row; 1 makes shorter rows, 4 too few CTAs an SM
constexpr int kThreads = kWide * kTiles * 32;
constexpr int kMinCtas = 5;                    // of an SM: 48 registers a thread
constexpr int kPitch = kWide * kBlock * 2 + 16;  // bytes; eight rows start in eight different bank groups
constexpr int kChunks = kWide * kBlock / 8;    // of 16 bytes in a row
constexpr int kRowsAtOnce = kThreads / kChunks, kRounds = kBlock / kRowsAtOnce;

// 2^-shift as bf16. Multiplying by it takes a shift back exactly, zeros and subnormals included (rows of subnormals have
// shift 0), but may change a NaN's payload: only blocks without exponents of 255 use it.
__device__ __forceinline__ uint32_t inverse_scale(int shift) { return static_cast<uint32_t>(127 - shift) << 7; }

// Puts the five high exponent bits of an escape in place; `tile_base` is the shared address of the tile's first weight.
template <bool kTransposed>
__device__ __forceinline__ void patch(uint32_t tile_base, uint32_t position, uint32_t high) {
  const Place from = place_of(position);
  const int row = fragment_row(from.lane, from.r), column = fragment_column(from.j, from.lane, from.r, from.h);
  const uint32_t at = tile_base + (kTransposed ? column * kPitch + 2 * row : row * kPitch + 2 * column) + 1;
  ptx::store_shared_u8(at, (ptx::load_shared_u8(at) & 0x83u) | (high >> 8));
}

template <bool kTransposed>
__global__ void __launch_bounds__(kThreads, kMinCtas) decompress(const __grid_constant__ Matrix w, uint16_t* out) {
  __shared__ __align__(128) uint8_t memory[kBlock * kPitch];
  const uint32_t shared = ptx::shared_address(memory);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, side = warp / kTiles, tile = warp % kTiles;
  const int m_blocks = w.m_blocks(), k_blocks = w.k_blocks();
  // Neighbouring CTAs continue the same output rows.
  const int strips = ((kTransposed ? m_blocks : k_blocks) + kWide - 1) / kWide;
  const int line = blockIdx.x / strips, first = (blockIdx.x - line * strips) * kWide;
  const int row_block = kTransposed ? first + side : line, k_block = kTransposed ? line : first + side;
  const bool exists = row_block < m_blocks && k_block < k_blocks;

  uint32_t registers[LanePlanar::kRegisters], words[2] = {};
  const uint32_t index = static_cast<uint32_t>(row_block) * k_blocks + k_block;
  if (exists) {
    const uint32_t* block = w.blocks + static_cast<size_t>(index) * w.block_words;
    if (2 * lane < w.block_words - kHeaderStart) ptx::load_stream<2>(words, block + kHeaderStart + 2 * lane);
    LanePlanar::load(registers, block, tile, lane);
  }
  // A thread stores the same 16-byte chunk of kRounds rows: eight weights of one row of W, or of eight rows.
  const int chunk_column = threadIdx.x % kChunks * 8, chunk_row = threadIdx.x / kChunks;
  uint32_t shifts[kTransposed ? 2 : kRounds];
  if (kTransposed) {
    const int at = min(first * kBlock + chunk_column, m_blocks * kBlock - 8);
    const uint2 eight = *reinterpret_cast<const uint2*>(w.shift + at);
    shifts[0] = eight.x, shifts[1] = eight.y;
  } else {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) shifts[i] = w.shift[line * kBlock + chunk_row + i * kRowsAtOnce];
  }

  bool has_largest = false;  // this lane put high exponent bits that exponents of 255 have
  if (exists) {
    const uint32_t tile_base = shared + side * kBlock * 2 + tile * kTileRows * (kTransposed ? 2 : kPitch);
    // The row of 8 weights that this lane gives to stmatrix: row lane % 8 of register lane / 8's 8x8 matrix.
    const int r = lane >> 3, row = lane & 7;
    const uint32_t at = tile_base + (kTransposed ? (row + 8 * (r >> 1)) * kPitch + 16 * (r & 1)
                                                 : (row + 8 * (r & 1)) * kPitch + 16 * (r >> 1));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[4];
      LanePlanar::decode(a, registers, {kPlaneWord, kPlaneWord, kPlaneWord, kPlaneWord}, j);
      ptx::store_matrices<kTransposed>(at + j * (kTransposed ? 16 * kPitch : 32), a);
    }
    const uint32_t ends = __shfl_sync(~0u, words[0], 0);
    const uint32_t overflow = __shfl_sync(~0u, words[1], 0);
    const int end = (ends >> (8 * tile)) & 0xFFu, start = tile ? (ends >> (8 * tile - 8)) & 0xFFu : 0;
    __syncwarp();
    for (int i = start; i < end; i += 32) {  // entry e is a half of lane 1 + e / 4's words
      const int e = i + lane, from = (1 + (e >> 2)) & 31;
      const uint32_t x = __shfl_sync(~0u, words[0], from), y = __shfl_sync(~0u, words[1], from);
      const uint32_t entry = ((e & 2 ? y : x) >> (16 * (e & 1))) & 0xFFFFu;
      if (e >= end) continue;
      const uint32_t high = entry >> kEntryPositionBits << 10;
      patch<kTransposed>(tile_base, entry, high);
      has_largest |= high == kHighMask;
    }
    if (overflow)
      for_each_overflow(w.overflow, w.overflow_length, overflow - 1, index, [&](uint32_t position, uint32_t high) {
        if (position / kTileElements == tile) patch<kTransposed>(tile_base, position, high);
        has_largest |= high == kHighMask;
      });
  }
  const bool any_largest = __syncthreads_or(has_largest);

  const int rows = kTransposed ? w.k : w.m, columns = kTransposed ? w.m : w.k;
  if (!any_largest && columns % 8 == 0) {
    const int column = first * kBlock + chunk_column, row = line * kBlock + chunk_row;
    if (column >= columns) return;
    const uint8_t* chunk = memory + chunk_row * kPitch + chunk_column * 2;
    uint16_t* to = out + static_cast<size_t>(row) * columns + column;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (row + i * kRowsAtOnce >= rows) return;
      const uint4 eight = *reinterpret_cast<const uint4*>(chunk + i * (kRowsAtOnce * kPitch));
      uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const auto shift_of = [&](int c) { return kTransposed ? static_cast<int8_t>(shifts[c >> 2] >> (8 * (c & 3))) : static_cast<int>(shifts[i]); };
        pairs[c] = ptx::multiply_bf16x2(pairs[c], inverse_scale(shift_of(2 * c)) | inverse_scale(shift_of(2 * c + 1)) << 16);
      }
      // Streaming: the output is larger than the L2 and would push out what is still to be read.
      __stcs(reinterpret_cast<uint4*>(to + static_cast<size_t>(i * kRowsAtOnce) * columns), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
    return;
  }
  // Rare, and so few instructions: those that are not run are fetched, too. One element a thread, next to each other, since these rows start anywhere.
  constexpr int kWidth = kWide * kBlock;
  const int in_row = threadIdx.x % kWidth, column = first * kBlock + in_row;
  if (column >= columns) return;
#pragma unroll 1
  for (int r = threadIdx.x / kWidth; r < kBlock && line * kBlock + r < rows; r += kThreads / kWidth) {
    const int row = line * kBlock + r;
    const uint32_t weight = *reinterpret_cast<const uint16_t*>(memory + r * kPitch + in_row * 2);
    const int shift = w.shift[kTransposed ? column : row];
    out[static_cast<size_t>(row) * columns + column] = static_cast<uint16_t>((weight & 0x807Fu) | unshift_exponent((weight >> 7) & 0xFFu, shift) << 7);
  }
}

}  // namespace

cudaError_t launch_decompress(const Matrix& w, uint16_t* out, bool transposed, cudaStream_t stream) {
  const long long lines = transposed ? w.k_blocks() : w.m_blocks(), across = transposed ? w.m_blocks() : w.k_blocks();
  const long long ctas = (across + kWide - 1) / kWide * lines;
  if (ctas < 1 || ctas > 0x7FFFFFFFll) return cudaErrorInvalidValue;
  const auto kernel = transposed ? decompress<true> : decompress<false>;
  kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(w, out);
  return cudaGetLastError();
}

}  // namespace jaxzip::lane_planar
