#include "measure_all.h"

#include "cublas_timing.h"

void measure_all(const Problem& p, const std::vector<Candidate>& kernels, int n, size_t variants, cudaStream_t stream, CublasReference& cublas,
                 std::FILE* timings) {
  constexpr int kRepeats = 5, kRepeatsOfAll = 3;
  constexpr size_t kAgain = 4;
  constexpr Before kBurst = {100, 0};
  if (kernels.empty()) return;
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), y(static_cast<size_t>(n) * p.m);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 77);
  CHECK(cudaDeviceSynchronize());
  CublasTiming dense(cublas, p, x.get(), y.get(), n, stream);
  const float cublas_us = graph_microseconds(stream, [&](int i) { dense.run(i); }, dense.launches(), kRepeats, kBurst);
  const auto time = [&](const Candidate& c, int repeats, const Before& before) {
    const auto launch = [&](int i) { CHECK(run_candidate(c, p.encoded.copy(i), x.get(), y.get(), n, false, stream, false, false)); };
    return graph_microseconds(stream, launch, std::max(p.encoded.copies, kLeastLaunches), repeats, before);
  };
  struct Timed {
    float us;
    Candidate candidate;
  };
  std::vector<Timed> timed;
  for (const Candidate& c : kernels) timed.push_back({time(c, kRepeatsOfAll, {}), c});
  const auto faster = [](const Timed& a, const Timed& b) { return a.us < b.us; };
  std::sort(timed.begin(), timed.end(), faster);
  const auto last = timed.begin() + std::min(kAgain, timed.size());
  for (auto t = timed.begin(); t != last; ++t) t->us = time(t->candidate, kRepeats, kBurst);
  std::sort(timed.begin(), last, faster);
  std::printf("%5dx%-5d N%-3d %s %.3f bits: cublas %.2f us, best of %zu %.2f, ratio %.3f, %s\n", p.m, p.k, n, p.weights.c_str(),
              p.encoded.bits_per_weight, cublas_us, timed.size(), timed[0].us, cublas_us / timed[0].us, timed[0].candidate.name.c_str());
  if (timings)
    for (const Timed& t : timed) std::fprintf(timings, "%d %d %d %.2f %.2f %s\n", p.m, p.k, n, cublas_us, t.us, t.candidate.name.c_str());
  std::vector<std::string> seen;
  for (const Timed& t : timed) {
    const std::string kind = t.candidate.name.substr(0, t.candidate.name.find(" cl"));
    if (seen.size() == variants || std::find(seen.begin(), seen.end(), kind) != seen.end()) continue;
    seen.push_back(kind);
    std::printf("      %6.2f %s\n", t.us, t.candidate.name.c_str());
  }
  std::fflush(stdout);
}
