// Moves a 64x64 tile between a strided matrix and scratch that holds it FragTile by FragTile.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa/lines.h"
#include "jaxzip/layout.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace jaxzip {
namespace {

// FragTile at (outer, inner) in units of 8, where the matrix is contiguous along `inner`: outer is m and
// inner k, or, transposed, the other way round.
inline int64_t FragAt(int outer, int inner, bool transposed) {
  return (transposed ? layout::FragIndex(inner, outer) : layout::FragIndex(outer, inner)) * layout::kFragSize;
}

#if defined(__AVX512BW__)
// 4x4 transpose of 128-bit lanes: v[i] lane j <-> v[j] lane i.
inline void TransposeLanes(__m512i v[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
  const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}
#endif

// scratch (each FragTile with its `inner` direction contiguous) -> out[outer * stride + inner]. kStream: see StreamLines;
// not with AVX-512, where nobody has measured it.
template <bool kStream>
inline void StoreTile(const uint16_t* scratch, uint16_t* out, int64_t stride, bool transposed) {
  for (int o = 0; o < 8; ++o) {
#if defined(__AVX512BW__)
    for (int h = 0; h < 4; ++h) {  // rows 4 * (h & 1).. of the FragTiles, columns 32 * (h >> 1)..
      __m512i v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_load_si512(scratch + FragAt(o, (h >> 1) * 4 + i, transposed) + (h & 1) * 32);
      }
      TransposeLanes(v);
      for (int r = 0; r < 4; ++r) {
        _mm512_storeu_si512(out + (o * 8 + (h & 1) * 4 + r) * stride + (h >> 1) * 32, v[r]);
      }
    }
#else
    alignas(64) uint16_t lines[8 * layout::kBlock];
    for (int i = 0; i < 8; ++i) {
      const uint16_t* frag = scratch + FragAt(o, i, transposed);
      for (int r = 0; r < 8; ++r) std::memcpy(lines + r * layout::kBlock + i * 8, frag + r * 8, 16);
    }
    if (kStream) {
      StreamLines(lines, out + o * 8 * stride, stride);
    } else {
      CopyLines(lines, layout::kBlock, out + o * 8 * stride, stride, 8, layout::kBlock);
    }
#endif
  }
}

// The inverse of StoreTile.
inline void LoadTile(const uint16_t* src, int64_t stride, bool transposed, uint16_t* scratch) {
  for (int o = 0; o < 8; ++o) {
#if defined(__AVX512BW__)
    for (int h = 0; h < 4; ++h) {
      __m512i v[4];
      for (int r = 0; r < 4; ++r) {
        v[r] = _mm512_loadu_si512(src + (o * 8 + (h & 1) * 4 + r) * stride + (h >> 1) * 32);
      }
      TransposeLanes(v);
      for (int i = 0; i < 4; ++i) {
        _mm512_store_si512(scratch + FragAt(o, (h >> 1) * 4 + i, transposed) + (h & 1) * 32, v[i]);
      }
    }
#else
    for (int r = 0; r < 8; ++r) {
      for (int i = 0; i < 8; ++i) {
        std::memcpy(scratch + FragAt(o, i, transposed) + r * 8, src + (o * 8 + r) * stride + i * 8, 16);
      }
    }
#endif
  }
}

}  // namespace
}  // namespace jaxzip
