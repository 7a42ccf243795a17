// The few vector operations the matrix product needs, at the native width of each level.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jaxzip {
namespace {

// Lanes are 32 bits and hold two neighbouring bf16: LoadEven and LoadOdd widen the first or the second of
// each. BroadcastPair repeats two floats. MulAdd is fused where the hardware has it: products of bf16 are
// exact in fp32 either way.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxRows = 8;  // rows of x in registers: 2 accumulators each, of 32 registers
using Vec = __m512;
inline Vec LoadEven(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_load_si512(p), 16));
}
inline Vec LoadOdd(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_load_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Vec BroadcastPair(const float* p) {
  double d;
  std::memcpy(&d, p, 8);
  return _mm512_castpd_ps(_mm512_set1_pd(d));
}
inline Vec MulAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMaxRows = 2;  // of 3 accumulators spill: 2.2 instead of 1.6 ns a FragTile and row of x
using Vec = __m256;
inline Vec LoadEven(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
inline Vec LoadOdd(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
                                              _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Vec BroadcastPair(const float* p) {
  double d;
  std::memcpy(&d, p, 8);
  return _mm256_castpd_ps(_mm256_set1_pd(d));
}
inline Vec MulAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
#else
constexpr int kLanes = 4;
constexpr int kMaxRows = 1;
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t VecBits __attribute__((vector_size(16)));
inline Vec LoadEven(const uint16_t* p) {
  VecBits v;
  std::memcpy(&v, p, sizeof v);
  return (Vec)(v << 16);
}
inline Vec LoadOdd(const uint16_t* p) {
  VecBits v;
  std::memcpy(&v, p, sizeof v);
  return (Vec)(v & 0xffff0000u);
}
inline Vec BroadcastPair(const float* p) { return Vec{p[0], p[1], p[0], p[1]}; }
inline Vec MulAdd(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
#endif

inline float WidenBf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; a NaN stays one.
inline uint16_t RoundToBf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace
}  // namespace jaxzip
