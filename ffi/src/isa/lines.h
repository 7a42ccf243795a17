// Copies lines of up to 64 elements between strided matrices, through the cache or past it.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa/vec128.h"
#include "jaxzip/layout.h"

namespace jaxzip {
namespace {

// `lines` lines of `length` elements from one matrix to another.
inline void CopyLines(const uint16_t* src, int64_t src_stride, uint16_t* dst, int64_t dst_stride, int64_t lines,
                      int64_t length) {
  if (length == layout::kBlock) {
    for (int64_t i = 0; i < lines; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, 2 * layout::kBlock);
  } else {
    for (int64_t i = 0; i < lines; ++i) {
      std::memcpy(dst + i * dst_stride, src + i * src_stride, static_cast<size_t>(length) * 2);
    }
  }
}

// Copies eight lines of 64 elements past the cache, which lines of a large matrix would only push each other out of
// (measured: twice as fast). StreamFence() orders them before what other threads see next.
inline void StreamLines(const uint16_t* src, uint16_t* dst, int64_t dst_stride) {
#if defined(__SSE2__)
  if ((reinterpret_cast<uintptr_t>(dst) | static_cast<uintptr_t>(2 * dst_stride)) % 64 == 0) {
    for (int i = 0; i < 8; ++i, src += layout::kBlock, dst += dst_stride) {
      for (int c = 0; c < layout::kBlock; c += 8) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(dst + c), LoadVec<__m128i>(src + c));
      }
    }
    return;
  }
#endif
  CopyLines(src, layout::kBlock, dst, dst_stride, 8, layout::kBlock);
}

inline void StreamFence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace jaxzip
