// Vectors of 16 bytes in the compiler's own notation: every machine that we build for has them.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jaxzip {
namespace {

typedef uint32_t U32x4 __attribute__((vector_size(16)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));

template <typename V>
inline V LoadVec(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
inline void StoreVec(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Lanes of the concatenation (a, b) by number; GCC before 12 has to find the instruction by itself.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define JAXZIP_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define JAXZIP_SHUFFLE8(a, b, i, j, k, l, m, n, o, p) __builtin_shufflevector(a, b, i, j, k, l, m, n, o, p)
#endif
#endif
#if !defined(JAXZIP_SHUFFLE4)
#define JAXZIP_SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, U32x4{__VA_ARGS__})
#define JAXZIP_SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, U16x8{__VA_ARGS__})
#endif

inline U32x4 UnpackLo(U32x4 a, U32x4 b) { return JAXZIP_SHUFFLE4(a, b, 0, 4, 1, 5); }
inline U32x4 UnpackHi(U32x4 a, U32x4 b) { return JAXZIP_SHUFFLE4(a, b, 2, 6, 3, 7); }
inline U16x8 UnpackLo(U16x8 a, U16x8 b) { return JAXZIP_SHUFFLE8(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline U16x8 UnpackHi(U16x8 a, U16x8 b) { return JAXZIP_SHUFFLE8(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline U32x4 UnpackLo64(U32x4 a, U32x4 b) { return JAXZIP_SHUFFLE4(a, b, 0, 1, 4, 5); }
inline U32x4 UnpackHi64(U32x4 a, U32x4 b) { return JAXZIP_SHUFFLE4(a, b, 2, 3, 6, 7); }
inline U32x4 EvenLanes(U32x4 a, U32x4 b) { return JAXZIP_SHUFFLE4(a, b, 0, 2, 4, 6); }
inline U32x4 OddLanes(U32x4 a, U32x4 b) { return JAXZIP_SHUFFLE4(a, b, 1, 3, 5, 7); }

// v[i] lane j <-> v[j] lane i.
inline void Transpose4x4(U32x4 v[4]) {
  const U32x4 a = UnpackLo(v[0], v[1]), b = UnpackHi(v[0], v[1]), c = UnpackLo(v[2], v[3]), d = UnpackHi(v[2], v[3]);
  v[0] = UnpackLo64(a, c);
  v[1] = UnpackHi64(a, c);
  v[2] = UnpackLo64(b, d);
  v[3] = UnpackHi64(b, d);
}

// dst[j * dst_stride + i] = src[i * src_stride + j] for an 8x8 tile.
inline void Transpose8x8(const uint16_t* src, int64_t src_stride, uint16_t* dst, int64_t dst_stride) {
  U16x8 v[8], a[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = LoadVec<U16x8>(src + i * src_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = UnpackLo(v[2 * i], v[2 * i + 1]);      // 16-bit pairs of rows 2i, 2i+1: columns 0..3
    a[2 * i + 1] = UnpackHi(v[2 * i], v[2 * i + 1]);  // columns 4..7
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    U32x4 w[4] = {(U32x4)a[h], (U32x4)a[2 + h], (U32x4)a[4 + h], (U32x4)a[6 + h]};
    Transpose4x4(w);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) StoreVec(dst + (4 * h + i) * dst_stride, w[i]);
  }
}

// Bit i is set where the i-th byte is not zero.
inline uint32_t NonzeroMask(U32x4 v) {
#if defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8((__m128i)v, _mm_setzero_si128()))) ^ 0xFFFFu;
#else
  uint8_t bytes[16];
  StoreVec(bytes, v);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint32_t>(bytes[i] != 0) << i;
  return mask;
#endif
}

}  // namespace
}  // namespace jaxzip
