// What the handlers of the fused matmuls share.
#pragma once
#include <cuda_bf16.h>

#include <optional>

#include "handlers/common.h"

namespace jaxzip {

using Bf16Operand = Operand<const __nv_bfloat16>;

// An operand that may be missing: then it has no elements.
inline std::optional<Bf16Operand> OptionalOperand(const char* name, const ffi::Buffer<ffi::BF16>& buffer, bool given,
                                                  const Dims& core, const Dims& batch) {
  if (!given) return std::nullopt;
  Bf16Operand operand(name, buffer, core.size());
  operand.ExpectCore(name, core);
  operand.ExpectBatch(name, batch);
  return operand;
}

// Whether a result is fp32 rather than bf16; nothing else is computed.
inline bool IsFp32(const ffi::AnyBuffer& result) {
  const auto dtype = result.element_type();
  if (dtype != ffi::BF16 && dtype != ffi::F32) throw InvalidArgument("the result must be bf16 or f32");
  return dtype == ffi::F32;
}

}  // namespace jaxzip
