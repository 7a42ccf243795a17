#include "measure_load.h"

#include "cublas_timing.h"
#include "given_config.h"
#include "matmul.h"

void measure_load(const Problem& p, int n, const std::string& config, double seconds, cudaStream_t stream, CublasReference& cublas,
                  const PowerMeter& meter) {
  using namespace jaxzip;
  constexpr int kTurns = 2;
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), y(static_cast<size_t>(n) * p.m);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 77);
  CHECK(cudaDeviceSynchronize());
  CublasTiming dense(cublas, p, x.get(), y.get(), n, stream);
  const GivenConfig given(p, n, config);
  lane_planar::MatmulOptions options;
  options.config = given.get();
  const Epilogue epilogue = {y.get(), false, nullptr, nullptr};
  const auto measure = [&](int count, const auto& launch) {
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < count; ++i) launch(i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    return replay_under_load(graph, stream, count, seconds, meter);
  };
  UnderLoad ours, theirs;
  for (int turn = 0; turn < kTurns; ++turn) {
    const auto launch = [&](int i) { CHECK(lane_planar::launch_matmul(p.encoded.copy(i), x.get(), n, epilogue, options, stream)); };
    ours.add(measure(std::max(p.encoded.copies, kLeastLaunches), launch), 1.0 / kTurns);
    theirs.add(measure(dense.launches(), [&](int i) { dense.run(i); }), 1.0 / kTurns);
  }
  std::printf("%dx%d N%d %.3f bits: %.2f us %.2f mJ %.0f W %.0f MHz, cublas %.2f us %.2f mJ %.0f W %.0f MHz, ratio %.3f %s\n", p.m, p.k, n,
              p.encoded.bits_per_weight, ours.us, ours.joules * 1e3, ours.watts, ours.mhz, theirs.us, theirs.joules * 1e3, theirs.watts,
              theirs.mhz, theirs.us / ours.us, config.c_str());
  std::fflush(stdout);
}
