// Bare CUDA benchmark of the lane-planar kernels: `check`, or times against the better of cublasGemmEx and cublasLt.
//
//   bench check [PAYLOAD ...] [only=NAME]   payloads of payload.py
//   bench gated | bench tails       the parts of `check` about gated products, and about products as two launches
//   bench choices                   whether what the library chooses fits into an SM; needs no GPU
//   bench chosen OUT.json [weights=real] [n=1,8,16] [shapes=4096x4096,...] [steady=1] [decompress=0] [config=NAME,...]   what the library chooses, against cuBLAS
//   bench speed - [weights=] [n=] [shapes=] [only=NAME] [variants=8] [timings=FILE]   all configurations; prints so many of the best, the file gets all
//   bench once - [same options]     one plain launch of each kernel, and of wgmma's gated products, for profilers and racecheck
//   bench load - [weights=] [n=] [shapes=] [seconds=0.4] [config=NAME,...]   time and energy of what the library chooses while the GPU never idles
//
// `only` keeps the kernels whose name contains it.
#include <algorithm>
#include <cstring>
#include <fstream>

#include "check_kernels.h"
#include "kernels.h"
#include "measure_all.h"
#include "measure_chosen.h"
#include "measure_load.h"
#include "options.h"

namespace {

constexpr size_t kColdBytes = 420u << 20;  // seven times the L2

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench check | bench gated | bench tails | bench choices | bench chosen OUT.json [option=value ...] | bench speed - [option=value ...] | bench once - [option=value ...] | bench load - [option=value ...]\n");
    return 2;
  }
  if (!std::strcmp(argv[1], "choices")) return check_choices() != 0;
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  const ExponentClasses classes = read_exponents(option(argc, argv, "exponents", "bench/cuda/exponents.json").c_str());
  if (!std::strcmp(argv[1], "gated")) return check_gated(classes, stream) != 0;
  if (!std::strcmp(argv[1], "tails")) return check_tails(classes, stream) != 0;
  if (!std::strcmp(argv[1], "check")) {
    int wrong = 0;
    for (int i = 2; i < argc; ++i)
      if (!std::strchr(argv[i], '=')) wrong += check_payload(argv[i], stream);
    wrong += check_kernels(classes, option(argc, argv, "only", ""), stream);
    wrong += check_gated(classes, stream);
    wrong += check_tails(classes, stream);
    return wrong + check_streams(classes) != 0;
  }

  const bool once = !std::strcmp(argv[1], "once"), load = !std::strcmp(argv[1], "load"), chosen = !std::strcmp(argv[1], "chosen");
  std::unique_ptr<CublasReference> cublas;
  if (!once) cublas = std::make_unique<CublasReference>(stream);
  std::vector<std::string> configs = split(option(argc, argv, "config", ""));
  if (configs.empty()) configs = {""};
  const std::string only = option(argc, argv, "only", ""), log = option(argc, argv, "timings", "");
  std::FILE* timings = log.empty() ? nullptr : std::fopen(log.c_str(), "w");
  std::ofstream json(argc > 2 ? argv[2] : "/dev/null");
  json << "[\n";
  const std::string shapes = option(argc, argv, "shapes", "4096x4096,6144x4096,1024x4096,14336x4096,28672x4096,4096x14336,8192x8192");
  for (const std::string& shape : split(shapes))
    for (const std::string& weights : split(option(argc, argv, "weights", "real"))) {
      int m, k;
      if (std::sscanf(shape.c_str(), "%dx%d", &m, &k) != 2) return 2;
      const Problem p = make_problem(m, k, weights, classes, kColdBytes);
      for (const std::string& columns : split(option(argc, argv, "n", "1,2,4,8,16,32"))) {
        const int n = std::stoi(columns);
        if (load) {
          static const PowerMeter meter;
          for (const std::string& config : configs)
            measure_load(p, n, config, std::stod(option(argc, argv, "seconds", "0.4")), stream, *cublas, meter);
          continue;
        }
        if (chosen) {
          for (const std::string& config : configs)
            measure_chosen(p, n, config, option(argc, argv, "steady", "1") == "1", stream, *cublas, json);
          continue;
        }
        std::vector<Candidate> kernels;
        for (const Candidate& c : candidates(p.encoded.matrix, n))
          if (c.name.find(only) != std::string::npos) kernels.push_back(c);
        if (once) {
          DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * k), y(static_cast<size_t>(n) * m);
          fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 77);
          for (const Candidate& c : kernels) {
            std::fprintf(stderr, "%s N%d\n", c.name.c_str(), n);
            CHECK(run_candidate(c, p.encoded.matrix, x.get(), y.get(), n, false, stream, false, false));
            CHECK(cudaStreamSynchronize(stream));
            const bool in_pairs = c.is_wgmma && m % (2 * jaxzip::lane_planar::kBlock) == 0 && n <= jaxzip::kGatedMaxN;
            if (!in_pairs || !wgmma_shared_bytes(p.encoded.matrix, n, c.wgmma, false, true)) continue;
            const jaxzip::Epilogue gated = {y.get(), false, nullptr, nullptr, true, jaxzip::Activation::silu};
            CHECK(launch_matmul_wgmma(p.encoded.matrix, x.get(), n, gated, c.wgmma, stream));
            CHECK(cudaStreamSynchronize(stream));
          }
        } else {
          measure_all(p, kernels, n, std::stoul(option(argc, argv, "variants", "8")), stream, *cublas, timings);
        }
      }
      if (option(argc, argv, "decompress", "0") == "1") measure_decompression(p, stream, json);
    }
  json << "{}]\n";
  return 0;
}
