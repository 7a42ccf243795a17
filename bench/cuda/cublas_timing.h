// Which of cuBLAS's ways is fastest for a problem, and launches of it.
#pragma once
#include <algorithm>

#include "cublas_reference.h"
#include "product.h"
#include "timing.h"

constexpr int kLeastLaunches = 40;  // in a graph: more where there are more copies

class CublasTiming {
 public:
  // Times all ways for n rows of x, to y of [n][m].
  CublasTiming(CublasReference& cublas, const Problem& p, const __nv_bfloat16* x, __nv_bfloat16* y, int n, cudaStream_t stream)
      : cublas_(cublas), p_(p), x_(x), y_(y), n_(n) {
    const int ways = cublas.prepare(product(0));
    for (int way = 0; way < ways; ++way) {
      const float us = graph_microseconds(stream, [&](int i) { cublas_.run(way, product(i)); }, launches(), 5);
      if (way == 0) gemm_ex_us_ = us;
      if (way == 0 || us < us_) us_ = us, way_ = way;
    }
  }
  void run(int i) { cublas_.run(way_, product(i)); }  // the i-th launch, on a copy of its own
  int launches() const { return std::max(p_.dense_copies, kLeastLaunches); }
  float gemm_ex_us() const { return gemm_ex_us_; }

 private:
  DenseProduct product(int i) const {
    return {p_.dense->get() + static_cast<size_t>(p_.m) * p_.k * (i % p_.dense_copies), x_, y_, p_.m, n_, p_.k};
  }
  CublasReference& cublas_;
  const Problem& p_;
  const __nv_bfloat16* x_;
  __nv_bfloat16* y_;
  int n_, way_ = 0;
  float us_ = 0, gemm_ex_us_ = 0;
};
