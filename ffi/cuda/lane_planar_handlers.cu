// The CUDA handlers `jaxzip_lane_planar_{gemm,decompress,take}` (sm_90). Shapes are checked here; what the
// arrays hold was checked when they were built, and the kernels never index memory by it beyond the arrays' lengths.
#include <cuda_runtime.h>

#include <algorithm>

#include "lane_planar/decompress.h"
#include "lane_planar/matmul.h"
#include "lane_planar/take.h"
#include "lane_planar_operands.h"

namespace jaxzip {
namespace {

namespace lp = lane_planar;

void Check(cudaError_t status) { CheckHopper(status, "use implementation=\"decompress\""); }

ffi::Error LanePlanarGemm(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, JAXZIP_LANE_PLANAR_PARAMS,
                          ffi::Buffer<ffi::BF16> bias, ffi::Buffer<ffi::BF16> residual, ffi::Result<ffi::AnyBuffer> out,
                          int64_t m, int64_t k, bool has_bias, bool has_residual, bool batch_invariant, bool raw) {
  return Guard("jaxzip_lane_planar_gemm", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS, raw);
    const Bf16Operand rows("x", x, 2);
    const Operand<char> result("result", *out, 2);
    const bool fp32 = IsFp32(*out);
    int64_t n = rows.core[0];
    rows.ExpectCore("x", {n, k});
    result.ExpectCore("result", {n, m});
    payload.ExpectBatch(result.batch);
    rows.ExpectBatch("x", result.batch);
    const auto added_bias = OptionalOperand("bias", bias, has_bias, {m}, result.batch);
    const auto added = OptionalOperand("residual", residual, has_residual, {n, m}, result.batch);

    int64_t calls = Product(result.batch);
    const bool one_weight = payload.Unbatched() && rows.batch == result.batch &&
                            (!added_bias || added_bias->Unbatched()) && (!added || added->batch == result.batch);
    if (one_weight) n *= calls, calls = std::min<int64_t>(calls, 1);  // a batch of rows is more rows
    if (n > INT32_MAX) throw InvalidArgument("x has more than 2^31 - 1 rows");
    if (n == 0) return;
    for (int64_t i = 0; i < calls; ++i) {
      const Epilogue epilogue = {
          static_cast<char*>(result.data) + result.BatchIndex(i, result.batch) * result.core_size * (fp32 ? 4 : 2), fp32,
          added_bias ? added_bias->At(i, result.batch) : nullptr, added ? added->At(i, result.batch) : nullptr};
      Check(lp::launch_matmul(ToMatrix(payload.At(i, result.batch)), rows.At(i, result.batch), static_cast<int>(n), epilogue,
                              {batch_invariant, raw}, stream));
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
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("raw"),
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
