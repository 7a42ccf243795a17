// The CUDA handler `jaxzip_lane_planar_ragged_gemm` (sm_90): rows grouped by expert times a stack of weights. Only shapes are
// known here: the kernel reads the group sizes, and cuts off those that do not fit.
#include <cuda_runtime.h>

#include "lane_planar/matmul_ragged.h"
#include "lane_planar_operands.h"

namespace jaxzip {
namespace {

namespace lp = lane_planar;

ffi::Error LanePlanarRaggedGemm(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::S32> group_sizes,
                                JAXZIP_LANE_PLANAR_PARAMS, ffi::Result<ffi::AnyBuffer> out, int64_t m, int64_t k, bool raw) {
  return Guard("jaxzip_lane_planar_ragged_gemm", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS, raw);
    const Operand<const int32_t> sizes("group_sizes", group_sizes, group_sizes.dimensions().size());
    const Operand<const __nv_bfloat16> rows("x", x, x.dimensions().size());
    const Operand<char> result("result", *out, out->dimensions().size());
    if (sizes.core.size() != 1) throw InvalidArgument("group_sizes have shape " + Show(sizes.core) + ", expected [E]");
    const int64_t experts = sizes.core[0], n = rows.core.empty() ? 0 : rows.core[0], pitch = (k + 7) / 8 * 8;
    rows.ExpectCore("x", {n, pitch});
    result.ExpectCore("result", {n, m});
    payload.ExpectBatch({experts});
    if (experts < 1 || experts > lp::kRaggedMaxExperts)
      throw InvalidArgument("there are " + std::to_string(experts) + " experts, the kernel takes 1 to " +
                            std::to_string(lp::kRaggedMaxExperts));
    const LanePlanarPayload p = payload.At(0, {experts}), last = payload.At(experts - 1, {experts});
    if (experts > 1 && (p.blocks == last.blocks || p.shift == last.shift || (p.overflow_length && p.overflow == last.overflow)))
      throw InvalidArgument("the weights are not stacked: a dimension of experts is 1");
    if (n > lp::kRaggedMaxRows)
      throw InvalidArgument("x has " + std::to_string(n) + " rows, the kernel takes up to " + std::to_string(lp::kRaggedMaxRows));
    const lp::Stack stack = {ToMatrix(p), static_cast<int>(experts)};
    if (pitch > INT32_MAX) throw InvalidArgument("the CUDA kernels take fewer than 2^31 columns");
    const lp::Groups groups = {rows.data, static_cast<int>(n), static_cast<int>(pitch), sizes.data};
    CheckHopper(lp::launch_matmul_ragged(stack, groups, result.data, IsFp32(*out), lp::choose_ragged(stack, groups.n), stream, raw),
                "use implementation=\"decompress\"");
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_ragged_gemm, LanePlanarRaggedGemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .JAXZIP_LANE_PLANAR_BIND.Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("raw"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
