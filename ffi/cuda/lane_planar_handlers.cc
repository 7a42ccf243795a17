// The CUDA handlers `jaxzip_lane_planar_{gemm,decompress,take}` (sm_90). Shapes are checked here; what the
// arrays hold was checked when they were built, and the kernels never index memory by it beyond the arrays' lengths.
#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "lane_planar/decompress.h"
#include "lane_planar/matmul.h"
#include "lane_planar/take.h"
#include "lane_planar_operands.h"

namespace jaxzip {
namespace {

namespace lp = lane_planar;

void Check(cudaError_t status) { CheckHopper(status, "use implementation=\"decompress\""); }

// What to run rather than what would be chosen for n rows: what a caller asked for, who hears if that cannot be, or what was measured,
// which may be of another version of the kernels.
std::optional<lp::MatmulConfig> ConfigOf(const lp::Matrix& w, int64_t n, std::string_view name, bool asked_for, bool batch_invariant,
                                         bool raw) {
  if (name.empty()) return std::nullopt;
  if (asked_for) {
    const std::string problem = lp::unusable(w, static_cast<int>(std::min<int64_t>(n, INT32_MAX)), name, batch_invariant, raw);
    if (!problem.empty()) throw InvalidArgument(problem);
  }
  if (batch_invariant || n > lp::kWgmmaMaxN) return std::nullopt;
  std::optional<lp::MatmulConfig> config = lp::parse_config(name, static_cast<int>(n));
  if (config && !lp::fits(w, static_cast<int>(n), *config, raw)) config.reset();
  return config;
}

ffi::Error LanePlanarGemm(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, JAXZIP_LANE_PLANAR_PARAMS,
                          ffi::Buffer<ffi::BF16> bias, ffi::Buffer<ffi::BF16> residual, ffi::Result<ffi::AnyBuffer> out,
                          int64_t m, int64_t k, bool has_bias, bool has_residual, bool gated, bool gelu_tanh, bool batch_invariant,
                          bool raw, std::string_view config_name, bool config_asked_for) {
  return Guard("jaxzip_lane_planar_gemm", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS, raw);
    const Bf16Operand rows("x", x, 2);
    const Operand<char> result("result", *out, 2);
    const bool fp32 = IsFp32(*out);
    int64_t n = rows.core[0];
    rows.ExpectCore("x", {n, k});
    if (gated && (m % (2 * lp::kBlock) || k % 8 || fp32 || has_bias || has_residual || batch_invariant))
      throw InvalidArgument("a gated product is bfloat16, without bias and residual, of M a multiple of 128 and K of 8, and not batch "
                            "invariant; found M=" + std::to_string(m) + ", K=" + std::to_string(k));
    result.ExpectCore("result", {n, gated ? m / 2 : m});
    payload.ExpectBatch(result.batch);
    rows.ExpectBatch("x", result.batch);
    const auto added_bias = OptionalOperand("bias", bias, has_bias, {m}, result.batch);
    const auto added = OptionalOperand("residual", residual, has_residual, {n, m}, result.batch);

    int64_t calls = Product(result.batch);
    const bool one_weight = payload.Unbatched() && rows.batch == result.batch &&
                            (!added_bias || added_bias->Unbatched()) && (!added || added->batch == result.batch);
    // A batch of rows is more rows. One asked for was asked for so many; one measured is for so many, and not for more.
    if (one_weight && calls != 1 && !config_asked_for) n *= calls, calls = std::min<int64_t>(calls, 1), config_name = {};
    if (n > INT32_MAX) throw InvalidArgument("x has more than 2^31 - 1 rows");
    if (n == 0 || calls == 0) return;
    const auto config = ConfigOf(ToMatrix(payload.At(0, result.batch)), n, config_name, config_asked_for, batch_invariant, raw);
    const lp::MatmulOptions options = {batch_invariant, raw, false, false, config ? &*config : nullptr};
    for (int64_t i = 0; i < calls; ++i) {
      const Epilogue epilogue = {
          static_cast<char*>(result.data) + result.BatchIndex(i, result.batch) * result.core_size * (fp32 ? 4 : 2), fp32,
          added_bias ? added_bias->At(i, result.batch) : nullptr, added ? added->At(i, result.batch) : nullptr, gated,
          gelu_tanh ? Activation::gelu_tanh : Activation::silu};
      Check(lp::launch_matmul(ToMatrix(payload.At(i, result.batch)), rows.At(i, result.batch), static_cast<int>(n), epilogue,
                              options, stream));
    }
  });
}

ffi::Error LanePlanarTake(cudaStream_t stream, ffi::Buffer<ffi::S32> ids, JAXZIP_LANE_PLANAR_PARAMS, Bf16Result out,
                          int64_t m, int64_t k) {
  return Guard("jaxzip_lane_planar_take", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS);
    TakeEach(payload, ids, out, k, [&](int64_t i, const Dims& batch, const int32_t* rows, int64_t count, uint16_t* to) {
      if (count > INT32_MAX) throw InvalidArgument("more than 2^31 - 1 ids");
      Check(lp::launch_take(ToMatrix(payload.At(i, batch)), rows, static_cast<int>(count), to, stream));
    });
  });
}

ffi::Error LanePlanarDecompress(cudaStream_t stream, JAXZIP_LANE_PLANAR_PARAMS, Bf16Result out, int64_t m, int64_t k,
                                bool transposed) {
  return Guard("jaxzip_lane_planar_decompress", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS);
    DecompressEach(payload, out, m, k, transposed, [&](int64_t i, const Dims& batch, uint16_t* to) {
      Check(lp::launch_decompress(ToMatrix(payload.At(i, batch)), to, transposed, stream));
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_gemm, LanePlanarGemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .JAXZIP_LANE_PLANAR_BIND.Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("has_residual")
                                  .Attr<bool>("gated")
                                  .Attr<bool>("gelu_tanh")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("raw")
                                  .Attr<std::string_view>("config")
                                  .Attr<bool>("config_asked_for"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_take, LanePlanarTake,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .JAXZIP_LANE_PLANAR_BIND.Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_decompress, LanePlanarDecompress,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .JAXZIP_LANE_PLANAR_BIND.Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
