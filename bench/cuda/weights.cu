// Synthetic weights on the device, and their encoding by the library's kernels.
#include "weights.h"

#include <algorithm>
#include <cmath>

#include "encode.h"

using namespace jaxzip::lane_planar;

namespace {

constexpr double kOverflowShare = 1.0 / 128;

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
__global__ void from_exponents(uint16_t* w, int m, int k, const uint32_t* cumulated, int classes, int values, int first, int row_scales,
                               uint64_t seed) {
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
    const uint32_t exponent = low ? first + low - 1 - hash(row + (seed << 33)) % row_scales : 0;
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
  from_exponents<<<1056, 256>>>(w, m, k, device.get(), static_cast<int>(c.counts.size()), static_cast<int>(c.counts[0].size()), c.first,
                                c.row_scales, seed);
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
  const DenseBits bits = {w, m, k, false};
  CHECK(launch_choose_shifts(bits, e.shift->get(), nullptr));
  DeviceArray<uint32_t> device_counts(count);
  CHECK(launch_count_escapes(bits, e.shift->get(), device_counts.get(), nullptr));
  std::vector<uint32_t> counts(count);
  CHECK(cudaMemcpy(counts.data(), device_counts.get(), count * sizeof(uint32_t), cudaMemcpyDeviceToHost));

  int words = kMaxBlockWords;
  size_t over = 0;
  for (int candidate : kBlockWidths) {
    over = std::count_if(counts.begin(), counts.end(), [&](uint32_t escapes) { return escapes > 2u * (candidate - kEntryStart); });
    words = candidate;
    if (over <= count * kOverflowShare) break;
  }
  std::vector<uint32_t> starts(count + 1, 0);
  const uint32_t room = 2 * (words - kEntryStart);
  double escapes = 0;
  size_t overflowing = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t spilled = counts[i] > room ? counts[i] - room : 0;
    starts[i + 1] = starts[i] + spilled;
    overflowing += spilled > 0;
    escapes += counts[i];
  }
  DeviceArray<uint32_t> device_starts(count + 1);
  CHECK(cudaMemcpy(device_starts.get(), starts.data(), (count + 1) * 4, cudaMemcpyHostToDevice));
  e.block_words_total = count * words;
  e.copies = static_cast<int>(bytes_of_copies / (e.block_words_total * 4)) + 1;
  e.overflow_entries = starts[count];
  // Padded with zeros as jaxzip does (formats/lane_planar.py).
  for (e.overflow_stride = 32; e.overflow_stride < starts[count];) e.overflow_stride *= 2;
  e.blocks = std::make_unique<DeviceArray<uint32_t>>(e.block_words_total * e.copies);
  e.overflow = std::make_unique<DeviceArray<OverflowEntry>>(e.overflow_stride * e.copies);
  CHECK(cudaMemset(e.overflow->get(), 0, e.overflow_stride * sizeof(OverflowEntry)));
  CHECK(launch_encode(bits, e.shift->get(), device_starts.get(), words, e.blocks->get(), e.overflow->get(), starts[count], nullptr));
  for (int i = 1; i < e.copies; ++i) {
    CHECK(cudaMemcpy(e.overflow->get() + i * e.overflow_stride, e.overflow->get(), e.overflow_stride * sizeof(OverflowEntry), cudaMemcpyDeviceToDevice));
    CHECK(cudaMemcpy(e.blocks->get() + i * e.block_words_total, e.blocks->get(), e.block_words_total * 4, cudaMemcpyDeviceToDevice));
  }
  e.matrix.blocks = e.blocks->get();
  e.matrix.overflow = e.overflow->get();
  e.matrix.overflow_length = e.overflow_stride;
  e.matrix.shift = e.shift->get();
  e.matrix.block_words = words;
  const double size = static_cast<double>(m) * k;
  e.bits_per_weight = 8 * (e.block_words_total * 4.0 + starts[count] * 8.0 + e.shift->size()) / size;
  e.escape_share = escapes / size;
  e.overflowing_blocks = static_cast<double>(overflowing) / count;
  return e;
}
