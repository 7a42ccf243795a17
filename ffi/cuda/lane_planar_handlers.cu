// The CUDA handlers `jaxzip_lane_planar_matmul` and `jaxzip_lane_planar_decompress` (sm_90). Shapes are checked here; what the
// arrays hold was checked when they were built, and the kernels never index memory by it beyond the arrays' lengths.
#include <cuda_runtime.h>

#include <algorithm>
#include <optional>

#include "decompress.h"
#include "handlers/common.h"
#include "matmul.h"

namespace jaxzip {
namespace {

namespace lp = lane_planar;

void Check(cudaError_t status) {
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    throw std::runtime_error("these kernels need a Hopper GPU (compute capability 9.0); use implementation=\"decompress\"");
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// The payload operands of one call; `raw` is bf16 in fragment order, 2048 words a block, without shifts and overflow.
class LanePlanarOperands {
 public:
  LanePlanarOperands(int64_t m, int64_t k, bool raw, const ffi::Buffer<ffi::S8>& shift,
                     const ffi::Buffer<ffi::U32>& blocks, const ffi::Buffer<ffi::U32>& overflow)
      : m_(m), k_(k), shift_("shift", shift, 1), blocks_("blocks", blocks, 3), overflow_("overflow", overflow, 1) {
    if (m < 1 || k < 1 || m > INT32_MAX || k > INT32_MAX)
      throw InvalidArgument("m and k must be in 1..2^31 - 1, are " + std::to_string(m) + " and " + std::to_string(k));
    const int64_t rows = (m + lp::kBlock - 1) / lp::kBlock, columns = (k + lp::kBlock - 1) / lp::kBlock;
    const int64_t width = blocks_.core[2];
    const bool known = raw ? width == lp::kBlock * lp::kBlock / 2
                           : std::find(std::begin(lp::kBlockWidths), std::end(lp::kBlockWidths), width) !=
                                 std::end(lp::kBlockWidths);
    if (!known) throw InvalidArgument("blocks have " + std::to_string(width) + " words, which no layout has");
    blocks_.ExpectCore("blocks", {rows, columns, width});
    shift_.ExpectCore("shift", {rows * lp::kBlock});
    if (overflow_.core[0] % 2 || overflow_.core[0] / 2 > INT32_MAX)
      throw InvalidArgument("overflow has " + std::to_string(overflow_.core[0]) + " words, expected pairs");
  }

  void ExpectBatch(const Dims& full) const {
    shift_.ExpectBatch("shift", full);
    blocks_.ExpectBatch("blocks", full);
    overflow_.ExpectBatch("overflow", full);
  }
  bool Unbatched() const { return shift_.Unbatched() && blocks_.Unbatched() && overflow_.Unbatched(); }

  lp::Matrix At(int64_t i, const Dims& full) const {
    return {blocks_.At(i, full),
            reinterpret_cast<const lp::OverflowEntry*>(overflow_.At(i, full)),
            shift_.At(i, full),
            static_cast<uint32_t>(overflow_.core[0] / 2),
            static_cast<int>(blocks_.core[2]),
            static_cast<int>(m_),
            static_cast<int>(k_)};
  }

 private:
  int64_t m_, k_;
  Operand<const int8_t> shift_;
  Operand<const uint32_t> blocks_, overflow_;
};

// An operand that may be missing: then it has no elements.
std::optional<Operand<const __nv_bfloat16>> Optional(const char* name, const ffi::Buffer<ffi::BF16>& buffer, bool given,
                                                     const Dims& core) {
  if (!given) return std::nullopt;
  Operand<const __nv_bfloat16> operand(name, buffer, core.size());
  operand.ExpectCore(name, core);
  return operand;
}

ffi::Error LanePlanarMatmul(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::S8> shift, ffi::Buffer<ffi::U32> blocks,
                  ffi::Buffer<ffi::U32> overflow, ffi::Buffer<ffi::BF16> bias, ffi::Buffer<ffi::BF16> residual,
                  ffi::Result<ffi::AnyBuffer> out, int64_t m, int64_t k, bool has_bias, bool has_residual,
                  bool batch_invariant, bool raw) {
  return Guard("jaxzip_lane_planar_matmul", [&] {
    const LanePlanarOperands payload(m, k, raw, shift, blocks, overflow);
    const Operand<const __nv_bfloat16> rows("x", x, 2);
    const Operand<char> result("result", *out, 2);
    const auto dtype = out->element_type();
    if (dtype != ffi::BF16 && dtype != ffi::F32) throw InvalidArgument("the result must be bf16 or f32");
    int64_t n = rows.core[0];
    rows.ExpectCore("x", {n, k});
    result.ExpectCore("result", {n, m});
    const auto added_bias = Optional("bias", bias, has_bias, {m});
    const auto added = Optional("residual", residual, has_residual, {n, m});
    payload.ExpectBatch(result.batch);
    rows.ExpectBatch("x", result.batch);
    if (added_bias) added_bias->ExpectBatch("bias", result.batch);
    if (added) added->ExpectBatch("residual", result.batch);

    int64_t calls = Product(result.batch);
    const bool one_weight = payload.Unbatched() && rows.batch == result.batch &&
                            (!added_bias || added_bias->Unbatched()) && (!added || added->batch == result.batch);
    if (one_weight) n *= calls, calls = std::min<int64_t>(calls, 1);  // a batch of rows is more rows
    if (n > INT32_MAX) throw InvalidArgument("x has more than 2^31 - 1 rows");
    if (n == 0) return;
    const bool fp32 = dtype == ffi::F32;
    for (int64_t i = 0; i < calls; ++i) {
      const lp::Epilogue epilogue = {
          static_cast<char*>(result.data) + result.BatchIndex(i, result.batch) * result.core_size * (fp32 ? 4 : 2), fp32,
          added_bias ? added_bias->At(i, result.batch) : nullptr, added ? added->At(i, result.batch) : nullptr};
      Check(lp::launch_matmul(payload.At(i, result.batch), rows.At(i, result.batch), static_cast<int>(n), epilogue,
                              {batch_invariant, raw}, stream));
    }
  });
}

ffi::Error LanePlanarDecompress(cudaStream_t stream, ffi::Buffer<ffi::S8> shift, ffi::Buffer<ffi::U32> blocks,
                      ffi::Buffer<ffi::U32> overflow, ffi::Result<ffi::Buffer<ffi::BF16>> out, int64_t m, int64_t k,
                      bool transposed) {
  return Guard("jaxzip_lane_planar_decompress", [&] {
    const LanePlanarOperands payload(m, k, false, shift, blocks, overflow);
    const Operand<uint16_t> result("result", *out, 2);
    result.ExpectCore("result", transposed ? Dims{k, m} : Dims{m, k});
    payload.ExpectBatch(result.batch);
    for (int64_t i = 0; i < Product(result.batch); ++i)
      Check(lp::launch_decompress(payload.At(i, result.batch), result.At(i, result.batch), transposed, stream));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_matmul, LanePlanarMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("has_bias")
                                  .Attr<bool>("has_residual")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("raw"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_decompress, LanePlanarDecompress,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
