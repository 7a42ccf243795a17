// Hopper instructions that CUDA C++ has no names for.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../ptx.cuh"

namespace jaxzip::ptx {

// Keeps it in a register: the compiler no longer knows how to compute it again at each use.
__device__ __forceinline__ void keep(uint32_t& word) {
  asm volatile("" : "+r"(word));
}
template <class... Words>
__device__ __forceinline__ void keep(uint32_t& first, Words&... more) {
  keep(first);
  keep(more...);
}
__device__ __forceinline__ void load_shared(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address));
}
__device__ __forceinline__ void load_shared(uint32_t (&v)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address));
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0],%1;" ::"r"(address), "r"(x) : "memory");
}
// Returns what was there.
__device__ __forceinline__ uint32_t add_shared(uint32_t address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.shared.add.u32 %0,[%1],%2;" : "=r"(before) : "r"(address), "r"(value) : "memory");
  return before;
}
__device__ __forceinline__ void store_shared_u16(uint32_t address, uint32_t value) {
  asm volatile("{.reg .u16 h; cvt.u16.u32 h,%1; st.shared.u16 [%0],h;}" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_shared_u8(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0,[%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_shared_u8(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u8 [%0],%1;" ::"r"(address), "r"(value) : "memory");
}

// Weights are read once: past L1, so that it keeps nothing, and by whole lines, since neighbours follow.
__device__ __forceinline__ void load_stream(uint32_t* v, const uint32_t* p, std::integral_constant<int, 4>) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p));
}
__device__ __forceinline__ void load_stream(uint32_t* v, const uint32_t* p, std::integral_constant<int, 2>) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1},[%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(p));
}
__device__ __forceinline__ void load_stream(uint32_t* v, const uint32_t* p, std::integral_constant<int, 1>) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0,[%1];" : "=r"(v[0]) : "l"(p));
}
template <int kWords>
__device__ __forceinline__ void load_stream(uint32_t* v, const uint32_t* p) {
  load_stream(v, p, std::integral_constant<int, kWords>());
}

// The mask's bits of x, the others of y: one instruction, which the compiler does not find.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t select_bits(uint32_t x, uint32_t y) {
  uint32_t selected;
  asm("lop3.b32 %0,%1,%2,%3,0xCA;" : "=r"(selected) : "n"(kMask), "r"(x), "r"(y));
  return selected;
}
// Two products; subnormals are kept.
__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.bf16x2 %0,%1,%2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ void async_copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void async_copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// A barrier (1 to 15) of so many threads of a CTA.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0,%1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Does not wait for the others.
__device__ __forceinline__ void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0,%1;" ::"r"(barrier), "r"(threads) : "memory");
}
// In the last group of copies that was begun.
__device__ __forceinline__ void async_copy_8(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(to), "l"(from) : "memory");
}
// When all copies that this thread asked for have landed; the barrier expects it.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// 16 bytes, kept in L1, or zeros; in the last group of copies that was begun.
__device__ __forceinline__ void async_copy_16_or_zero(uint32_t to, const void* from, bool copy) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(copy ? 16 : 0) : "memory");
}
__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of copies but the last `kGroups`.
template <int kGroups>
__device__ __forceinline__ void async_copy_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  int r;
  asm("mov.u32 %0,%%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ int cluster_index() {
  int r;
  asm("mov.u32 %0,%%clusterid.x;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Stores into the shared memory of CTA `rank` of the cluster and counts the bytes on its barrier. No fence is needed: the release of a
// cluster barrier costs a membar.gpu behind all of an SM's traffic.
__device__ __forceinline__ void store_cluster(uint32_t local_address, uint32_t local_barrier, int rank, float4 v) {
  asm volatile(
      "{.reg .u32 a, b; mapa.shared::cluster.u32 a,%0,%2; mapa.shared::cluster.u32 b,%1,%2;"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a],{%3,%4,%5,%6},[b];}" ::"r"(local_address),
      "r"(local_barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void store_cluster(uint32_t local_address, uint32_t local_barrier, int rank, float v) {
  asm volatile(
      "{.reg .u32 a, b; mapa.shared::cluster.u32 a,%0,%2; mapa.shared::cluster.u32 b,%1,%2;"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [a],%3,[b];}" ::"r"(local_address), "r"(local_barrier),
      "r"(rank), "f"(v) : "memory");
}
__device__ __forceinline__ void store_cluster(uint32_t local_address, uint32_t local_barrier, int rank, float2 v) {
  asm volatile(
      "{.reg .u32 a, b; mapa.shared::cluster.u32 a,%0,%2; mapa.shared::cluster.u32 b,%1,%2;"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a],{%3,%4},[b];}" ::"r"(local_address), "r"(local_barrier),
      "r"(rank), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace jaxzip::ptx
