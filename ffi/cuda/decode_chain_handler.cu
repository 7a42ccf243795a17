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

// Attention's output: the operands behind all others, and the result behind all others where it is put together here.
struct Attention {
  int64_t width;
  const __nv_bfloat16* whole = nullptr;
  decode_chain::AttentionChunks chunks = {};
};

template <class Found>
auto Checked(const char* name, Found found) {
  if (!found.has_value()) throw InvalidArgument(std::string(name) + ": " + found.error().message());
  return *found;
}

template <ffi::DataType dtype, class T>
const T* ChunksOf(const char* name, const ffi::RemainingArgs& operands, size_t index, const Dims& shape) {
  const Operand<const T> operand(name, Checked(name, operands.get<ffi::Buffer<dtype>>(index)), shape.size());
  operand.ExpectBatch(name, {});
  operand.ExpectCore(name, shape);
  return operand.data;
}

Attention ToAttention(int64_t n, ffi::RemainingArgs operands, ffi::RemainingRets results, int64_t chunk_slots, int64_t window) {
  const bool whole = chunk_slots == 0;
  if (operands.size() != (whole ? 1 : 5) || results.size() != (whole ? 0 : 1))
    throw InvalidArgument("attention is one operand, or five and a result; there are " + std::to_string(operands.size()) + " and " +
                          std::to_string(results.size()));
  if (whole) {
    const auto attended = Checked("attended", operands.get<ffi::Buffer<ffi::BF16>>(0));
    const int64_t width = Bf16Operand("attended", attended, 2).core[1];
    return {width, Given("attended", attended, {n, width})};
  }
  const Dims shape = Operand<const float>("sums", Checked("sums", operands.get<ffi::Buffer<ffi::F32>>(0)), 5).core;
  const int64_t kv_heads = shape[1], chunks = shape[2], group = shape[3], head_dim = shape[4], width = kv_heads * group * head_dim;
  if (chunk_slots < 0 || chunk_slots > INT32_MAX || window < 0 || window > INT32_MAX || chunks > INT32_MAX || n * width > INT32_MAX)
    throw InvalidArgument("attention's chunks are more than 2^31 - 1, or have so many slots or results");
  auto gathered = Checked("gathered", results.get<ffi::Buffer<ffi::BF16>>(0));
  return {width, nullptr,
          {ChunksOf<ffi::F32, float>("sums", operands, 0, {n, kv_heads, chunks, group, head_dim}),
           ChunksOf<ffi::F32, float>("largest", operands, 1, {n, kv_heads, group, chunks}),
           ChunksOf<ffi::F32, float>("total", operands, 2, {n, kv_heads, group, chunks}),
           ChunksOf<ffi::S32, int32_t>("start", operands, 3, {n}),
           ChunksOf<ffi::S32, int32_t>("own", operands, 4, {1}),
           static_cast<int>(kv_heads), static_cast<int>(group), static_cast<int>(chunks), static_cast<int>(head_dim),
           static_cast<int>(chunk_slots), static_cast<int>(window), Made("gathered", gathered, {n, width})}};
}

#define JAXZIP_WEIGHT_PARAMS(name) \
  ffi::Buffer<ffi::S8> name##_shift, ffi::Buffer<ffi::U32> name##_blocks, ffi::Buffer<ffi::U32> name##_overflow
#define JAXZIP_MATRIX(name, m, k) WeightOf(#name, m, k, name##_shift, name##_blocks, name##_overflow, raw)

ffi::Error DecodeChain(cudaStream_t stream, ffi::Buffer<ffi::BF16> residual, JAXZIP_WEIGHT_PARAMS(o),
                       JAXZIP_WEIGHT_PARAMS(gate_up), JAXZIP_WEIGHT_PARAMS(down), JAXZIP_WEIGHT_PARAMS(tail),
                       ffi::Buffer<ffi::BF16> mlp_scale, ffi::Buffer<ffi::BF16> tail_scale, ffi::RemainingArgs attention,
                       Bf16Result x1, Bf16Result h1, Bf16Result gu, Bf16Result act, Bf16Result x2, Bf16Result h2,
                       ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets gathered, int64_t intermediate, float mlp_eps,
                       float tail_eps, bool batch_invariant, bool raw, int64_t chunk_slots, int64_t window) {
  return Guard("jaxzip_decode_chain", [&] {
    const Operand<char> result("y", *y, 2), products("gu", *gu, 2);
    result.ExpectBatch("y", {});
    const Bf16Operand rows("residual", residual, 2);
    const int64_t n = rows.core[0], hidden = rows.core[1], outputs = result.core[1];
    result.ExpectCore("y", {n, outputs});
    if (n > INT32_MAX) throw InvalidArgument("residual has more than 2^31 - 1 rows");
    const Attention attended = ToAttention(n, attention, gathered, chunk_slots, window);
    const bool gated = products.core[1] == 0;  // SwiGLU is part of its product, which then is not needed
    if (gated && (n > kGatedMaxN || intermediate % lp::kBlock))
      throw InvalidArgument("gu is empty, which needs at most " + std::to_string(kGatedMaxN) + " rows and an intermediate size of whole " +
                            std::to_string(lp::kBlock) + "s; there are " + std::to_string(n) + " and " + std::to_string(intermediate));
    const decode_chain::Chain chain = {
        JAXZIP_MATRIX(o, hidden, attended.width),
        JAXZIP_MATRIX(gate_up, 2 * intermediate, hidden),
        JAXZIP_MATRIX(down, hidden, intermediate),
        JAXZIP_MATRIX(tail, outputs, hidden),
        Given("mlp_scale", mlp_scale, {hidden}),
        Given("tail_scale", tail_scale, {hidden}),
        mlp_eps,
        tail_eps,
        static_cast<int>(n),
        attended.whole,
        Given("residual", residual, {n, hidden}),
        Made("x1", x1, {n, hidden}),
        Made("h1", h1, {n, hidden}),
        gated ? nullptr : Made("gu", gu, {n, 2 * intermediate}),
        Made("act", act, {n, intermediate}),
        Made("x2", x2, {n, hidden}),
        Made("h2", h2, {n, hidden}),
        result.data,
        IsFp32(*y),
        chunk_slots == 0 ? nullptr : &attended.chunks,
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
                                  .JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("intermediate")
                                  .Attr<float>("mlp_eps")
                                  .Attr<float>("tail_eps")
                                  .Attr<bool>("batch_invariant")
                                  .Attr<bool>("raw")
                                  .Attr<int64_t>("chunk_slots")
                                  .Attr<int64_t>("window"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
