// One matmul problem on the device: dense weights, their TCA-TBE payload in copies, and the order of its positions for the raw control.
#pragma once
#include <memory>
#include <string>

#include "jaxzip/kernels.h"
#include "weights.h"

struct TcaProblem {
  int m, k, dense_copies, copies;
  double bits_per_weight, fallback_share;
  std::unique_ptr<DeviceArray<uint16_t>> dense;  // [dense_copies][m][k]
  std::unique_ptr<DeviceArray<uint16_t>> ordered;
  std::unique_ptr<DeviceArray<uint8_t>> storage;  // [copies][copy_bytes]
  size_t copy_bytes, payload_bytes;
  jaxzip::Payload first;

  jaxzip::Payload copy(int i) const;
};

// `weights`: gaussian, tensors (`classes` of exponents.json here), real (of ../cuda, rows of different scale), patterns (all 65,536), zeros, sevenths (one in seven outside of the window), escapes (exponents that no
// window holds many of). At least `copies_bytes` of each representation, so that repeated runs find a cold cache.
TcaProblem make_tca_problem(int m, int k, const std::string& weights, const ExponentClasses& classes, size_t copies_bytes);
