// A plain TCA-TBE encoder on the device, one CTA of 64 threads a BlockTile, one thread a FragTile.
#include <algorithm>
#include <vector>

#include "jaxzip/layout.h"
#include "problem.h"

using namespace jaxzip;

namespace {

__global__ void histogram(const uint16_t* w, size_t size, unsigned long long* counts) {
  __shared__ unsigned bins[256];
  bins[threadIdx.x] = 0;
  __syncthreads();
  for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < size; i += gridDim.x * 256ull) atomicAdd(&bins[(w[i] >> 7) & 255], 1);
  __syncthreads();
  atomicAdd(&counts[threadIdx.x], static_cast<unsigned long long>(bins[threadIdx.x]));
}

struct Target {
  uint32_t* bitmap[3];
  uint8_t* sign_mantissa;
  uint16_t* full;
  uint2* tile_offsets;
  int2* band_offsets;
};

// Without values: bitmaps, band offsets, and the block's number of elements inside the window.
template <bool kValues>
__global__ void encode(const uint16_t* w, int m, int k, int start, Target to, uint32_t* inside) {
  __shared__ int counts[65];
  const int blocks_per_row = (k + 63) / 64, f = threadIdx.x;
  const int frag_row = f / 16 * 2 + (f & 1), frag_column = f % 16 / 4 * 2 + (f >> 1 & 1);
  const int64_t block = blockIdx.x, row0 = block / blocks_per_row * 64 + frag_row * 8, k0 = block % blocks_per_row * 64 + frag_column * 8;
  uint64_t bits[3] = {0, 0, 0};
  const auto value = [&](int p) -> uint32_t {
    const int64_t row = row0 + p / 8, column = k0 + p % 8;
    return row < m && column < k ? w[row * k + column] : (start + 1) << 7;
  };
  for (int p = 0; p < 64; ++p) {
    const uint32_t code = (value(p) >> 7 & 255) - start;
    if (code - 1 < 7u)
      for (int b = 0; b < 3; ++b) bits[b] |= static_cast<uint64_t>(code >> b & 1) << p;
  }
  const uint64_t any = bits[0] | bits[1] | bits[2];
  counts[f] = __popcll(any);
  __syncthreads();
  int before = 0, total = 0;
  for (int i = 0; i < 64; ++i) before += i < f ? counts[i] : 0, total += counts[i];
  if (!kValues) {
    for (int b = 0; b < 3; ++b) reinterpret_cast<uint64_t*>(to.bitmap[b])[block * 64 + f] = bits[b];
    if (f % 16 == 0) to.band_offsets[block * 4 + f / 16] = make_int2(before, f * 64 - before);
    if (f == 0) inside[block] = total;
    return;
  }
  size_t low = to.tile_offsets[block].x + before, full = to.tile_offsets[block].y + f * 64 - before;
  for (int p = 0; p < 64; ++p) {
    const uint32_t v = value(p);
    if (any >> p & 1)
      to.sign_mantissa[low++] = static_cast<uint8_t>((v >> 8 & 0x80) | (v & 0x7F));
    else
      to.full[full++] = static_cast<uint16_t>(v);
  }
}

// Thread i: element i of the payload's positions, [block][FragTile][64]; zero outside the matrix.
__global__ void to_position_order(const uint16_t* w, int m, int k, size_t size, uint16_t* out) {
  const size_t i = blockIdx.x * 256ull + threadIdx.x;
  if (i >= size) return;
  const int blocks_per_row = (k + 63) / 64, f = i / 64 % 64, p = i % 64;
  const int64_t block = i / 4096;
  const int64_t row = block / blocks_per_row * 64 + (f / 16 * 2 + (f & 1)) * 8 + p / 8;
  const int64_t column = block % blocks_per_row * 64 + (f % 16 / 4 * 2 + (f >> 1 & 1)) * 8 + p % 8;
  out[i] = row < m && column < k ? w[row * k + column] : 0;
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

Payload TcaProblem::copy(int i) const {
  Payload p = first;
  const size_t by = static_cast<size_t>(i % copies) * copy_bytes;
  const auto move = [&](auto*& pointer) {
    pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(reinterpret_cast<const uint8_t*>(pointer) + by);
  };
  for (auto& b : p.bitmap) move(b);
  move(p.start_exp), move(p.sign_mantissa), move(p.full), move(p.tile_offsets), move(p.band_offsets);
  return p;
}

TcaProblem make_tca_problem(int m, int k, const std::string& weights, const ExponentClasses& classes, size_t copies_bytes) {
  TcaProblem p = {};
  const size_t size = static_cast<size_t>(m) * k, blocks = layout::NumBlocks(m, k);
  p.m = m, p.k = k;
  p.dense_copies = static_cast<int>(copies_bytes / (size * 2)) + 1;
  p.dense = std::make_unique<DeviceArray<uint16_t>>(size * p.dense_copies);
  uint16_t* w = p.dense->get();
  if (weights == "gaussian") {
    fill_gaussian(w, size, 0.02f, 0.0005f, 1);
  } else if (weights == "real" || weights == "tensors") {
    fill_from_exponents(w, m, k, classes, 1);
  } else {
    std::vector<uint16_t> host(size);
    for (size_t i = 0; i < size; ++i)
      host[i] = weights == "zeros" ? (i % 7 ? 0 : 0x8000)
                : weights == "sevenths"
                    ? static_cast<uint16_t>((i * 40503u & 0x807F) | (i % 7 == 3 ? i % 5 : 120 + i % 7) << 7)
                : weights == "escapes"
                    ? static_cast<uint16_t>(i % 3 << 15 | (64 + i % 4 * 32) << 7 | i % 128)
                    : static_cast<uint16_t>(i * 40503u);
    CHECK(cudaMemcpy(w, host.data(), size * 2, cudaMemcpyHostToDevice));
  }
  for (int i = 1; i < p.dense_copies; ++i) CHECK(cudaMemcpy(w + i * size, w, size * 2, cudaMemcpyDeviceToDevice));
  p.ordered = std::make_unique<DeviceArray<uint16_t>>(blocks * 4096);
  to_position_order<<<blocks * 16, 256>>>(w, m, k, blocks * 4096, p.ordered->get());
  CHECK(cudaGetLastError());

  DeviceArray<unsigned long long> device_counts(256);
  CHECK(cudaMemset(device_counts.get(), 0, 256 * 8));
  histogram<<<1056, 256>>>(w, size, device_counts.get());
  std::vector<unsigned long long> counts(256);
  CHECK(cudaMemcpy(counts.data(), device_counts.get(), 256 * 8, cudaMemcpyDeviceToHost));
  int start = 0;
  unsigned long long best = 0;
  for (int s = 1; s <= 249; ++s) {
    unsigned long long covered = 0;
    for (int i = 0; i < 7; ++i) covered += counts[s + i];
    if (s == 1 || covered > best) best = covered, start = s - 1;
  }

  DeviceArray<uint32_t> bitmaps(blocks * 128 * 3), device_inside(blocks);
  DeviceArray<int2> bands(blocks * 4);
  Target to = {{bitmaps.get(), bitmaps.get() + blocks * 128, bitmaps.get() + blocks * 256}, nullptr, nullptr, nullptr, bands.get()};
  encode<false><<<blocks, 64>>>(w, m, k, start, to, device_inside.get());
  std::vector<uint32_t> inside(blocks);
  CHECK(cudaMemcpy(inside.data(), device_inside.get(), blocks * 4, cudaMemcpyDeviceToHost));
  std::vector<uint2> offsets(blocks + 1);
  size_t covered = 0;
  offsets[0] = make_uint2(0, 0);
  for (size_t i = 0; i < blocks; ++i) {
    covered += inside[i];
    offsets[i + 1] = make_uint2(offsets[i].x + (inside[i] + 15) / 16 * 16, offsets[i].y + (4096 - inside[i] + 7) / 8 * 8);
  }
  const size_t low = offsets[blocks].x, full = offsets[blocks].y;
  const size_t at_low = aligned(blocks * 512) * 3, at_full = at_low + aligned(low), at_offsets = at_full + aligned(2 * full),
               at_bands = at_offsets + aligned((blocks + 1) * 8), at_start = at_bands + aligned(blocks * 32);
  p.copy_bytes = at_start + 256;
  p.payload_bytes = blocks * 1536 + low + 2 * full + (blocks + 1) * 8 + blocks * 32 + 1;
  p.copies = static_cast<int>(copies_bytes / p.copy_bytes) + 1;
  p.storage = std::make_unique<DeviceArray<uint8_t>>(p.copy_bytes * p.copies);
  uint8_t* s = p.storage->get();
  CHECK(cudaMemset(s, 0, p.copy_bytes));
  for (int b = 0; b < 3; ++b)
    CHECK(cudaMemcpy(s + b * aligned(blocks * 512), to.bitmap[b], blocks * 512, cudaMemcpyDeviceToDevice));
  to.sign_mantissa = s + at_low;
  to.full = reinterpret_cast<uint16_t*>(s + at_full);
  to.tile_offsets = reinterpret_cast<uint2*>(s + at_offsets);
  CHECK(cudaMemcpy(s + at_offsets, offsets.data(), offsets.size() * 8, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(s + at_bands, bands.get(), blocks * 32, cudaMemcpyDeviceToDevice));
  const uint8_t start_byte = static_cast<uint8_t>(start);
  CHECK(cudaMemcpy(s + at_start, &start_byte, 1, cudaMemcpyHostToDevice));
  encode<true><<<blocks, 64>>>(w, m, k, start, to, nullptr);
  CHECK(cudaGetLastError());
  for (int i = 1; i < p.copies; ++i) CHECK(cudaMemcpy(s + i * p.copy_bytes, s, p.copy_bytes, cudaMemcpyDeviceToDevice));
  CHECK(cudaDeviceSynchronize());
  const auto word = [&](size_t at) { return reinterpret_cast<const uint32_t*>(s + at); };
  p.first = {m, k, s + at_start, {word(0), word(aligned(blocks * 512)), word(2 * aligned(blocks * 512))}, s + at_low,
             reinterpret_cast<const uint16_t*>(s + at_full), word(at_offsets), reinterpret_cast<const int32_t*>(s + at_bands),
             static_cast<int64_t>(low), static_cast<int64_t>(full)};
  p.bits_per_weight = 8.0 * p.payload_bytes / size;
  p.fallback_share = 1 - static_cast<double>(covered) / (blocks * 4096.0);
  return p;
}
