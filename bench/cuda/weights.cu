// Synthetic weights and a lane-planar encoder on the device: one warp a row for shifts, one CTA a block for the rest.
#include "weights.h"

#include <algorithm>
#include <cmath>

using namespace jaxzip::lane_planar;

namespace {

constexpr double kOverflowShare = 1.0 / 128;
constexpr int kMaxShift = 40, kMinShifted = 64, kMaxShifted = 190;
constexpr uint16_t kPadding = 120 << 7;

__device__ uint32_t hash(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  x ^= x >> 33;
  return static_cast<uint32_t>(x);
}

__global__ void gaussian(uint16_t* w, size_t size, float sigma, float zeros, uint64_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < size; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const float u = (hash(3 * i + (seed << 40)) + 1.0f) * 0x1p-32f, v = hash(3 * i + 1 + (seed << 40)) * 0x1p-32f;
    float value = sigma * sqrtf(-2 * logf(fminf(u, 1.0f))) * cospif(2 * v);
    if (hash(3 * i + 2 + (seed << 40)) * 0x1p-32f < zeros) value = 0;
    const uint32_t bits = __float_as_uint(value);
    w[i] = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}

// A block draws its class, a weight its exponent from that class, a row its own scale.
__global__ void from_exponents(uint16_t* w, int m, int k, const uint32_t* cumulated, int classes, int values, int first, uint64_t seed) {
  const size_t size = static_cast<size_t>(m) * k;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < size; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const uint32_t row = i / k, column = i % k;
    const uint32_t block = hash((seed << 50) + (static_cast<uint64_t>(row / kBlock) << 24) + column / kBlock) % classes;
    const uint32_t u = hash(2 * i + (seed << 40)), rest = hash(2 * i + 1 + (seed << 40));
    const uint32_t* table = cumulated + block * values;
    int low = 0, high = values - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (u < table[middle]) high = middle; else low = middle + 1;
    }
    const uint32_t exponent = low ? first + low - 1 - hash(row + (seed << 33)) % 4 : 0;
    w[i] = static_cast<uint16_t>((rest >> 31 << 15) | (exponent << 7) | (low ? rest & 127 : 0));
  }
}

__global__ void fragment_order(const uint16_t* w, int m, int k, uint32_t* out) {
  const int k_blocks = (k + kBlock - 1) / kBlock, rb = blockIdx.x / k_blocks, kb = blockIdx.x % k_blocks;
  const int tile = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int p = 0; p < 16; ++p) {
    uint32_t pair = 0;
    for (int h = 0; h < 2; ++h) {
      const int row = rb * kBlock + tile * kTileRows + fragment_row(lane, p & 3), column = kb * kBlock + fragment_column(p >> 2, lane, p & 3, h);
      if (row < m && column < k) pair |= static_cast<uint32_t>(w[static_cast<size_t>(row) * k + column]) << (16 * h);
    }
    out[static_cast<size_t>(blockIdx.x) * 2048 + tile * 512 + (p >> 2) * 128 + lane * 4 + (p & 3)] = pair;
  }
}

// The shift of a row moves its best window of 8 exponents to 120..127; 0 for rows of extreme weights.
__global__ void choose_shifts(const uint16_t* w, int m, int k, int8_t* shifts) {
  __shared__ uint32_t histogram[256];
  __shared__ int has_subnormal;
  const int row = blockIdx.x;
  for (int i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
  if (threadIdx.x == 0) has_subnormal = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const uint32_t v = w[static_cast<size_t>(row) * k + i];
    atomicAdd(&histogram[(v >> 7) & 255], 1);
    if ((v & 0x7F80) == 0 && (v & 0x7F)) has_subnormal = 1;
  }
  __syncthreads();
  if (threadIdx.x) return;
  int start = 1, low = 255, high = 0;
  uint32_t best = 0;
  for (int s = 1; s <= 247; ++s) {
    uint32_t covered = 0;
    for (int i = 0; i < 8; ++i) covered += histogram[s + i];
    if (covered > best) best = covered, start = s;
  }
  for (int e = 1; e < 255; ++e)
    if (histogram[e]) low = min(low, e), high = max(high, e);
  const int shift = 120 - start;
  const bool safe = best > 0 && abs(shift) <= kMaxShift && !has_subnormal && low >= kMinShifted && high <= kMaxShifted;
  shifts[row] = static_cast<int8_t>(safe ? shift : 0);
}

struct Element {
  uint32_t value;  // with the shifted exponent
  uint32_t high;   // its five high exponent bits
};
__device__ Element element(const uint16_t* w, int m, int k, const int8_t* shifts, int rb, int kb, int position) {
  const int tile = position >> 10, j = position >> 8 & 3, lane = position >> 3 & 31, r = position >> 1 & 3, h = position & 1;
  const int row = rb * kBlock + tile * kTileRows + fragment_row(lane, r), column = kb * kBlock + fragment_column(j, lane, r, h);
  uint32_t v = kPadding;
  if (row < m && column < k) {
    v = w[static_cast<size_t>(row) * k + column];
    const uint32_t e = (v >> 7) & 255;
    if (e != 0 && e != 255) v = (v & 0x807F) | ((e + shifts[row]) << 7);
  }
  return {v, (v >> 10) & 31};
}
__device__ bool has_code(uint32_t high) { return high == 0 || (high > kHighCodeBias && high <= 15 + kHighCodeBias); }

// kWrite false: per block, the entries that could lie inside it and those that never can. Positions are visited in order,
// 32 a thread.
template <bool kWrite>
__global__ void encode_block(const uint16_t* w, int m, int k, const int8_t* shifts, uint2* counts, int block_words,
                             const uint32_t* overflow_starts, uint32_t* blocks, OverflowEntry* overflow) {
  __shared__ uint32_t coded[129], other[129];
  const int k_blocks = (k + kBlock - 1) / kBlock, rb = blockIdx.x / k_blocks, kb = blockIdx.x % k_blocks;
  uint32_t my_coded = 0, my_other = 0;
  for (int i = 0; i < 32; ++i) {
    const Element e = element(w, m, k, shifts, rb, kb, threadIdx.x * 32 + i);
    if (e.high != 15) (has_code(e.high) ? my_coded : my_other) += 1;
  }
  coded[threadIdx.x + 1] = my_coded;
  other[threadIdx.x + 1] = my_other;
  __syncthreads();
  if (threadIdx.x == 0) {
    coded[0] = other[0] = 0;
    for (int i = 0; i < 128; ++i) coded[i + 1] += coded[i], other[i + 1] += other[i];
  }
  __syncthreads();
  if (!kWrite) {
    if (threadIdx.x == 0) counts[blockIdx.x] = make_uint2(coded[128], other[128]);
    return;
  }
  uint32_t* block = blocks + static_cast<size_t>(blockIdx.x) * block_words;
  const uint32_t room = 2 * (block_words - kEntryStart), start = overflow_starts[blockIdx.x];
  uint32_t rank = coded[threadIdx.x], spilled = other[threadIdx.x] + (rank > room ? rank - room : 0);
  for (int i = 0; i < 32; ++i) {
    const uint32_t position = threadIdx.x * 32 + i;
    const Element e = element(w, m, k, shifts, rb, kb, position);
    if (e.high == 15) continue;
    if (has_code(e.high) && rank++ < room) {
      const uint32_t code = e.high ? e.high - kHighCodeBias : 0;
      reinterpret_cast<uint16_t*>(block + kEntryStart)[rank - 1] = static_cast<uint16_t>(position | code << kPositionBits);
    } else {
      overflow[start + spilled++] = {blockIdx.x + 1, position | e.high << kPositionBits};
    }
  }
  if (threadIdx.x == 0) {
    uint32_t ends = 0;
    for (int t = 0; t < kTiles; ++t) ends |= min(coded[32 * (t + 1)], room) << (8 * t);
    block[kHeaderStart] = ends;
    block[kOverflowWord] = overflow_starts[blockIdx.x + 1] > start ? start + 1 : 0;
  }
  const int tile = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint32_t sign_mantissa[8] = {}, codes[3] = {};
  for (int p = 0; p < 16; ++p)
    for (int h = 0; h < 2; ++h) {
      const uint32_t v = element(w, m, k, shifts, rb, kb, tile << 10 | (p >> 2) << 8 | lane << 3 | (p & 3) << 1 | h).value;
      const uint32_t sign = v >> 15, mantissa = v & 127, low = v >> 7 & 7;
      sign_mantissa[p / 2] |= (p & 1 ? mantissa << 8 | sign << 7 : sign << 15 | mantissa) << (16 * h);
      constexpr int kFieldBit[] = {7, 4, 1, 10, 13};
      if (p < 15)
        codes[p / 5] |= low << (kFieldBit[p % 5] + 16 * h);
      else
        for (int b = 0; b < 3; ++b) codes[b] |= (low >> b & 1) << (16 * h);
    }
  for (int i = 0; i < 8; ++i) block[tile * kSignMantissaWords + (i >> 2) * 128 + lane * 4 + (i & 3)] = sign_mantissa[i];
  uint32_t* code_words = block + kCodeStart + tile * kCodeWords;
  code_words[2 * lane] = codes[0];
  code_words[2 * lane + 1] = codes[1];
  code_words[64 + lane] = codes[2];
}

}  // namespace

void fill_gaussian(uint16_t* w, size_t size, float sigma, float zeros, uint32_t seed) {
  gaussian<<<1056, 256>>>(w, size, sigma, zeros, seed);
  CHECK(cudaGetLastError());
}

void fill_from_exponents(uint16_t* w, int m, int k, const ExponentClasses& c, uint32_t seed) {
  std::vector<uint32_t> cumulated;
  for (const auto& counts : c.counts) {
    double total = 0, sum = 0;
    for (double n : counts) total += n;
    for (double n : counts) cumulated.push_back(static_cast<uint32_t>(std::min(4294967295.0, (sum += n) / total * 4294967296.0)));
    cumulated.back() = ~0u;
  }
  DeviceArray<uint32_t> device(cumulated.size());
  CHECK(cudaMemcpy(device.get(), cumulated.data(), cumulated.size() * 4, cudaMemcpyHostToDevice));
  from_exponents<<<1056, 256>>>(w, m, k, device.get(), static_cast<int>(c.counts.size()), static_cast<int>(c.counts[0].size()), c.first, seed);
  CHECK(cudaDeviceSynchronize());
}

void to_fragment_order(const uint16_t* w, int m, int k, uint32_t* out) {
  fragment_order<<<((m + 63) / 64) * ((k + 63) / 64), 128>>>(w, m, k, out);
  CHECK(cudaGetLastError());
}

Encoded encode_lane_planar(const uint16_t* w, int m, int k, size_t bytes_of_copies) {
  Encoded e = {};
  e.matrix.m = m;
  e.matrix.k = k;
  const size_t count = static_cast<size_t>(e.matrix.m_blocks()) * e.matrix.k_blocks();
  e.shift = std::make_unique<DeviceArray<int8_t>>(e.matrix.m_blocks() * kBlock);
  CHECK(cudaMemset(e.shift->get(), 0, e.shift->size()));
  choose_shifts<<<m, 128>>>(w, m, k, e.shift->get());
  CHECK(cudaGetLastError());
  DeviceArray<uint2> device_counts(count);
  encode_block<false><<<count, 128>>>(w, m, k, e.shift->get(), device_counts.get(), 0, nullptr, nullptr, nullptr);
  CHECK(cudaGetLastError());
  std::vector<uint2> counts(count);
  CHECK(cudaMemcpy(counts.data(), device_counts.get(), count * sizeof(uint2), cudaMemcpyDeviceToHost));

  int words = kMaxBlockWords;
  size_t over = 0;
  for (int candidate : kBlockWidths) {
    over = std::count_if(counts.begin(), counts.end(), [&](uint2 c) { return c.x > 2u * (candidate - kEntryStart); });
    words = candidate;
    if (over <= count * kOverflowShare) break;
  }
  std::vector<uint32_t> starts(count + 1, 0);
  const uint32_t room = 2 * (words - kEntryStart);
  double escapes = 0;
  size_t overflowing = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t spilled = counts[i].y + (counts[i].x > room ? counts[i].x - room : 0);
    starts[i + 1] = starts[i] + spilled;
    overflowing += spilled > 0;
    escapes += counts[i].x + counts[i].y;
  }
  DeviceArray<uint32_t> device_starts(count + 1);
  CHECK(cudaMemcpy(device_starts.get(), starts.data(), (count + 1) * 4, cudaMemcpyHostToDevice));
  e.block_words_total = count * words;
  e.copies = static_cast<int>(bytes_of_copies / (e.block_words_total * 4)) + 1;
  e.overflow_stride = (starts[count] + 15) / 16 * 16;
  e.blocks = std::make_unique<DeviceArray<uint32_t>>(e.block_words_total * e.copies);
  e.overflow = std::make_unique<DeviceArray<OverflowEntry>>(e.overflow_stride * e.copies);
  CHECK(cudaMemset(e.blocks->get(), 0, e.block_words_total * 4));
  encode_block<true><<<count, 128>>>(w, m, k, e.shift->get(), nullptr, words, device_starts.get(), e.blocks->get(), e.overflow->get());
  CHECK(cudaGetLastError());
  for (int i = 1; i < e.copies; ++i) {
    CHECK(cudaMemcpy(e.overflow->get() + i * e.overflow_stride, e.overflow->get(), e.overflow_stride * sizeof(OverflowEntry), cudaMemcpyDeviceToDevice));
    CHECK(cudaMemcpy(e.blocks->get() + i * e.block_words_total, e.blocks->get(), e.block_words_total * 4, cudaMemcpyDeviceToDevice));
  }
  e.matrix.blocks = e.blocks->get();
  e.matrix.overflow = e.overflow->get();
  e.matrix.overflow_length = starts[count];
  e.matrix.shift = e.shift->get();
  e.matrix.block_words = words;
  const double size = static_cast<double>(m) * k;
  e.bits_per_weight = 8 * (e.block_words_total * 4.0 + starts[count] * 8.0 + e.shift->size()) / size;
  e.escape_share = escapes / size;
  e.overflowing_blocks = static_cast<double>(overflowing) / count;
  return e;
}
