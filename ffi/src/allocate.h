// Memory for large results.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "codec.h"

namespace jaxzip {

template <typename T>
Array<T> Allocate(int64_t size) {
  constexpr size_t kAlign = 64, kHuge = size_t{2} << 20;
  const size_t bytes = static_cast<size_t>(size) * sizeof(T), align = bytes >= 2 * kHuge ? kHuge : kAlign;
  const auto padded = layout::RoundUp(static_cast<int64_t>(std::max<size_t>(bytes, 1)), static_cast<int64_t>(align));
  void* p = std::aligned_alloc(align, static_cast<size_t>(padded));
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  if (align == kHuge) madvise(p, bytes, MADV_HUGEPAGE);  // a page fault per 4 KiB would cost as much as encoding
#endif
  Array<T> a;
  a.data = {static_cast<T*>(p), std::free};
  a.size = size;
  return a;
}

}  // namespace jaxzip
