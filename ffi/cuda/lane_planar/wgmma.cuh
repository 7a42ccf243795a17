// Hopper's warp-group matrix multiply, A in registers and B in shared memory, and what goes with it: tensor copies, remote arrivals.
#pragma once
#include <cuda.h>

#include "ptx.cuh"

namespace jaxzip::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Keeps the compiler from reading sums before the wait.
template <int kSize>
__device__ __forceinline__ void wgmma_done(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps a loop's constant in a register: where registers of the warp are scarce the compiler would compute it anew in every round.
__device__ __forceinline__ uint32_t keep(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Keeps the compiler from computing operands after the fence.
__device__ __forceinline__ void wgmma_ready(uint32_t (&a)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// B is [n][64] bf16 with 128-byte swizzle: eight rows are 1024 bytes, at a multiple of 1024. The low half of its descriptor; a k-step
// of 16 is 32 bytes, so 2, on. The high half is the same for all: 1024 bytes between groups of eight rows, that swizzle.
__device__ __forceinline__ uint32_t wgmma_descriptor(uint32_t shared_address) {
  return (shared_address & 0x3FFFFu) >> 4 | 1u << 16;
}
#define JAXZIP_DESCRIPTOR_HIGH "0x40000040"

// d[64][n] += a[64][16] b[n][16].T. Thread t of the warp group holds in d[4 g .. 4 g + 3]
// rows 16 (t / 32) + t % 32 / 4 (+ 8 for the last two), columns 8 g + 2 (t % 4) and the next.
#define JAXZIP_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JAXZIP_F16(d, i) JAXZIP_F4(d, i), JAXZIP_F4(d, i + 4), JAXZIP_F4(d, i + 8), JAXZIP_F4(d, i + 12)
#define JAXZIP_F64(d, i) JAXZIP_F16(d, i), JAXZIP_F16(d, i + 16), JAXZIP_F16(d, i + 32), JAXZIP_F16(d, i + 48)

__device__ __forceinline__ void wgmma(float (&d)[4], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .b64 b; mov.b64 b,{%8," JAXZIP_DESCRIPTOR_HIGH "}; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3"
      "},{%4,%5,%6,%7},b,1,1,1,0;}"
      : JAXZIP_F4(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[8], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .b64 b; mov.b64 b,{%12," JAXZIP_DESCRIPTOR_HIGH "}; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7"
      "},{%8,%9,%10,%11},b,1,1,1,0;}"
      : JAXZIP_F4(d, 0), JAXZIP_F4(d, 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .b64 b; mov.b64 b,{%20," JAXZIP_DESCRIPTOR_HIGH "}; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
      "},{%16,%17,%18,%19},b,1,1,1,0;}"
      : JAXZIP_F16(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .b64 b; mov.b64 b,{%36," JAXZIP_DESCRIPTOR_HIGH "}; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
      "},{%32,%33,%34,%35},b,1,1,1,0;}"
      : JAXZIP_F16(d, 0), JAXZIP_F16(d, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .b64 b; mov.b64 b,{%68," JAXZIP_DESCRIPTOR_HIGH "}; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
      "},{%64,%65,%66,%67},b,1,1,1,0;}"
      : JAXZIP_F64(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

__device__ __forceinline__ void wgmma(float (&d)[128], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{.reg .b64 b; mov.b64 b,{%132," JAXZIP_DESCRIPTOR_HIGH "}; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
      "},{%128,%129,%130,%131},b,1,1,1,0;}"
      : JAXZIP_F64(d, 0), JAXZIP_F64(d, 64)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

#undef JAXZIP_DESCRIPTOR_HIGH
#undef JAXZIP_F4
#undef JAXZIP_F16
#undef JAXZIP_F64

template <int kWords>
__device__ __forceinline__ void load_shared_words(uint32_t* v, uint32_t address) {
  if constexpr (kWords == 4)
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address));
  else if constexpr (kWords == 2)
    asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address));
  else
    asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v[0]) : "r"(address));
}
// The compiler makes four stores of one of an uint4 now and then.
__device__ __forceinline__ void store_global(void* to, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0,[%1];" : "=h"(v) : "r"(address));
  return v;
}

// Registers of each thread of a warp group, which all its warps change together; a multiple of 8.
template <int kCount>
__device__ __forceinline__ void registers_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount)); }
template <int kCount>
__device__ __forceinline__ void registers_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount)); }

// True in one lane of a whole warp; the compiler knows that it is one.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p,0xFFFFFFFF; selp.u32 %0,1,0,p;}" : "=r"(elected));
  return elected;
}

// A tensor copy (see ../ptx.cuh) to one place of every CTA of a cluster of `kCtas`, and each one's barrier there.
template <int kCtas>
__device__ __forceinline__ void tensor_copy_to_all(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0],[%1,{%2,%3,%4}],[%5],%6;" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"(static_cast<uint16_t>((1 << kCtas) - 1)) : "memory");
}
// A box of shared memory to where the map says; what is outside of it is left out. `bulk_store_commit` ends a group of such copies of this
// thread, `bulk_store_wait_read` waits until all its groups but the last `kGroups` have read shared memory.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0,{%2,%3}],[%1];" ::"l"(map), "r"(from), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void bulk_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(barrier) : "memory");
}
// On the barrier of CTA `rank` of the cluster. Relaxed: what it announces are reads, done when their values were used.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t local_barrier, int rank) {
  asm volatile(
      "{.reg .u32 b; mapa.shared::cluster.u32 b,%0,%1; mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _,[b];}" ::"r"(
          local_barrier), "r"(rank) : "memory");
}
// Ordinary stores to shared memory before it are seen by wgmma after it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace jaxzip::ptx
