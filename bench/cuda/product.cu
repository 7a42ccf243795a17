// Makes the problems of the benchmark and their reference results.
#include "product.h"

using namespace jaxzip::lane_planar;

namespace {

__device__ float value(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

__global__ void product(const uint16_t* w, const uint16_t* x, double* y, int m, int k, int n) {
  __shared__ double sums[128];
  const size_t row = blockIdx.x;
  for (int column = 0; column < n; ++column) {
    double sum = 0;
    for (int i = threadIdx.x; i < k; i += 128) sum += static_cast<double>(value(w[row * k + i])) * value(x[static_cast<size_t>(column) * k + i]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < 128; ++i) sum += sums[i];
      y[static_cast<size_t>(column) * m + row] = sum;
    }
    __syncthreads();
  }
}

}  // namespace

Problem make_problem(int m, int k, const std::string& weights, const ExponentClasses& classes, size_t copies_bytes) {
  Problem p;
  const size_t size = static_cast<size_t>(m) * k;
  p.m = m;
  p.k = k;
  p.weights = weights;
  p.dense_copies = static_cast<int>(copies_bytes / (size * 2)) + 1;
  p.dense = std::make_unique<DeviceArray<uint16_t>>(size * p.dense_copies);
  if (weights == "gaussian") {
    fill_gaussian(p.dense->get(), size, 0.02f, 0.0005f, 1);
  } else if (weights == "real") {
    fill_from_exponents(p.dense->get(), m, k, classes, 1);
  } else {  // every bf16 bit pattern, over and over
    std::vector<uint16_t> host(size);
    for (size_t i = 0; i < size; ++i) host[i] = static_cast<uint16_t>(i * 40503u);
    CHECK(cudaMemcpy(p.dense->get(), host.data(), size * 2, cudaMemcpyHostToDevice));
  }
  for (int i = 1; i < p.dense_copies; ++i)
    CHECK(cudaMemcpy(p.dense->get() + i * size, p.dense->get(), size * 2, cudaMemcpyDeviceToDevice));
  p.encoded = encode_lane_planar(p.dense->get(), m, k, copies_bytes);
  const int row_blocks = (m + 63) / 64, k_blocks = (k + 63) / 64;
  p.ordered = std::make_unique<DeviceArray<uint32_t>>(static_cast<size_t>(row_blocks) * k_blocks * 2048);
  to_fragment_order(p.dense->get(), m, k, p.ordered->get());
  p.no_shift = std::make_unique<DeviceArray<int8_t>>(row_blocks * 64);
  CHECK(cudaMemset(p.no_shift->get(), 0, row_blocks * 64));
  CHECK(cudaDeviceSynchronize());
  return p;
}

std::vector<double> reference_product(const uint16_t* w, const __nv_bfloat16* x, int m, int k, int n) {
  DeviceArray<double> y(static_cast<size_t>(m) * n);
  product<<<m, 128>>>(w, reinterpret_cast<const uint16_t*>(x), y.get(), m, k, n);
  CHECK(cudaGetLastError());
  std::vector<double> host(y.size());
  CHECK(cudaMemcpy(host.data(), y.get(), y.size() * 8, cudaMemcpyDeviceToHost));
  return host;
}
