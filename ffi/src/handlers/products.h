// What the CPU handlers of matmul and of its grouped form share: dtypes, the dense weight, scratch for x.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "handlers/common.h"

namespace jaxzip {

inline bool IsF32(const char* name, const ffi::AnyBuffer& b) {
  if (b.element_type() == ffi::F32) return true;
  if (b.element_type() == ffi::BF16) return false;
  throw InvalidArgument(std::string(name) + " must be bfloat16 or float32");
}

using Scratch = std::unique_ptr<float, void (*)(void*)>;

// malloc, not a vector: the memory needs no zeros.
inline Scratch AllocateScratch(int64_t floats) {
  Scratch scratch(static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(floats))), std::free);
  if (!scratch) throw std::bad_alloc();
  return scratch;
}

// Dense weights [..., M, K] (rows_first) or [..., K, M].
struct RawOperand {
  const Operand<const uint16_t> values;
  const int64_t m, k;
  const bool rows_first;

  RawOperand(const ffi::Buffer<ffi::BF16>& w, int64_t m, int64_t k, bool rows_first)
      : values("w", Checked(w, m, k), 2), m(m), k(k), rows_first(rows_first) {
    values.ExpectCore("w", rows_first ? Dims{m, k} : Dims{k, m});
  }
  Weight At(int64_t i, const Dims& batch) const {
    return {nullptr, nullptr, values.At(i, batch), m, k, rows_first ? k : 1, rows_first ? 1 : m};
  }

 private:
  static const ffi::Buffer<ffi::BF16>& Checked(const ffi::Buffer<ffi::BF16>& w, int64_t m, int64_t k) {
    if (!layout::ValidSizes(m, k))
      throw InvalidArgument("m and k must be from 1 to 2**31, are " + std::to_string(m) + " and " + std::to_string(k));
    return w;
  }
};

}  // namespace jaxzip
