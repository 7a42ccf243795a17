// The CUDA handler `jaxzip_tca_tbe_matmul`: x [..., N, K] and a payload -> y [..., N, M], decoded in registers.
//
// Operands: x bf16, the payload's eight arrays, bias bf16 [M] and residual bf16 [N, M] (without elements where has_bias,
// has_residual say that there is none). Results: y, bf16 or f32, and a workspace, f32 [workspace_size(M, min(N, 256))],
// see tca_tbe/matmul.h; its content means nothing. More than 256 rows are done 256 at a time.
#include <cuda_runtime.h>

#include <algorithm>

#include "operands.h"
#include "tca_tbe/matmul.h"
#include "tca_tbe/operands.h"

namespace jaxzip {
namespace {

ffi::Error TcaTbeMatmul(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, JAXZIP_PAYLOAD_PARAMS, ffi::Buffer<ffi::BF16> bias,
                        ffi::Buffer<ffi::BF16> residual, ffi::Result<ffi::AnyBuffer> out,
                        ffi::Result<ffi::Buffer<ffi::F32>> workspace, int64_t m, int64_t k, bool has_bias,
                        bool has_residual) {
  return Guard("jaxzip_tca_tbe_matmul", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    const Bf16Operand rows("x", x, 2);
    const Operand<char> result("result", *out, 2);
    const bool fp32 = IsFp32(*out);
    const int64_t n = rows.core[0], calls = Product(result.batch);
    rows.ExpectCore("x", {n, k});
    result.ExpectCore("result", {n, m});
    payload.ExpectBatch(result.batch);
    rows.ExpectBatch("x", result.batch);
    const auto added_bias = OptionalOperand("bias", bias, has_bias, {m}, result.batch);
    const auto added = OptionalOperand("residual", residual, has_residual, {n, m}, result.batch);
    const auto needed = tca_tbe::matmul_workspace(m, static_cast<int>(std::min<int64_t>(n, tca_tbe::kMaxColumns)));
    if (static_cast<int64_t>(workspace->element_count()) < needed)
      throw InvalidArgument("the workspace has " + std::to_string(workspace->element_count()) + " values, needs " +
                            std::to_string(needed));

    for (int64_t i = 0; i < calls; ++i) {
      const Payload weight = payload.At(i, result.batch);
      tca_tbe::ExpectAligned(weight);
      char* y = result.data + result.BatchIndex(i, result.batch) * result.core_size * (fp32 ? 4 : 2);
      for (int64_t first = 0; first < n; first += tca_tbe::kMaxColumns) {
        const int count = static_cast<int>(std::min<int64_t>(n - first, tca_tbe::kMaxColumns));
        const Epilogue epilogue = {y + first * m * (fp32 ? 4 : 2), fp32,
                                            added_bias ? added_bias->At(i, result.batch) : nullptr,
                                            added ? added->At(i, result.batch) + first * m : nullptr};
        tca_tbe::RequireSuccess(tca_tbe::launch_matmul(weight, rows.At(i, result.batch) + first * k, count, epilogue,
                                                       workspace->typed_data(), stream));
      }
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_tca_tbe_matmul, TcaTbeMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .JAXZIP_PAYLOAD_BIND.Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("has_residual"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
