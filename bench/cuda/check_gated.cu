// Gated products against the activation of the same product without it, bit for bit: a row's sums are the same, however pairs are dealt.
#include <algorithm>
#include <cstring>

#include "check_kernels.h"
#include "gated_activation.cuh"
#include "matmul_wgmma.h"
#include "product.h"

using namespace jaxzip::lane_planar;
using jaxzip::Activation;

namespace {

__global__ void activate(const __nv_bfloat16* y, __nv_bfloat16* gated, int n, int m, Activation activation) {
  const int half = m / 2;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n * half; i += gridDim.x * blockDim.x) {
    const __nv_bfloat16* gate = y + static_cast<size_t>(i / half) * m + i % half;
    gated[i] = __float2bfloat16_rn(jaxzip::gated_activation(activation, __bfloat162float(gate[0]), __bfloat162float(gate[half])));
  }
}

// All ways to deal `pairs` that differ in how many a CTA's teams get.
std::vector<int> dealings(int pairs) {
  std::vector<int> clusters;
  for (const int each : {1, 2, 3, 4, 5, 7, 8}) clusters.push_back((pairs + each - 1) / each);
  std::sort(clusters.begin(), clusters.end());
  clusters.erase(std::unique(clusters.begin(), clusters.end()), clusters.end());
  return clusters;
}

int check(const Problem& p, int n, cudaStream_t stream, int* checked) {
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), y(static_cast<size_t>(n) * p.m);
  const size_t outputs = static_cast<size_t>(n) * (p.m / 2);
  DeviceArray<__nv_bfloat16> want(outputs), got(outputs);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 79);
  std::vector<uint16_t> expected(outputs), found(outputs);
  int failures = 0;
  for (int k_groups = 1; k_groups <= wgmma_groups(n); k_groups *= 2)
    for (int cluster = 1; cluster <= 5; ++cluster) {
      const WgmmaConfig plain = {k_groups, cluster, 1};
      if (!wgmma_shared_bytes(p.encoded.matrix, n, plain)) continue;
      const Activation activation = cluster % 2 ? Activation::silu : Activation::gelu_tanh;
      CHECK(launch_matmul_wgmma(p.encoded.matrix, x.get(), n, {y.get(), false, nullptr, nullptr}, plain, stream));
      activate<<<264, 256, 0, stream>>>(y.get(), want.get(), n, p.m, activation);
      CHECK(cudaGetLastError());
      CHECK(cudaMemcpyAsync(expected.data(), want.get(), outputs * 2, cudaMemcpyDeviceToHost, stream));
      for (const int clusters : dealings(p.encoded.matrix.m_blocks() / 2))
        for (const bool raw : {false, true}) {
          const WgmmaConfig c = {k_groups, cluster, clusters};
          const Matrix& w = raw ? p.raw() : p.encoded.matrix;
          if (!wgmma_shared_bytes(w, n, c, raw, true)) continue;
          CHECK(cudaMemsetAsync(got.get(), 0xFF, outputs * 2, stream));
          CHECK(launch_matmul_wgmma(w, x.get(), n, {got.get(), false, nullptr, nullptr, true, activation}, c, stream, raw));
          CHECK(cudaMemcpyAsync(found.data(), got.get(), outputs * 2, cudaMemcpyDeviceToHost, stream));
          CHECK(cudaStreamSynchronize(stream));
          ++*checked;
          if (!std::memcmp(expected.data(), found.data(), outputs * 2)) continue;
          if (++failures <= 6)
            std::printf("WRONG gated M%d K%d N%d wgmma %d C%d cl%d%s\n", p.m, p.k, n, k_groups, cluster, clusters, raw ? " raw" : "");
        }
    }
  return failures;
}

}  // namespace

int check_gated(const ExponentClasses& classes, cudaStream_t stream) {
  struct Case {
    int m, k;
    const char* weights;
  };
  int failures = 0, checked = 0;
  for (const Case& c : {Case{128, 64, "gaussian"}, Case{640, 1096, "real"}, Case{256, 512, "patterns"}, Case{2816, 1024, "real"},
                        Case{4096, 2048, "real"}}) {
    const Problem p = make_problem(c.m, c.k, c.weights, classes, 0);
    for (const int n : {1, 3, 8, 13, 16, 24, 32, 40, 57, 64}) failures += check(p, n, stream, &checked);
  }
  std::printf("gated products: %d configurations, %d wrong\n", checked, failures);
  return failures;
}
