// Instructions of sm_80 and later that CUDA C++ has no names for.
#pragma once
#include <cstdint>

#include "../ptx.cuh"

namespace jaxzip::tca_tbe {

using namespace ptx;

__device__ __forceinline__ uint32_t load_byte(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0,[%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_half(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u16 %0,[%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ uint4 load_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ void store_half(uint32_t address, uint32_t v) {
  asm volatile("{.reg .u16 h; cvt.u16.u32 h,%1; st.shared.u16 [%0],h;}" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_word(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0],%1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_16(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0],{%1,%2,%3,%4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// (a & kMask) | (b & ~kMask) in one instruction; the compiler makes two of it.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t choose(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("lop3.b32 %0,%1,%2,%3,0xCA;" : "=r"(r) : "n"(kMask), "r"(a), "r"(b));
  return r;
}
// a * kFactor + c, kept as one instruction too.
template <uint32_t kFactor>
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t c) {
  uint32_t r;
  asm volatile("mad.lo.u32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "n"(kFactor), "r"(c));
  return r;
}
// How far the highest bit of v is from bit 31; all ones for v == 0.
__device__ __forceinline__ uint32_t highest_bit_shift(uint32_t v) {
  uint32_t r;
  asm("bfind.shiftamt.u32 %0,%1;" : "=r"(r) : "r"(v));
  return r;
}
// v >> shift, 0 for shifts past 31.
__device__ __forceinline__ uint32_t shift_right(uint32_t v, uint32_t shift) {
  uint32_t r;
  asm("shr.u32 %0,%1,%2;" : "=r"(r) : "r"(v), "r"(shift));
  return r;
}

// Weights are read once: past L1, so that it keeps nothing.
__device__ __forceinline__ uint32_t load_stream(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0,[%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// 16 bytes, of which the first `valid` (0 or 16) are read and the others become zero.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements, a row of four lanes.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(v));
  return r;
}
}  // namespace jaxzip::tca_tbe
