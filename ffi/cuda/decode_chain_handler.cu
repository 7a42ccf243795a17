// The CUDA handler `jaxzip_decode_chain` (sm_90): a decode step's kernels between one layer's attention and the next's, see
// decode_chain/chain.h. Shapes are checked here; what payloads hold was checked when they were built.
#include <cuda_runtime.h>

#include "decode_chain/chain.h"
#include "epilogue.h"
#include "lane_planar_operands.h"

namespace jaxzip {
namespace {

namespace lp = lane_planar;

// One weight [m, k] of the chain, by the name that errors give it.
lp::Matrix WeightOf(const char* name, int64_t m, int64_t k, const ffi::Buffer<ffi::S8>& shift, const ffi::Buffer<ffi::U32>& blocks,
                    const ffi::Buffer<ffi::U32>& overflow, bool raw) {
  try {
    const LanePlanarOperands operands(m, k, shift, blocks, overflow, raw);
    operands.ExpectBatch({});
    return ToMatrix(operands.At(0, {}));
  } catch (const InvalidArgument& e) {
    throw InvalidArgument(std::string(name) + ": " + e.message);
  }
}

const __nv_bfloat16* Given(const char* name, const ffi::Buffer<ffi::BF16>& buffer, const Dims& shape) {
  const Bf16Operand operand(name, buffer, shape.size());
  operand.ExpectBatch(name, {});
  operand.ExpectCore(name, shape);
  return operand.data;
}

__nv_bfloat16* Made(const char* name, Bf16Result& result, const Dims& shape) {
  const Operand<__nv_bfloat16> operand(name, *result, shape.size());
  operand.ExpectBatch(name, {});
  operand.ExpectCore(name, shape);
  return operand.data;
}

#define JAXZIP_WEIGHT_PARAMS(name) \
  ffi::Buffer<ffi::S8> name##_shift, ffi::Buffer<ffi::U32> name##_blocks, ffi::Buffer<ffi::U32> name##_overflow
#define JAXZIP_MATRIX(name, m, k) WeightOf(#name, m, k, name##_shift, name##_blocks, name##_overflow, raw)

ffi::Error DecodeChain(cudaStream_t stream, ffi::Buffer<ffi::BF16> attended, ffi::Buffer<ffi::BF16> residual,
                       JAXZIP_WEIGHT_PARAMS(o), JAXZIP_WEIGHT_PARAMS(gate_up), JAXZIP_WEIGHT_PARAMS(down),
                       JAXZIP_WEIGHT_PARAMS(tail), ffi::Buffer<ffi::BF16> mlp_scale, ffi::Buffer<ffi::BF16> tail_scale,
                       Bf16Result x1, Bf16Result h1, Bf16Result gu, Bf16Result act, Bf16Result x2, Bf16Result h2,
                       ffi::Result<ffi::AnyBuffer> y, int64_t intermediate, float mlp_eps, float tail_eps, bool batch_invariant,
                       bool raw) {
  return Guard("jaxzip_decode_chain", [&] {
    const Operand<char> result("y", *y, 2), products("gu", *gu, 2);
    result.ExpectBatch("y", {});
    const Bf16Operand rows("attended", attended, 2), hidden_rows("residual", residual, 2);
    const int64_t n = rows.core[0], width = rows.core[1], hidden = hidden_rows.core[1], outputs = result.core[1];
    result.ExpectCore("y", {n, outputs});
    if (n > INT32_MAX) throw InvalidArgument("attended has more than 2^31 - 1 rows");
    const bool gated = products.core[1] == 0;  // SwiGLU is part of its product, which then is not needed
    if (gated && (n > kGatedMaxN || intermediate % lp::kBlock))
      throw InvalidArgument("gu is empty, which needs at most " + std::to_string(kGatedMaxN) + " rows and an intermediate size of whole " +
                            std::to_string(lp::kBlock) + "s; there are " + std::to_string(n) + " and " + std::to_string(intermediate));
    const decode_chain::Chain chain = {
        JAXZIP_MATRIX(o, hidden, width),
        JAXZIP_MATRIX(gate_up, 2 * intermediate, hidden),
        JAXZIP_MATRIX(down, hidden, intermediate),
        JAXZIP_MATRIX(tail, outputs, hidden),
        Given("mlp_scale", mlp_scale, {hidden}),
        Given("tail_scale", tail_scale, {hidden}),
        mlp_eps,
        tail_eps,
        static_cast<int>(n),
        Given("attended", attended, {n, width}),
        Given("residual", residual, {n, hidden}),
        Made("x1", x1, {n, hidden}),
        Made("h1", h1, {n, hidden}),
        gated ? nullptr : Made("gu", gu, {n, 2 * intermediate}),
        Made("act", act, {n, intermediate}),
        Made("x2", x2, {n, hidden}),
        Made("h2", h2, {n, hidden}),
        result.data,
        IsFp32(*y),
    };
    if (n > 0) CheckHopper(launch_chain(chain, {batch_invariant, raw}, stream), "set the model's chain=False");
  });
}

}  // namespace

#define JAXZIP_WEIGHT_BIND Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::U32>>().Arg<ffi::Buffer<ffi::U32>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_decode_chain, DecodeChain,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("intermediate")
                                  .Attr<float>("mlp_eps")
                                  .Attr<float>("tail_eps")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("raw"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
