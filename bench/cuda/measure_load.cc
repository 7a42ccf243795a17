#include "measure_load.h"

#include "matmul.h"
#include "timing.h"

void measure_load(const Problem& p, int n, const std::string& config, double seconds, cudaStream_t stream, CublasReference& cublas,
                  const PowerMeter& meter) {
  using namespace jaxzip;
  constexpr int kTurns = 2, kLaunches = 40;
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), y(static_cast<size_t>(n) * p.m);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 77);
  CHECK(cudaDeviceSynchronize());
  const size_t size = static_cast<size_t>(p.m) * p.k;
  const auto dense = [&](int i) { return DenseProduct{p.dense->get() + size * (i % p.dense_copies), x.get(), y.get(), p.m, n, p.k}; };
  const int ways = cublas.prepare(dense(0));
  int best_way = 0;
  float best_us = 1e9f;
  for (int way = 0; way < ways; ++way) {
    const float us = graph_microseconds(stream, [&](int i) { cublas.run(way, dense(i)); }, std::max(p.dense_copies, kLaunches), 5);
    if (us < best_us) best_us = us, best_way = way;
  }
  std::optional<lane_planar::MatmulConfig> given;
  lane_planar::MatmulOptions options;
  if (!config.empty()) {
    given = lane_planar::parse_config(config, n);
    if (!given || !lane_planar::fits(p.encoded.matrix, n, *given)) std::fprintf(stderr, "no configuration for %d rows: %s\n", n, config.c_str()), std::exit(2);
    options.config = &*given;
  }
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
    ours.add(measure(std::max(p.encoded.copies, kLaunches), launch), 1.0 / kTurns);
    theirs.add(measure(std::max(p.dense_copies, kLaunches), [&](int i) { cublas.run(best_way, dense(i)); }), 1.0 / kTurns);
  }
  std::printf("%dx%d N%d %.3f bits: %.2f us %.2f mJ %.0f W %.0f MHz, cublas %.2f us %.2f mJ %.0f W %.0f MHz, ratio %.3f %s\n", p.m, p.k, n,
              p.encoded.bits_per_weight, ours.us, ours.joules * 1e3, ours.watts, ours.mhz, theirs.us, theirs.joules * 1e3, theirs.watts,
              theirs.mhz, theirs.us / ours.us, config.c_str());
  std::fflush(stdout);
}
