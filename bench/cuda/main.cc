// Bare CUDA benchmark of the lane-planar kernels: `check`, or times against the better of cublasGemmEx and cublasLt.
//
//   bench check [PAYLOAD ...] [only=NAME]   payloads of payload.py
//   bench gated | bench tails       the parts of `check` about gated products, and about products as two launches
//   bench choices                   whether what the library chooses fits into an SM; needs no GPU
//   bench chosen OUT.json [weights=real] [n=1,8,16] [shapes=4096x4096,...] [steady=1] [decompress=0] [config=NAME,...]   what the library chooses, against cuBLAS
//   bench speed OUT.json [same] [only=NAME] [variants=8]   all configurations, of which the best is timed against cuBLAS
//   bench once - [same options]     one plain launch of each kernel, and of wgmma's gated products, for profilers and racecheck
//   bench load - [weights=] [n=] [shapes=] [seconds=0.4] [config=NAME,...]   time and energy of what the library chooses while the GPU never idles
//
// `timings=FILE` gets the time of every configuration.
// `only` keeps the kernels whose name contains it, `variants` prints so many of the slower ones.
#include <algorithm>
#include <cstring>
#include <fstream>

#include "check_kernels.h"
#include "cublas_timing.h"
#include "kernels.h"
#include "measure_chosen.h"
#include "measure_load.h"
#include "options.h"

namespace {

constexpr size_t kColdBytes = 420u << 20;  // seven times the L2
constexpr double kCopyBandwidth = 4.3e12;
std::FILE* timings = nullptr;  // of every configuration: m k n cublas us name

void measure(const Problem& p, const std::vector<Candidate>& kernels, int n, size_t variants, cudaStream_t stream, CublasReference& cublas, std::ostream& json) {
  using namespace jaxzip::lane_planar;
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), y(static_cast<size_t>(n) * p.m);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 77);
  CHECK(cudaDeviceSynchronize());
  const int launches = std::max(p.encoded.copies, 40);
  constexpr Before kBurst = {100, 0}, kSteady = {0, 400};
  CublasTiming dense(cublas, p, x.get(), y.get(), n, stream);
  const float gemm_ex = dense.gemm_ex_us();
  const auto time_dense = [&](int repeats, const Before& before) {
    return graph_microseconds(stream, [&](int i) { dense.run(i); }, dense.launches(), repeats, before);
  };
  const float best_dense = time_dense(5, kBurst), steady_dense = time_dense(11, kSteady);
  struct Timed {
    float us;
    Candidate candidate;
  };
  const auto time = [&](const Candidate& c, bool overlap, int repeats, const Before& before = {}) {
    return graph_microseconds(
        stream, [&](int i) { CHECK(run_candidate(c, p.encoded.copy(i), x.get(), y.get(), n, false, stream, false, overlap)); }, launches, repeats, before);
  };
  std::vector<Timed> timed;
  for (const Candidate& c : kernels) timed.push_back({time(c, false, 3), c});
  if (timed.empty()) return;
  const auto faster = [](const Timed& a, const Timed& b) { return a.us < b.us; };
  std::sort(timed.begin(), timed.end(), faster);
  // The first three are timed again, and what the library chooses with them: many configurations in a row heat the GPU.
  size_t finalists = std::min<size_t>(3, timed.size());
  for (const Candidate& c : chosen_candidates(p.encoded.matrix, n)) {
    if (c.name.find("chosen") != 0) continue;
    const auto same = std::find_if(timed.begin(), timed.end(), [&](const Timed& t) { return is_same(t.candidate, c); });
    if (same - timed.begin() >= static_cast<ptrdiff_t>(finalists) && same != timed.end()) std::iter_swap(timed.begin() + finalists++, same);
  }
  for (size_t i = 0; i < finalists; ++i) timed[i].us = time(timed[i].candidate, false, 5, kBurst);
  std::sort(timed.begin(), timed.begin() + finalists, faster);
  const Candidate& best = timed[0].candidate;
  const float steady_us = time(best, false, 11, kSteady);
  float chosen_us = 1e9f;
  for (const Candidate& c : chosen_candidates(p.encoded.matrix, n))
    if (c.is_wgmma == best.is_wgmma && c.name.find("chosen") == 0) chosen_us = time(c, false, 5, kBurst);
  const float us = timed[0].us, overlapped = time(best, true, 5, kBurst);
  const double bytes = p.encoded.block_words_total * 4.0 + 2.0 * n * (p.m + p.k), floor_us = bytes / kCopyBandwidth * 1e6;
  std::printf("%5dx%-5d N%-3d %s %.3f bits: cublas %6.2f (gemmEx %6.2f)  best %6.2f  ratio %.3f  steady %6.2f %.3f  chosen %6.2f %.3f  overlapped %6.2f %.3f  %.2f TB/s  floor %6.2f  %s\n",
              p.m, p.k, n, p.weights.c_str(), p.encoded.bits_per_weight, best_dense, gemm_ex, us, best_dense / us, steady_us, steady_dense / steady_us, chosen_us, best_dense / chosen_us, overlapped,
              best_dense / overlapped, bytes / us / 1e6, floor_us, best.name.c_str());
  json << "{\"m\": " << p.m << ", \"k\": " << p.k << ", \"n\": " << n << ", \"weights\": \"" << p.weights << "\", \"bits\": "
       << p.encoded.bits_per_weight << ", \"cublas_us\": " << best_dense << ", \"gemm_ex_us\": " << gemm_ex << ", \"us\": " << us
       << ", \"steady_us\": " << steady_us << ", \"steady_cublas_us\": " << steady_dense << ", \"chosen_us\": " << chosen_us << ", \"overlapped_us\": " << overlapped << ", \"ratio\": " << best_dense / us << ", \"floor_us\": " << floor_us << ", \"kernel\": \"" << best.name
       << "\"},\n";
  if (timings)
    for (const Timed& t : timed) std::fprintf(timings, "%d %d %d %.2f %.2f %s\n", p.m, p.k, n, best_dense, t.us, t.candidate.name.c_str());
  std::vector<std::string> seen;  // the best of each kernel and cluster size
  for (const Timed& t : timed) {
    const std::string kind = t.candidate.name.substr(0, t.candidate.name.find(" cl"));
    if (std::find(seen.begin(), seen.end(), kind) != seen.end()) continue;
    seen.push_back(kind);
    if (seen.size() <= variants) std::printf("      %6.2f %s\n", t.us, t.candidate.name.c_str());
  }
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench check | bench gated | bench tails | bench choices | bench chosen OUT.json [option=value ...] | bench speed OUT.json [option=value ...] | bench once - [option=value ...] | bench load - [option=value ...]\n");
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
  if (!log.empty()) timings = std::fopen(log.c_str(), "w");
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
          measure(p, kernels, n, std::stoul(option(argc, argv, "variants", "0")), stream, *cublas, json);
        }
      }
      if (option(argc, argv, "decompress", "0") == "1") measure_decompression(p, stream, json);
    }
  json << "{}]\n";
  return 0;
}
