// Correctness of every kernel: exact bits of decompression, results against double precision, against the raw control bit
// for bit, and from run to run. Prints one line a problem and returns the number of failures.
#include "check_kernels.h"

#include <cmath>
#include <cstring>

#include "decompress.h"
#include "kernels.h"
#include "product.h"

using namespace jaxzip::lane_planar;

namespace {

int check_decompression(const Problem& p, cudaStream_t stream) {
  const size_t size = static_cast<size_t>(p.m) * p.k;
  std::vector<uint16_t> want(size), got(size);
  CHECK(cudaMemcpy(want.data(), p.dense->get(), size * 2, cudaMemcpyDeviceToHost));
  DeviceArray<uint16_t> out(size);
  size_t wrong = 0;
  for (const bool transposed : {false, true}) {
    CHECK(cudaMemset(out.get(), 0xA5, size * 2));
    CHECK(launch_decompress(p.encoded.matrix, out.get(), transposed, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(got.data(), out.get(), size * 2, cudaMemcpyDeviceToHost));
    for (size_t row = 0; row < static_cast<size_t>(p.m); ++row)
      for (size_t column = 0; column < static_cast<size_t>(p.k); ++column)
        wrong += want[row * p.k + column] != got[transposed ? column * p.m + row : row * p.k + column];
  }
  if (wrong) std::printf("WRONG decompression: %zu of %zu\n", wrong, 2 * size);
  return wrong != 0;
}

int check_products(const Problem& p, int n, int offset, const std::string& only, cudaStream_t stream, double* worst, int* checked) {
  DeviceArray<__nv_bfloat16> storage(static_cast<size_t>(n) * p.k + 8);
  fill_gaussian(reinterpret_cast<uint16_t*>(storage.get()), storage.size(), 1.0f, 0, 77);
  const __nv_bfloat16* x = storage.get() + offset;
  const size_t outputs = static_cast<size_t>(n) * p.m;
  DeviceArray<float> y(outputs);
  const std::vector<double> want = reference_product(p.dense->get(), x, p.m, p.k, n);
  std::vector<float> got[3] = {std::vector<float>(outputs), std::vector<float>(outputs), std::vector<float>(outputs)};
  std::vector<__nv_bfloat16> rounded(outputs);
  int failures = 0;
  std::vector<Candidate> kernels = candidates(p.encoded.matrix, n);
  for (const Candidate& c : chosen_candidates(p.encoded.matrix, n)) kernels.push_back(c);
  for (const Candidate& c : kernels) {
    if (c.name.find(only) == std::string::npos) continue;
    const auto run = [&](const Matrix& w, bool fp32, bool raw, void* to, size_t bytes) {
      CHECK(cudaMemset(y.get(), 0xFF, outputs * 4));
      CHECK(run_candidate(c, w, x, y.get(), n, fp32, stream, raw, false));
      CHECK(cudaStreamSynchronize(stream));
      CHECK(cudaMemcpy(to, y.get(), bytes, cudaMemcpyDeviceToHost));
    };
    run(p.encoded.matrix, true, false, got[0].data(), outputs * 4);
    run(p.encoded.matrix, true, false, got[1].data(), outputs * 4);
    run(p.encoded.matrix, false, false, rounded.data(), outputs * 2);
    const bool control = has_control(c, p.raw(), n);
    if (control) run(p.raw(), true, true, got[2].data(), outputs * 4);
    const bool repeats = !std::memcmp(got[0].data(), got[1].data(), outputs * 4);
    const bool equals_raw = !control || !std::memcmp(got[0].data(), got[2].data(), outputs * 4);
    double error = 0, norm = 0;
    size_t misrounded = 0, special = 0;
    for (size_t i = 0; i < outputs; ++i) {
      const __nv_bfloat16 nearest = __float2bfloat16(got[0][i]);
      misrounded += std::memcmp(&nearest, &rounded[i], 2) != 0;
      if (std::isfinite(want[i]) && std::fabs(want[i]) < 1e37) {
        error += (got[0][i] - want[i]) * (got[0][i] - want[i]);
        norm += want[i] * want[i];
      } else {
        special += std::isfinite(got[0][i]) && std::isnan(want[i]);
      }
    }
    error = norm ? std::sqrt(error / norm) : 0;
    // Every bit pattern as a weight: sums of huge terms cancel, only the control says something.
    const bool accurate = p.weights == "patterns" || error < 5e-6;
    if (error > *worst && p.weights != "patterns") *worst = error;
    ++*checked;
    if (!repeats || !equals_raw || !accurate || misrounded || special) {
      ++failures;
      if (failures <= 6)
        std::printf("WRONG %s M%d K%d N%d %s: error %.2e, repeats %d, equals raw %d, misrounded %zu, special %zu\n", p.weights.c_str(), p.m,
                    p.k, n, c.name.c_str(), error, repeats, equals_raw, misrounded, special);
    }
  }
  return failures;
}

// A batch-invariant configuration must give a column the same bits whatever the others are.
int check_invariance(const Problem& p, cudaStream_t stream) {
  constexpr int kAll = 64;
  const WgmmaConfig c = choose_batch_invariant(p.encoded.matrix);
  DeviceArray<__nv_bfloat16> x(static_cast<size_t>(kAll) * p.k);
  fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 78);
  DeviceArray<float> y(static_cast<size_t>(kAll) * p.m);
  const auto run = [&](int first, int n) {
    std::vector<float> got(static_cast<size_t>(n) * p.m);
    CHECK(cudaMemset(y.get(), 0xFF, got.size() * 4));
    const __nv_bfloat16* from = x.get() + static_cast<size_t>(first) * p.k;
    CHECK(launch_matmul_wgmma(p.encoded.matrix, from, n, {y.get(), true, nullptr, nullptr}, c, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(got.data(), y.get(), got.size() * 4, cudaMemcpyDeviceToHost));
    return got;
  };
  const std::vector<float> all = run(0, kAll);
  int wrong = 0;
  for (const int n : {1, 2, 5, 8, 9, 16, 17, 31, 32, 33, 63})
    for (const int first : {0, kAll - n}) {
      const int even = first / 8 * 8;  // keeps x aligned for any k
      const std::vector<float> got = run(even, std::min(n, kAll - even));
      wrong += std::memcmp(got.data(), all.data() + static_cast<size_t>(even) * p.m, got.size() * 4) != 0;
    }
  if (wrong) std::printf("WRONG: bits depend on n in %d of 22 runs\n", wrong);
  return wrong;
}

}  // namespace

int check_payload(const char* path, cudaStream_t stream) {
  std::FILE* file = std::fopen(path, "rb");
  int32_t sizes[4];  // m, k, words of a block, overflow entries
  if (!file || std::fread(sizes, 4, 4, file) != 4) {
    std::fprintf(stderr, "%s: no payload\n", path);
    return 1;
  }
  Matrix w = {};
  w.m = sizes[0], w.k = sizes[1], w.block_words = sizes[2], w.overflow_length = sizes[3];
  const auto read = [&](size_t bytes) {
    std::vector<uint8_t> data(bytes);
    if (std::fread(data.data(), 1, bytes, file) != bytes) std::fprintf(stderr, "%s: truncated\n", path), std::exit(1);
    return data;
  };
  const size_t size = static_cast<size_t>(w.m) * w.k;
  const std::vector<uint8_t> bits = read(size * 2), shift = read(w.m_blocks() * kBlock);
  const std::vector<uint8_t> blocks = read(static_cast<size_t>(w.m_blocks()) * w.k_blocks() * w.block_words * 4);
  const std::vector<uint8_t> overflow = read(w.overflow_length * sizeof(OverflowEntry));
  std::fclose(file);

  Problem p = {};
  p.m = w.m, p.k = w.k;
  p.dense = std::make_unique<DeviceArray<uint16_t>>(size);
  CHECK(cudaMemcpy(p.dense->get(), bits.data(), bits.size(), cudaMemcpyHostToDevice));
  p.encoded = encode_lane_planar(p.dense->get(), w.m, w.k, 0);
  const auto differs = [](const void* device, const std::vector<uint8_t>& host) {
    std::vector<uint8_t> copy(host.size());
    CHECK(cudaMemcpy(copy.data(), device, copy.size(), cudaMemcpyDeviceToHost));
    return copy != host;
  };
  int wrong = p.encoded.matrix.block_words != w.block_words || p.encoded.overflow_entries != w.overflow_length;
  if (!wrong) {
    wrong += differs(p.encoded.shift->get(), shift) + differs(p.encoded.blocks->get(), blocks) + differs(p.encoded.overflow->get(), overflow);
    CHECK(cudaMemcpy(p.encoded.blocks->get(), blocks.data(), blocks.size(), cudaMemcpyHostToDevice));
    wrong += check_decompression(p, stream);
  }
  std::printf("payload M%d K%d %d words, %u overflow entries: %s\n", w.m, w.k, w.block_words, w.overflow_length, wrong ? "WRONG" : "equal");
  return wrong;
}

int check_kernels(const ExponentClasses& classes, const std::string& only, cudaStream_t stream) {
  struct Case {
    int m, k;
    const char* weights;
  };
  int failures = 0;
  for (const Case& c : {Case{256, 256, "patterns"}, Case{8, 64, "patterns"}, Case{64, 64, "gaussian"}, Case{1, 1, "gaussian"}, Case{200, 330, "real"},
                        Case{65, 1096, "patterns"}, Case{1024, 4096, "real"}, Case{1000, 3000, "real"}, Case{4096, 2048, "gaussian"},
                        Case{6144, 4096, "real"}}) {
    const Problem p = make_problem(c.m, c.k, c.weights, classes, 0);
    int wrong = check_decompression(p, stream), checked = 0;
    if (std::string(c.weights) != "patterns") wrong += check_invariance(p, stream);
    double worst = 0;
    for (const int n : {1, 3, 8, 11, 16, 32, 50, 64, 100, 128, 256, 300, 512, 1100})
      if (c.m < 4096 || n == 8 || n == 16 || n == 64) wrong += check_products(p, n, n == 3 ? 1 : 0, only, stream, &worst, &checked);
    std::printf("check %-8s M%-5d K%-5d %.3f bits, escapes %.2f%%, overflowing blocks %.2f%%: %d kernels, worst error %.1e, %d wrong\n", c.weights,
                c.m, c.k, p.encoded.bits_per_weight, 100 * p.encoded.escape_share, 100 * p.encoded.overflowing_blocks, checked, worst, wrong);
    std::fflush(stdout);
    failures += wrong;
  }
  return failures;
}
