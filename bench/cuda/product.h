// One matmul problem on the device: weights encoded and raw, activations, and a double-precision reference.
#pragma once
#include <cuda_bf16.h>

#include <string>
#include <vector>

#include "weights.h"

struct Problem {
  int m, k;
  std::string weights;  // "gaussian", "real" or "patterns"
  int dense_copies;
  std::unique_ptr<DeviceArray<uint16_t>> dense;    // [copies][m][k]
  std::unique_ptr<DeviceArray<uint32_t>> ordered;  // fragment order, for the raw control
  std::unique_ptr<DeviceArray<int8_t>> no_shift;
  Encoded encoded;

  jaxzip::lane_planar::Matrix raw() const {
    return {ordered->get(), nullptr, no_shift->get(), 0, 2048, m, k};
  }
};

// `copies_bytes`: at least so many bytes of copies of each representation.
Problem make_problem(int m, int k, const std::string& weights, const ExponentClasses& classes, size_t copies_bytes);

// y[n][m] in double precision.
std::vector<double> reference_product(const uint16_t* w, const __nv_bfloat16* x, int m, int k, int n);
