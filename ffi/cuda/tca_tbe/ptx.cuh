// Instructions of sm_80 and later that CUDA C++ has no names for.
#pragma once
#include <cstdint>

namespace jaxzip::tca_tbe {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

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

#if __CUDA_ARCH__ >= 900
#define JAXZIP_BULK_COPIES 1
__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra again; }" ::"r"(barrier), "r"(phase)
               : "memory");
}
// `bytes` is a multiple of 16, both addresses are 16-byte aligned.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier)
               : "memory");
}
#endif

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t* v, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address));
}
// The transpose of an 8x8 matrix of 16-bit elements, a row of four lanes.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// No-ops unless the launch asked for programmatic dependent launch; nothing before sm_90.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace jaxzip::tca_tbe
