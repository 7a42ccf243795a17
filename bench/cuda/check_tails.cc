// Products as two launches, each of some row blocks, against products of one launch: a row's bits depend on how K is split, and on no more.
#include <cstring>

#include "check_kernels.h"
#include "matmul.h"
#include "product.h"

using namespace jaxzip::lane_planar;
using jaxzip::Activation;
using jaxzip::Epilogue;

namespace {

constexpr WgmmaConfig kConfigs[] = {{1, 1, 1}, {2, 1, 1}, {2, 3, 1}, {1, 5, 1}};

int check(const Problem& p, int n, bool gated, bool raw, cudaStream_t stream, int* checked) {
  const int rows = gated ? p.m / 2 : p.m;
  const Matrix w = raw ? p.raw() : p.encoded.matrix;
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), bias(p.m), residual(static_cast<size_t>(n) * p.m);
  const size_t outputs = static_cast<size_t>(n) * rows, bytes = gated ? 2 : 4;
  DeviceArray<uint8_t> y(outputs * bytes);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 80);
  fill_gaussian(reinterpret_cast<uint16_t*>(bias.get()), bias.size(), 1.0f, 0, 81);
  fill_gaussian(reinterpret_cast<uint16_t*>(residual.get()), residual.size(), 1.0f, 0, 82);
  CHECK(cudaDeviceSynchronize());
  Epilogue epilogue = {y.get(), !gated, bias.get(), residual.get()};
  if (gated) epilogue = {y.get(), false, nullptr, nullptr, true, Activation::silu};
  const auto run = [&](const MatmulConfig& c, std::vector<uint8_t>& to) {
    MatmulOptions options;
    options.raw = raw;
    options.config = &c;
    to.resize(y.size());
    CHECK(cudaMemsetAsync(y.get(), 0xFF, y.size(), stream));
    CHECK(launch_matmul(w, x.get(), n, epilogue, options, stream));
    CHECK(cudaMemcpyAsync(to.data(), y.get(), y.size(), cudaMemcpyDeviceToHost, stream));
    CHECK(cudaStreamSynchronize(stream));
  };
  const auto fits = [&](const WgmmaConfig& c) { return wgmma_shared_bytes(w, n, c, raw, gated) > 0; };
  int failures = 0;
  std::vector<uint8_t> first, second, found, expected;
  for (const WgmmaConfig& main : kConfigs)
    for (const WgmmaConfig& tail : kConfigs) {
      if (!fits(main) || !fits(tail)) continue;
      run({{}, main}, first);
      run({{}, tail}, second);
      const int all = w.m_blocks() >> gated;
      for (const int count : {1, 3, all - 1}) {
        if (count < 1 || count >= all) continue;
        MatmulConfig c = {{}, main, count, tail};
        c.wgmma.clusters = (all - count + 1) / 2;
        c.tail.clusters = (count + 1) / 2;
        run(c, found);
        expected = first;
        const size_t split = static_cast<size_t>(all - count) * kBlock * bytes, pitch = rows * bytes;
        for (int i = 0; i < n; ++i) std::memcpy(&expected[i * pitch + split], &second[i * pitch + split], pitch - split);
        ++*checked;
        if (found == expected) continue;
        if (++failures <= 6)
          std::printf("WRONG M%d K%d N%d %s%s%s\n", p.m, p.k, n, show(c, n).c_str(), gated ? " gated" : "", raw ? " raw" : "");
      }
    }
  return failures;
}

}  // namespace

int check_tails(const ExponentClasses& classes, cudaStream_t stream) {
  struct Case {
    int m, k;
    const char* weights;
  };
  int failures = 0, checked = 0;
  for (const Case& c : {Case{200, 1096, "real"}, Case{512, 512, "patterns"}, Case{1408, 1024, "real"}}) {
    const Problem p = make_problem(c.m, c.k, c.weights, classes, 0);
    for (const int n : {1, 8, 13, 32, 57, 64, 100, 200})
      for (const bool raw : {false, true}) {
        failures += check(p, n, false, raw, stream, &checked);
        if (c.m % (2 * kBlock) == 0 && n <= jaxzip::kGatedMaxN) failures += check(p, n, true, raw, stream, &checked);
      }
  }
  std::printf("products as two launches: %d configurations, %d wrong\n", checked, failures);
  return failures;
}
