// Bare CUDA benchmark of the TCA-TBE kernels.
//
//   bench check [small|tiny]       correctness: bits of decompression, products against double precision and the raw control
//   bench speed OUT.json [weights=tensors] [n=1,8,16,32] [shapes=28672x4096,...] [decompress=28672x4096,...] [warps=0]
#include <cmath>
#include <cstring>
#include <fstream>

#include "cublas_reference.h"
#include "decompress.h"
#include "matmul.h"
#include "options.h"
#include "problem.h"
#include "product.h"
#include "timing.h"

using jaxzip::Epilogue;
using namespace jaxzip::tca_tbe;

namespace {

constexpr size_t kColdBytes = 420u << 20;  // seven times the L2

int check_decompression(const TcaProblem& p, cudaStream_t stream) {
  const size_t size = static_cast<size_t>(p.m) * p.k;
  std::vector<uint16_t> want(size), got(size);
  CHECK(cudaMemcpy(want.data(), p.dense->get(), size * 2, cudaMemcpyDeviceToHost));
  DeviceArray<uint16_t> out(size);
  int failures = 0;
  for (const bool transposed : {false, true}) {
    CHECK(cudaMemset(out.get(), 0xA5, size * 2));
    CHECK(launch_decompress(p.first, out.get(), transposed, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(got.data(), out.get(), size * 2, cudaMemcpyDeviceToHost));
    size_t wrong = 0, first = size;
    for (size_t i = 0; i < size; ++i)
      if (want[i] != got[transposed ? i % p.k * p.m + i / p.k : i]) {
        if (!wrong++) first = i;
      }
    if (!wrong) continue;
    std::printf("WRONG decompression %s: %zu of %zu, first row %zu column %zu\n", transposed ? "[k, m]" : "[m, k]", wrong, size,
                first / p.k, first % p.k);
    ++failures;
  }
  return failures;
}

int check_products(const TcaProblem& p, const std::string& weights, int n, cudaStream_t stream, double* worst) {
  const int offset = n == 3;  // x at an odd address
  DeviceArray<__nv_bfloat16> storage(static_cast<size_t>(n) * p.k + 8), bias(p.m), residual(static_cast<size_t>(n) * p.m);
  fill_gaussian(reinterpret_cast<uint16_t*>(storage.get()), storage.size(), 1.0f, 0, 77);
  fill_gaussian(reinterpret_cast<uint16_t*>(bias.get()), bias.size(), 1.0f, 0, 78);
  fill_gaussian(reinterpret_cast<uint16_t*>(residual.get()), residual.size(), 1.0f, 0, 79);
  CHECK(cudaDeviceSynchronize());
  const __nv_bfloat16* x = storage.get() + offset;
  const size_t outputs = static_cast<size_t>(n) * p.m;
  const size_t workspace_size = matmul_workspace(p.m, n);
  DeviceArray<float> y(outputs), workspace(workspace_size);
  const std::vector<double> want = reference_product(p.dense->get(), x, p.m, p.k, n);
  std::vector<__nv_bfloat16> host_bias(p.m), host_residual(outputs);
  CHECK(cudaMemcpy(host_bias.data(), bias.get(), p.m * 2, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(host_residual.data(), residual.get(), outputs * 2, cudaMemcpyDeviceToHost));
  int failures = 0;
  for (const MatmulOptions& options : {MatmulOptions{}, MatmulOptions{5, 7, true}}) {
    const auto run = [&](bool fp32, bool add, bool raw, void* to) {
      CHECK(cudaMemset(y.get(), 0xFF, outputs * 4));
      CHECK(cudaMemset(workspace.get(), 0xFF, workspace_size * 4));
      const Epilogue epilogue = {y.get(), fp32, add ? bias.get() : nullptr, add ? residual.get() : nullptr};
      CHECK(launch_matmul(p.first, x, n, epilogue, workspace.get(), stream, options, raw ? p.ordered->get() : nullptr));
      CHECK(cudaStreamSynchronize(stream));
      CHECK(cudaMemcpy(to, y.get(), outputs * (fp32 ? 4 : 2), cudaMemcpyDeviceToHost));
    };
    std::vector<float> got(outputs), again(outputs), raw(outputs);
    std::vector<__nv_bfloat16> rounded(outputs), added(outputs);
    run(true, false, false, got.data());
    run(true, false, false, again.data());
    run(true, false, true, raw.data());
    run(false, false, false, rounded.data());
    run(false, true, false, added.data());
    const bool repeats = !std::memcmp(got.data(), again.data(), outputs * 4);
    const bool equal = !std::memcmp(got.data(), raw.data(), outputs * 4);
    double error = 0, norm = 0;
    size_t misrounded = 0, special = 0;
    for (size_t i = 0; i < outputs; ++i) {
      const __nv_bfloat16 nearest = __float2bfloat16(got[i]);
      const __nv_bfloat16 sum = __float2bfloat16(got[i] + __bfloat162float(host_bias[i % p.m]) + __bfloat162float(host_residual[i]));
      misrounded += std::memcmp(&nearest, &rounded[i], 2) != 0 && !std::isnan(got[i]);
      misrounded += std::memcmp(&sum, &added[i], 2) != 0 && !std::isnan(got[i]);
      if (std::isfinite(want[i]) && std::fabs(want[i]) < 1e37) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
      } else {
        special += std::isfinite(got[i]) && std::isnan(want[i]);
      }
    }
    error = norm ? std::sqrt(error / norm) : 0;
    const bool judged = weights == "gaussian" || weights == "real";
    if (judged && error > *worst) *worst = error;
    if (!repeats || !equal || (judged && !(error < 5e-6)) || misrounded || special) {
      ++failures;
      std::printf("WRONG %s M%d K%d N%d: error %.2e, repeats %d, equals raw %d, misrounded %zu, special %zu\n", weights.c_str(),
                  p.m, p.k, n, error, repeats, equal, misrounded, special);
    }
  }
  return failures;
}

int check(const ExponentClasses& classes, const std::string& size, cudaStream_t stream) {
  struct Case {
    int m, k;
    const char* weights;
  };
  int failures = 0;
  for (const Case& c :
       {Case{64, 64, "gaussian"}, Case{64, 128, "gaussian"}, Case{1, 1, "gaussian"}, Case{256, 256, "patterns"},
        Case{65, 1096, "patterns"}, Case{200, 330, "real"}, Case{130, 200, "escapes"}, Case{130, 200, "zeros"},
        Case{192, 320, "sevenths"}, Case{1024, 4096, "real"}, Case{1000, 3000, "real"}, Case{96, 20000, "gaussian"},
        Case{4096, 2048, "gaussian"}, Case{6144, 4096, "real"}}) {
    if (size != "all" && static_cast<int64_t>(c.m) * c.k > 100000) continue;
    if (size == "tiny" && !(c.m == 64 && c.k == 128)) continue;
    const TcaProblem p = make_tca_problem(c.m, c.k, c.weights, classes, 0);
    int wrong = check_decompression(p, stream);
    double worst = 0;
    for (const int n : {1, 3, 8, 11, 16, 32, 33, 70, 256})
      if ((c.m < 4096 && size != "tiny") || n == 8 || n == 32) wrong += check_products(p, c.weights, n, stream, &worst);
    std::printf("check %-8s M%-5d K%-5d %.3f bits, fallbacks %.2f%%: worst error %.1e, %d wrong\n", c.weights, c.m, c.k,
                p.bits_per_weight, 100 * p.fallback_share, worst, wrong);
    std::fflush(stdout);
    failures += wrong;
  }
  return failures;
}

void measure(const TcaProblem& p, const std::string& weights, int n, const std::vector<std::string>& warp_counts,
             cudaStream_t stream, CublasReference& cublas, std::ostream& json) {
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), y(static_cast<size_t>(n) * p.m);
  DeviceArray<float> workspace(matmul_workspace(p.m, n));
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 77);
  CHECK(cudaDeviceSynchronize());
  const size_t size = static_cast<size_t>(p.m) * p.k;
  const auto dense = [&](int i) { return DenseProduct{p.dense->get() + size * (i % p.dense_copies), x.get(), y.get(), p.m, n, p.k}; };
  float best = 1e9f, gemm_ex = 0;
  const int ways = cublas.prepare(dense(0));
  for (int way = 0; way < ways; ++way) {
    const float us = graph_microseconds(stream, [&](int i) { cublas.run(way, dense(i)); }, std::max(p.dense_copies, 30), 5);
    if (way == 0) gemm_ex = us;
    best = std::min(best, us);
  }
  const double bytes = p.payload_bytes + 2.0 * n * (p.m + p.k);
  for (const std::string& warps : warp_counts) {
    float us[2];
    for (const bool overlap : {false, true})
      us[overlap] = graph_microseconds(
          stream,
          [&](int i) {
            CHECK(launch_matmul(p.copy(i), x.get(), n, {y.get(), false, nullptr, nullptr}, workspace.get(), stream,
                                {std::stoi(warps), 0, overlap}));
          },
          std::max(p.copies, 30), 9);
    std::printf("%6dx%-5d N%-3d %s %.2f bits w%s: cublas %6.2f (gemmEx %6.2f)  ours %6.2f ratio %.3f  overlapped %6.2f ratio %.3f"
                "  %.2f TB/s\n", p.m, p.k, n, weights.c_str(), p.bits_per_weight, warps.c_str(), best, gemm_ex, us[0], best / us[0],
                us[1], best / us[1], bytes / us[1] / 1e6);
    json << "{\"m\": " << p.m << ", \"k\": " << p.k << ", \"n\": " << n << ", \"weights\": \"" << weights << "\", \"bits\": "
         << p.bits_per_weight << ", \"fallback_share\": " << p.fallback_share << ", \"warps\": " << warps << ", \"cublas_us\": " << best
         << ", \"gemm_ex_us\": " << gemm_ex << ", \"us\": " << us[0] << ", \"overlapped_us\": " << us[1] << ", \"ratio\": "
         << best / us[0] << ", \"overlapped_ratio\": " << best / us[1] << "},\n";
  }
  std::fflush(stdout);
}

void measure_decompression(const TcaProblem& p, const std::string& weights, cudaStream_t stream, std::ostream& json) {
  const size_t size = static_cast<size_t>(p.m) * p.k, bytes = p.payload_bytes + 2 * size, half = bytes / 2 / 16 * 16;
  const int copies = static_cast<int>(kColdBytes / half) + 1;
  DeviceArray<uint8_t> from(half * copies), to(half * copies);
  CHECK(cudaMemset(from.get(), 1, from.size()));
  // Not in a graph, whose copy nodes are slower.
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  float copy_us = 1e9f;
  for (int repeat = 0; repeat < 4; ++repeat) {
    CHECK(cudaEventRecord(start, stream));
    for (int i = 0; i < 20; ++i)
      CHECK(cudaMemcpyAsync(to.get() + half * (i % copies), from.get() + half * (i % copies), half, cudaMemcpyDeviceToDevice, stream));
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    copy_us = std::min(copy_us, ms * 1000 / 20);
  }
  for (const bool transposed : {false, true}) {
    const float us = graph_microseconds(
        stream,
        [&](int i) { CHECK(launch_decompress(p.copy(i), p.dense->get() + size * (i % p.dense_copies), transposed, stream)); },
        std::max(p.copies, 20), 5);
    const char* order = transposed ? "[k, m]" : "[m, k]";
    std::printf("%6dx%-5d decompress %s %.2f us, %.2f TB/s; copy of as many bytes %.2f us: %.1f%%\n", p.m, p.k, order, us,
                bytes / us / 1e6, copy_us, 100 * copy_us / us);
    json << "{\"m\": " << p.m << ", \"k\": " << p.k << ", \"fallback_share\": " << p.fallback_share << ", \"decompress\": \"" << order
         << "\", \"weights\": \"" << weights << "\", \"us\": " << us << ", \"copy_us\": " << copy_us << "},\n";
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench check [small|tiny] | bench speed OUT.json [option=value ...]\n");
    return 2;
  }
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const ExponentClasses classes = read_exponents(option(argc, argv, "exponents", "bench/cuda/exponents.json").c_str());
  if (!std::strcmp(argv[1], "check")) return check(classes, argc > 2 ? argv[2] : "all", stream) != 0;

  const ExponentClasses tensors = read_exponents(option(argc, argv, "tensors", "bench/cuda_tca/exponents.json").c_str());
  CublasReference cublas(stream);
  std::ofstream json(argc > 2 ? argv[2] : "/dev/null");
  json << "[\n";
  const auto each = [&](const std::string& shapes, auto&& body) {
    for (const std::string& shape : split(shapes)) {
      int m, k;
      if (std::sscanf(shape.c_str(), "%dx%d", &m, &k) != 2) std::exit(2);
      for (const std::string& weights : split(option(argc, argv, "weights", "tensors")))
        body(make_tca_problem(m, k, weights, weights == "tensors" ? tensors : classes, kColdBytes), weights);
    }
  };
  each(option(argc, argv, "decompress", ""),
       [&](const TcaProblem& p, const std::string& weights) { measure_decompression(p, weights, stream, json); });
  each(option(argc, argv, "shapes", ""), [&](const TcaProblem& p, const std::string& weights) {
    for (const std::string& n : split(option(argc, argv, "n", "1,8,16,32")))
      measure(p, weights, std::stoi(n), split(option(argc, argv, "warps", "0")), stream, cublas, json);
  });
  json << "{}]\n";
  return 0;
}
