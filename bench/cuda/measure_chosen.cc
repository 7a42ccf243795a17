#include "measure_chosen.h"

#include <array>

#include "cublas_timing.h"
#include "decompress.h"
#include "given_config.h"
#include "matmul.h"
#include "matmul_wide.h"
#include "timing.h"

namespace {

constexpr double kCopyBandwidth = 4.3e12;

// What is launched for n rows, in the words of `show`.
std::string chosen(const Problem& p, int n) {
  using namespace jaxzip::lane_planar;
  Matrix shape = p.encoded.matrix;
  shape.block_words = kMaxBlockWords;
  return wide_is_faster(shape, n) ? "wide" : show(choose_matmul(shape, n), n);
}

}  // namespace

void measure_chosen(const Problem& p, int n, const std::string& config, bool steady, cudaStream_t stream, CublasReference& cublas, std::ostream& json) {
  using namespace jaxzip;
  constexpr int kTurns = 3, kRepeats = 5, kSteadyRepeats = 11;
  constexpr Before kBurst = {100, 0}, kSteady = {0, 400};
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(n) * p.k), y(static_cast<size_t>(n) * p.m);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 77);
  CHECK(cudaDeviceSynchronize());
  CublasTiming dense(cublas, p, x.get(), y.get(), n, stream);
  const Epilogue epilogue = {y.get(), false, nullptr, nullptr};
  const GivenConfig given(p, n, config);
  const auto time_ours = [&](bool overlap, int repeats, const Before& before) {
    lane_planar::MatmulOptions options;
    options.overlap = overlap;
    options.config = given.get();
    const auto launch = [&](int i) { CHECK(lane_planar::launch_matmul(p.encoded.copy(i), x.get(), n, epilogue, options, stream)); };
    return graph_microseconds(stream, launch, std::max(p.encoded.copies, kLeastLaunches), repeats, before);
  };
  const auto time_dense = [&](int repeats, const Before& before) {
    return graph_microseconds(stream, [&](int i) { dense.run(i); }, dense.launches(), repeats, before);
  };
  std::array<float, kTurns> ours, overlapped, theirs;
  for (int turn = 0; turn < kTurns; ++turn) {
    theirs[turn] = time_dense(kRepeats, kBurst);
    ours[turn] = time_ours(false, kRepeats, kBurst);
    overlapped[turn] = time_ours(true, kRepeats, kBurst);
  }
  for (auto* times : {&ours, &overlapped, &theirs}) std::sort(times->begin(), times->end());
  const float us = ours[kTurns / 2], cublas_us = theirs[kTurns / 2];
  const double bytes = p.encoded.block_words_total * 4.0 + 2.0 * n * (p.m + p.k), floor_us = bytes / kCopyBandwidth * 1e6;
  const std::string kernel = given.get() ? config : chosen(p, n);
  std::printf("%5dx%-5d N%-3d %s %.3f bits: cublas %.2f us, ours %.2f, ratio %.3f, overlapped %.2f, %.2f TB/s, floor %.2f (%.0f%%), %s\n", p.m, p.k,
              n, p.weights.c_str(), p.encoded.bits_per_weight, cublas_us, us, cublas_us / us, overlapped[kTurns / 2], bytes / us / 1e6, floor_us,
              100 * floor_us / us, kernel.c_str());
  json << "{\"m\": " << p.m << ", \"k\": " << p.k << ", \"n\": " << n << ", \"weights\": \"" << p.weights << "\", \"bits\": " << p.encoded.bits_per_weight
       << ", \"cublas_us\": " << cublas_us << ", \"gemm_ex_us\": " << dense.gemm_ex_us() << ", \"us\": " << us << ", \"ratio\": " << cublas_us / us
       << ", \"overlapped_us\": " << overlapped[kTurns / 2] << ", \"tb_per_s\": " << bytes / us / 1e6 << ", \"floor_us\": " << floor_us
       << ", \"kernel\": \"" << kernel << "\"";
  if (steady) {
    const float steady_cublas = time_dense(kSteadyRepeats, kSteady), steady_ours = time_ours(false, kSteadyRepeats, kSteady);
    std::printf("      steady: cublas %.2f us, ours %.2f, ratio %.3f\n", steady_cublas, steady_ours, steady_cublas / steady_ours);
    json << ", \"steady_cublas_us\": " << steady_cublas << ", \"steady_us\": " << steady_ours;
  }
  json << "},\n" << std::flush;
  std::fflush(stdout);
}

void measure_decompression(const Problem& p, cudaStream_t stream, std::ostream& json) {
  constexpr Before kBurst = {100, 0};
  constexpr int kLaunches = 20, kRepeats = 5;
  const size_t size = static_cast<size_t>(p.m) * p.k;
  const double bytes = p.encoded.block_words_total * 4.0 + 2.0 * size;
  // Half of the bytes are read, half are written, each time elsewhere; a GPU's memory takes both.
  const size_t half = static_cast<size_t>(bytes / 2) / 256 * 256;
  const int copies = static_cast<int>((420u << 20) / half) + 1;
  DeviceArray<char> from(half * copies), to(half * copies);
  CHECK(cudaMemset(from.get(), 1, from.size()));
  const auto copy = [&](int i) {
    CHECK(cudaMemcpyAsync(to.get() + half * (i % copies), from.get() + half * (i % copies), half, cudaMemcpyDeviceToDevice, stream));
  };
  for (const bool transposed : {false, true}) {
    const auto decompress = [&](int i) {
      CHECK(jaxzip::lane_planar::launch_decompress(p.encoded.copy(i), p.dense->get() + size * (i % p.dense_copies), transposed, stream));
    };
    const float copy_us = graph_microseconds(stream, copy, std::max(copies, kLaunches), kRepeats, kBurst);
    const float us = graph_microseconds(stream, decompress, std::max(p.encoded.copies, kLaunches), kRepeats, kBurst);
    const char* order = transposed ? "[k, m]" : "[m, k]";
    std::printf("%5dx%-5d decompress to %s %s: %.2f us, %.2f TB/s, copy %.2f us, %.1f%% of it\n", p.m, p.k, order, p.weights.c_str(), us, bytes / us / 1e6,
                copy_us, 100 * copy_us / us);
    json << "{\"m\": " << p.m << ", \"k\": " << p.k << ", \"decompress\": \"" << order << "\", \"weights\": \"" << p.weights << "\", \"us\": " << us
         << ", \"copy_us\": " << copy_us << ", \"tb_per_s\": " << bytes / us / 1e6 << ", \"share_of_copy\": " << copy_us / us << "},\n"
         << std::flush;
  }
}
