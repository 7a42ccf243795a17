// The lane-planar encoder: histograms of 64 rows a CTA choose their shifts; then a CTA a block counts its escapes, and writes it.
#include "encode.h"

#include <climits>

namespace jaxzip::lane_planar {
namespace {

// As in jaxzip/formats/lane_planar.py.
constexpr int kMaxShift = 40, kMinShifted = 64, kMaxShifted = 190;
constexpr int kWindow = 8, kWindowStart = 120;
constexpr uint16_t kPadding = kWindowStart << 7;

constexpr int kBins = 256;
constexpr int kHistogramPitch = kBins + 1;  // rows' equal bins lie in different banks
constexpr int kShiftThreads = 512;

__global__ void __launch_bounds__(kShiftThreads) choose_shifts(DenseBits w, int8_t* shift) {
  extern __shared__ uint32_t histogram[];  // [kBlock][kHistogramPitch], then a flag a row: it has a subnormal
  uint32_t* has_subnormal = histogram + kBlock * kHistogramPitch;
  const int first_row = blockIdx.x * kBlock, rows = min(kBlock, w.m - first_row);
  for (int i = threadIdx.x; i < kBlock * (kHistogramPitch + 1); i += kShiftThreads) histogram[i] = 0;
  __syncthreads();
  const auto add = [&](int row, uint32_t v) {
    atomicAdd(&histogram[row * kHistogramPitch + (v >> 7 & 255)], 1);
    if ((v & 0x7F80) == 0 && (v & 0x7F)) has_subnormal[row] = 1;
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (w.transposed) {
    const int row = threadIdx.x % kBlock;
    if (row < rows)
      for (int k = threadIdx.x / kBlock; k < w.k; k += kShiftThreads / kBlock)
        add(row, w.bits[static_cast<size_t>(k) * w.m + first_row + row]);
  } else {
    for (int row = warp; row < rows; row += kShiftThreads / 32)
      for (int k = lane; k < w.k; k += 32) add(row, w.bits[static_cast<size_t>(first_row + row) * w.k + k]);
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= kBlock) return;
  const uint32_t* counts = histogram + row * kHistogramPitch;
  int start = 1, low = 255, high = 0;
  uint32_t covered = 0, best = 0;
  for (int e = 1; e < 1 + kWindow; ++e) covered += counts[e];
  best = covered;
  for (int s = 2; s < kBins - kWindow; ++s) {  // ties go to the lowest window
    covered += counts[s + kWindow - 1] - counts[s - 1];
    if (covered > best) best = covered, start = s;
  }
  for (int e = 1; e < 255; ++e)
    if (counts[e]) low = min(low, e), high = e;
  const int by = kWindowStart - start;
  const bool safe = best > 0 && abs(by) <= kMaxShift && !has_subnormal[row] && low >= kMinShifted && high <= kMaxShifted;
  shift[first_row + row] = static_cast<int8_t>(safe ? by : 0);
}

constexpr int kThreads = 128, kPositionsPerThread = kBlock * kBlock / kThreads;
constexpr int kTilePitch = kBlock + 2;

// A block's weights in shared memory, with shifted exponents; padding where the matrix ends.
__device__ __forceinline__ void load_block(const DenseBits& w, const int8_t* shift, int rb, int kb, uint16_t (*block)[kTilePitch]) {
  for (int i = threadIdx.x; i < kBlock * kBlock; i += kThreads) {
    const int row = w.transposed ? i % kBlock : i / kBlock, column = w.transposed ? i / kBlock : i % kBlock;
    const int m = rb * kBlock + row, k = kb * kBlock + column;
    uint32_t v = kPadding;
    if (m < w.m && k < w.k) {
      v = w.bits[w.transposed ? static_cast<size_t>(k) * w.m + m : static_cast<size_t>(m) * w.k + k];
      const uint32_t e = v >> 7 & 255;
      if (e != 0 && e != 255) v = (v & 0x807F) | (e + shift[m] & 255) << 7;
    }
    block[row][column] = static_cast<uint16_t>(v);
  }
}
__device__ __forceinline__ uint32_t at_position(const uint16_t (*block)[kTilePitch], int position) {
  const Place at = place_of(position);
  return block[at.tile * kTileRows + fragment_row(at.lane, at.r)][fragment_column(at.j, at.lane, at.r, at.h)];
}
__device__ __forceinline__ uint32_t high_of(uint32_t v) { return v >> 10 & 31; }
constexpr uint32_t kUsualHigh = kConstantHigh >> 10;

// Escapes before each thread's positions; index kThreads has all of them.
struct Before {
  uint32_t of[kThreads + 1];
};
__device__ __forceinline__ void count_before(const uint16_t (*block)[kTilePitch], Before& before) {
  uint32_t own = 0;
  for (int i = 0; i < kPositionsPerThread; ++i)
    own += high_of(at_position(block, threadIdx.x * kPositionsPerThread + i)) != kUsualHigh;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t before_lane = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before_lane;
  }
  __shared__ uint32_t of_warp[kThreads / 32];
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += of_warp[i];
  before.of[threadIdx.x + 1] = sum;
  if (threadIdx.x == 0) before.of[0] = 0;
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) count_escapes(DenseBits w, const int8_t* shift, int k_blocks, uint32_t* counts) {
  __shared__ uint16_t block[kBlock][kTilePitch];
  __shared__ Before before;
  load_block(w, shift, blockIdx.x / k_blocks, blockIdx.x % k_blocks, block);
  __syncthreads();
  count_before(block, before);
  if (threadIdx.x == 0) counts[blockIdx.x] = before.of[kThreads];
}

__global__ void __launch_bounds__(kThreads) encode(DenseBits w, const int8_t* shift, const uint32_t* starts, int k_blocks, int block_words,
                                                   uint32_t* blocks, OverflowEntry* overflow, uint32_t overflow_length) {
  __shared__ uint16_t block[kBlock][kTilePitch];
  __shared__ Before before;
  __shared__ uint32_t tail[kMaxBlockWords - kHeaderStart];  // header and entries
  load_block(w, shift, blockIdx.x / k_blocks, blockIdx.x % k_blocks, block);
  for (int i = threadIdx.x; i < block_words - kHeaderStart; i += kThreads) tail[i] = 0;
  __syncthreads();
  count_before(block, before);

  const uint32_t room = 2 * (block_words - kEntryStart), start = starts[blockIdx.x];
  uint16_t* entries = reinterpret_cast<uint16_t*>(tail + (kEntryStart - kHeaderStart));
  uint32_t rank = before.of[threadIdx.x];
  for (int i = 0; i < kPositionsPerThread; ++i) {
    const uint32_t position = threadIdx.x * kPositionsPerThread + i, high = high_of(at_position(block, position));
    if (high == kUsualHigh) continue;
    if (rank < room) {
      entries[rank] = static_cast<uint16_t>((position & ((1u << kEntryPositionBits) - 1)) | high << kEntryPositionBits);
    } else {
      const uint32_t to = start + rank - room;
      if (to < overflow_length) overflow[to] = {blockIdx.x + 1, position | high << kPositionBits};
    }
    ++rank;
  }
  if (threadIdx.x == 0) {
    uint32_t ends = 0;
    for (int t = 0; t < kTiles; ++t) ends |= min(before.of[kThreads / kTiles * (t + 1)], room) << (8 * t);
    tail[0] = ends;
    tail[kOverflowWord - kHeaderStart] = before.of[kThreads] > room ? start + 1 : 0;
  }

  const int tile = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint32_t lower[8], codes[3] = {};
#pragma unroll
  for (int word = 0; word < 8; ++word) {
    uint32_t upper = lower[word] = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const uint32_t v = at_position(block, tile << 10 | (word >> 2) << 9 | lane << 4 | (word & 3) << 2 | b);
      lower[word] |= (v & 255) << (8 * b);
      upper |= (v >> 8) << (8 * b);
    }
    add_code(codes, word, upper);
  }
  uint32_t* out = blocks + static_cast<size_t>(blockIdx.x) * block_words;
  uint4* lower_words = reinterpret_cast<uint4*>(out + tile * kLowerWords) + lane;
  lower_words[0] = make_uint4(lower[0], lower[1], lower[2], lower[3]);
  lower_words[32] = make_uint4(lower[4], lower[5], lower[6], lower[7]);
  uint32_t* code_words = out + kCodeStart + tile * kCodeWords;
  reinterpret_cast<uint2*>(code_words)[lane] = make_uint2(codes[0], codes[1]);
  code_words[64 + lane] = codes[2];
  __syncthreads();
  for (int i = threadIdx.x; i < block_words - kHeaderStart; i += kThreads) out[kHeaderStart + i] = tail[i];
}

struct Grid {
  int k_blocks;
  long long blocks;
  explicit Grid(const DenseBits& w) : k_blocks((w.k + kBlock - 1) / kBlock), blocks((w.m + kBlock - 1LL) / kBlock * k_blocks) {}
};

}  // namespace

cudaError_t launch_choose_shifts(const DenseBits& w, int8_t* shift, cudaStream_t stream) {
  constexpr int kBytes = kBlock * (kHistogramPitch + 1) * 4;
  if (w.m < 1 || w.k < 1) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaFuncSetAttribute(choose_shifts, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)) return error;
  choose_shifts<<<(w.m + kBlock - 1) / kBlock, kShiftThreads, kBytes, stream>>>(w, shift);
  return cudaGetLastError();
}

cudaError_t launch_count_escapes(const DenseBits& w, const int8_t* shift, uint32_t* counts, cudaStream_t stream) {
  const Grid grid(w);
  if (w.m < 1 || w.k < 1 || grid.blocks > INT_MAX) return cudaErrorInvalidValue;
  count_escapes<<<static_cast<unsigned>(grid.blocks), kThreads, 0, stream>>>(w, shift, grid.k_blocks, counts);
  return cudaGetLastError();
}

cudaError_t launch_encode(const DenseBits& w, const int8_t* shift, const uint32_t* starts, int block_words, uint32_t* blocks,
                          OverflowEntry* overflow, uint32_t overflow_length, cudaStream_t stream) {
  const Grid grid(w);
  if (w.m < 1 || w.k < 1 || grid.blocks > INT_MAX || block_words < kBlockWidths[0] || block_words > kMaxBlockWords)
    return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaMemsetAsync(overflow, 0, overflow_length * sizeof(OverflowEntry), stream)) return error;
  encode<<<static_cast<unsigned>(grid.blocks), kThreads, 0, stream>>>(w, shift, starts, grid.k_blocks, block_words, blocks, overflow,
                                                                      overflow_length);
  return cudaGetLastError();
}

}  // namespace jaxzip::lane_planar
