// The dense product by cuBLAS: cublasGemmEx and the first algorithms of cublasLt's heuristic, loaded at run time.
#pragma once
#include <cuda_runtime.h>

#include <vector>

struct DenseProduct {
  const void* w;  // bf16 [m][k]
  const void* x;  // bf16 [n][k]
  void* y;        // bf16 [n][m]
  int m, n, k;
};

class CublasReference {
 public:
  // Loads libcublas.so.13 or .12 and libcublasLt; exits with a message where there is none.
  explicit CublasReference(cudaStream_t stream);

  // Number of ways to compute this product: 0 is cublasGemmEx, the others are cublasLt algorithms.
  int prepare(const DenseProduct& p);
  void run(int way, const DenseProduct& p);

 private:
  struct Algorithm {
    unsigned long long data[8];
  };
  cudaStream_t stream_;
  void* handle_ = nullptr;
  void* lt_ = nullptr;
  void* workspace_ = nullptr;
  void *operation_ = nullptr, *w_ = nullptr, *x_ = nullptr, *y_ = nullptr;
  std::vector<Algorithm> algorithms_;
};
