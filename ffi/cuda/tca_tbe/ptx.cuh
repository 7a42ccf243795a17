// Instructions of sm_80 and later that CUDA C++ has no names for.
#pragma once
#include <cstdint>

#include "../ptx.cuh"

namespace jaxzip::tca_tbe {

using namespace ptx;

// By a maximum, whose result the compiler knows to be the same in all lanes.
__device__ __forceinline__ int warp_index() { return static_cast<int>(__reduce_max_sync(0xFFFFFFFFu, threadIdx.x / 32)); }

__device__ __forceinline__ uint32_t load_half(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u16 %0,[%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(address));
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
__device__ __forceinline__ void store_16(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_8(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0],{%1,%2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}

// Bytes of (high, low) by the nibbles of `selector`, none of which is above 7: unlike __byte_perm, without making sure of that.
__device__ __forceinline__ uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(low), "r"(high), "r"(selector));
  return r;
}
// (a & kMask) | (b & ~kMask) in one instruction; the compiler makes two of it.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t choose(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("lop3.b32 %0,%1,%2,%3,0xCA;" : "=r"(r) : "n"(kMask), "r"(a), "r"(b));
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
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t load_stream(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0,[%1];" : "=r"(v) : "l"(p));
  return v;
}

// 16 bytes, or zeros. Where it stands: not moved to where the value is used.
__device__ __forceinline__ uint4 load_if(bool valid, const void* p) {
  uint4 v;
  asm volatile(
      "{.reg .pred q; setp.ne.u32 q,%5,0; mov.u32 %0,0; mov.u32 %1,0; mov.u32 %2,0; mov.u32 %3,0;"
      "@q ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"(static_cast<uint32_t>(valid)));
  return v;
}

// 16 bytes, of which the first `valid` (0 or 16) are read and the others become zero.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Puts this thread's stores to shared memory before bulk copies that a later barrier allows.
__device__ __forceinline__ void fence_stores_before_copies() {
#ifdef JAXZIP_BULK_COPIES
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
#ifdef JAXZIP_BULK_COPIES
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p,0xFFFFFFFF; selp.u32 %0,1,0,p;}" : "=r"(elected));
  return elected;
}
#endif

// Adds the value of the lane `step` below, where there is one.
__device__ __forceinline__ void add_from_below(uint32_t& v, uint32_t step) {
  asm volatile("{.reg .pred p; .reg .u32 t; shfl.sync.up.b32 t|p,%0,%1,0,0xffffffff; @p add.u32 %0,%0,t;}" : "+r"(v) : "r"(step));
}

}  // namespace jaxzip::tca_tbe
