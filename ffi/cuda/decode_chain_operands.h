// What the handlers of a decode step's chain share: its weights, results and attributes, which each takes behind those of its own.
#pragma once
#include <cuda_runtime.h>

#include "decode_chain/chain.h"
#include "epilogue.h"
#include "lane_planar_operands.h"

namespace jaxzip {

// The data of an argument of this shape, by the name that errors give it.
template <class T = __nv_bfloat16, class Buffer>
const T* Given(const char* name, const Buffer& buffer, const Dims& shape) {
  const Operand<const T> operand(name, buffer, shape.size());
  operand.ExpectBatch(name, {});
  operand.ExpectCore(name, shape);
  return operand.data;
}

inline __nv_bfloat16* Made(const char* name, Bf16Result& result, const Dims& shape) {
  const Operand<__nv_bfloat16> operand(name, *result, shape.size());
  operand.ExpectBatch(name, {});
  operand.ExpectCore(name, shape);
  return operand.data;
}

// One weight [m, k] of the chain, by the name that errors give it.
inline lane_planar::Matrix WeightOf(const char* name, int64_t m, int64_t k, const ffi::Buffer<ffi::S8>& shift,
                                    const ffi::Buffer<ffi::U32>& blocks, const ffi::Buffer<ffi::U32>& overflow, bool raw) {
  try {
    const LanePlanarOperands operands(m, k, shift, blocks, overflow, raw);
    operands.ExpectBatch({});
    return ToMatrix(operands.At(0, {}));
  } catch (const InvalidArgument& e) {
    throw InvalidArgument(std::string(name) + ": " + e.message);
  }
}

// A norm behind o_proj or down_proj and the product that it is of, both given or neither.
struct Behind {
  const __nv_bfloat16* scale = nullptr;
  __nv_bfloat16* product = nullptr;
};

inline Behind BehindOf(const char* scale_name, const char* product_name, const ffi::RemainingArgs& scales, ffi::RemainingRets products,
                       size_t i, int64_t n, int64_t hidden) {
  if (scales.empty() && products.empty()) return {};
  if (scales.size() != 2 || products.size() != 2)
    throw InvalidArgument("norms behind o_proj and down_proj need two scales and two products, there are " + std::to_string(scales.size()) +
                          " and " + std::to_string(products.size()));
  const auto scale = scales.get<ffi::Buffer<ffi::BF16>>(i);
  auto product = products.get<ffi::Buffer<ffi::BF16>>(i);
  if (!scale || !product) throw InvalidArgument(std::string(scale_name) + " and " + product_name + " must be bf16");
  return {Given(scale_name, *scale, {hidden}), Made(product_name, *product, {n, hidden})};
}

#define JAXZIP_WEIGHT_PARAMS(name) \
  const ffi::Buffer<ffi::S8>&name##_shift, const ffi::Buffer<ffi::U32>&name##_blocks, const ffi::Buffer<ffi::U32>&name##_overflow
#define JAXZIP_MATRIX(name, m, k) WeightOf(#name, m, k, name##_shift, name##_blocks, name##_overflow, raw)

// Launches a chain on attended[n, width], which `attention` writes first if there is one. All from `residual` on is what
// JAXZIP_CHAIN_BIND binds. Shapes are checked here; what payloads hold was checked when they were built.
inline void LaunchChain(cudaStream_t stream, const decode_chain::Attention* attention, const __nv_bfloat16* attended, int64_t n,
                        int64_t width, const ffi::Buffer<ffi::BF16>& residual, JAXZIP_WEIGHT_PARAMS(o), JAXZIP_WEIGHT_PARAMS(gate_up),
                        JAXZIP_WEIGHT_PARAMS(down), JAXZIP_WEIGHT_PARAMS(tail), const ffi::Buffer<ffi::BF16>& mlp_scale,
                        const ffi::Buffer<ffi::BF16>& tail_scale, ffi::RemainingArgs scales_behind, Bf16Result x1, Bf16Result h1,
                        Bf16Result gu, Bf16Result act, Bf16Result x2, Bf16Result h2, ffi::Result<ffi::AnyBuffer> y,
                        ffi::RemainingRets products_behind, int64_t intermediate, float mlp_eps, float tail_eps, float o_eps,
                        float down_eps, float norm_offset, bool gelu_tanh, bool batch_invariant, bool raw) {
  const Operand<char> result("y", *y, 2), products("gu", *gu, 2);
  result.ExpectBatch("y", {});
  const Bf16Operand hidden_rows("residual", residual, 2);
  const int64_t hidden = hidden_rows.core[1], outputs = result.core[1];
  result.ExpectCore("y", {n, outputs});
  if (n > INT32_MAX) throw InvalidArgument("attended has more than 2^31 - 1 rows");
  const bool gated = products.core[1] == 0;  // the activation is part of its product, which then is not needed
  if (gated && (n > kGatedMaxN || intermediate % lane_planar::kBlock))
    throw InvalidArgument("gu is empty, which needs at most " + std::to_string(kGatedMaxN) + " rows and an intermediate size of whole " +
                          std::to_string(lane_planar::kBlock) + "s; there are " + std::to_string(n) + " and " + std::to_string(intermediate));
  const Behind o = BehindOf("o_scale", "o", scales_behind, products_behind, 0, n, hidden);
  const Behind down = BehindOf("down_scale", "d", scales_behind, products_behind, 1, n, hidden);
  const decode_chain::Chain chain = {
      JAXZIP_MATRIX(o, hidden, width),
      JAXZIP_MATRIX(gate_up, 2 * intermediate, hidden),
      JAXZIP_MATRIX(down, hidden, intermediate),
      JAXZIP_MATRIX(tail, outputs, hidden),
      {Given("mlp_scale", mlp_scale, {hidden}), mlp_eps},
      {Given("tail_scale", tail_scale, {hidden}), tail_eps},
      static_cast<int>(n),
      attended,
      Given("residual", residual, {n, hidden}),
      Made("x1", x1, {n, hidden}),
      Made("h1", h1, {n, hidden}),
      gated ? nullptr : Made("gu", gu, {n, 2 * intermediate}),
      Made("act", act, {n, intermediate}),
      Made("x2", x2, {n, hidden}),
      Made("h2", h2, {n, hidden}),
      result.data,
      IsFp32(*y),
      gelu_tanh ? Activation::gelu_tanh : Activation::silu,
      norm_offset,
      {o.scale, o_eps},
      {down.scale, down_eps},
      o.product,
      down.product,
      attention,
  };
  if (n > 0) CheckHopper(launch_chain(chain, {batch_invariant, raw}, stream), "set the model's chain=False");
}

#undef JAXZIP_WEIGHT_PARAMS
#undef JAXZIP_MATRIX

#define JAXZIP_WEIGHT_BIND Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::U32>>().Arg<ffi::Buffer<ffi::U32>>()
#define JAXZIP_CHAIN_BIND \
  Arg<ffi::Buffer<ffi::BF16>>() \
      .JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND.JAXZIP_WEIGHT_BIND \
      .Arg<ffi::Buffer<ffi::BF16>>() \
      .Arg<ffi::Buffer<ffi::BF16>>() \
      .RemainingArgs() \
      .Ret<ffi::Buffer<ffi::BF16>>() \
      .Ret<ffi::Buffer<ffi::BF16>>() \
      .Ret<ffi::Buffer<ffi::BF16>>() \
      .Ret<ffi::Buffer<ffi::BF16>>() \
      .Ret<ffi::Buffer<ffi::BF16>>() \
      .Ret<ffi::Buffer<ffi::BF16>>() \
      .Ret<ffi::AnyBuffer>() \
      .RemainingRets() \
      .Attr<int64_t>("intermediate") \
      .Attr<float>("mlp_eps") \
      .Attr<float>("tail_eps") \
      .Attr<float>("o_eps") \
      .Attr<float>("down_eps") \
      .Attr<float>("norm_offset") \
      .Attr<bool>("gelu_tanh") \
      .Attr<bool>("batch_invariant") \
      .Attr<bool>("raw")

}  // namespace jaxzip
