// Synthetic bf16 weights on the device and their lane-planar encoding, for the benchmark.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "layout.h"

// Fills w with Gaussian weights, a share `zeros` of them exactly zero.
void fill_gaussian(uint16_t* w, size_t size, float sigma, float zeros, uint32_t seed);
// Exponents of real models (exponents.json; that of ../cuda_tca has them as they are in tensors): per class of blocks the count of zeros, then of exponents from `first` on.
struct ExponentClasses {
  int first;
  int row_scales;  // a row is smaller by one of so many powers of two, 2^0 among them
  std::vector<std::vector<double>> counts;
};
ExponentClasses read_exponents(const char* path);
// Fills w[m][k] with exponents drawn from them, uniform signs and mantissas.
void fill_from_exponents(uint16_t* w, int m, int k, const ExponentClasses& classes, uint32_t seed);
// Reorders w[m][k] into fragment order, 2048 words a block, zero padded: what the raw control reads.
void to_fragment_order(const uint16_t* w, int m, int k, uint32_t* out);

// One encoded matrix, in `copies` identical copies of its blocks so that repeated runs find a cold cache.
struct Encoded {
  std::unique_ptr<DeviceArray<uint32_t>> blocks;
  std::unique_ptr<DeviceArray<jaxzip::lane_planar::OverflowEntry>> overflow;
  std::unique_ptr<DeviceArray<int8_t>> shift;
  jaxzip::lane_planar::Matrix matrix;
  size_t block_words_total, overflow_stride, overflow_entries;  // of which so many are no padding
  int copies;
  double bits_per_weight, escape_share, overflowing_blocks;

  jaxzip::lane_planar::Matrix copy(int i) const {
    jaxzip::lane_planar::Matrix w = matrix;
    w.blocks += static_cast<size_t>(i % copies) * block_words_total;
    w.overflow += static_cast<size_t>(i % copies) * overflow_stride;
    return w;
  }
};

// The same bytes as jaxzip.formats.lane_planar's encoder. `w` is on the device.
Encoded encode_lane_planar(const uint16_t* w, int m, int k, size_t bytes_of_copies);
