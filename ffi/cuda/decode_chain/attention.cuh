// What the attention kernel is made of: instructions that CUDA C++ has no names for, what a lane has of a head, and how several
// warps' or CTAs' sums become one. The order of the elements is in attention.cu.
#pragma once
#include <cstdint>

#include "attention.h"
#include "rows.cuh"

namespace jaxzip::ptx {

// An 8x8 matrix of 16-bit elements, two a lane, turned.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t v) {
  uint32_t turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(turned) : "r"(v));
  return turned;
}
// All threads of a cluster meet; what they wrote to shared memory before, all may read.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place of shared memory in another CTA of the cluster.
template <class T>
__device__ __forceinline__ const T* of_rank(const T* p, int rank) {
  const T* there;
  asm("mapa.u64 %0,%1,%2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
}

}  // namespace jaxzip::ptx

namespace jaxzip::decode_chain {

constexpr int kUnit = 16;  // slots that a warp takes at a time

// A head's words as they are in memory.
template <int kD>
__device__ __forceinline__ void load_head(const __nv_bfloat16* from, bool there, int j, uint32_t (&x)[kD / 32][4]) {
#pragma unroll
  for (int i = 0; i < kD / 32; ++i) {
    const uint4 v = there ? __ldcg(reinterpret_cast<const uint4*>(from + 32 * i + 8 * j)) : make_uint4(0, 0, 0, 0);
    x[i][0] = v.x, x[i][1] = v.y, x[i][2] = v.z, x[i][3] = v.w;
  }
}

// What a lane needs to norm and rotate its part of a head: the norm's scales if there are any, and the angles' cosines and sines.
template <int kD>
struct Scales {
  uint4 of[kD / 32];
  __device__ __forceinline__ Scales(const Norm& norm, bool there, int j) {
    there = there && norm.scale;
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) of[i] = there ? *reinterpret_cast<const uint4*>(norm.scale + 32 * i + 8 * j) : make_uint4(0, 0, 0, 0);
  }
};
template <int kD>
struct Angles {
  float4 cos[kD / 32], sin[kD / 32];
  __device__ __forceinline__ Angles(const Attention& a, int row, int j) {
    const size_t first = static_cast<size_t>(row) * (kD / 2) + 8 * j;
#pragma unroll
    for (int i = 0; i < kD / 32; ++i) {
      cos[i] = *reinterpret_cast<const float4*>(a.cos + first + 32 * (i >> 1) + 4 * (i & 1));
      sin[i] = *reinterpret_cast<const float4*>(a.sin + first + 32 * (i >> 1) + 4 * (i & 1));
    }
  }
};

template <int kD>
__device__ __forceinline__ void norm_and_rotate(const Norm& norm, float offset, const Scales<kD>& scales, const Angles<kD>& angles,
                                                uint32_t (&x)[kD / 32][4]) {
  constexpr int kVectors = kD / 32, kHalf = kVectors / 2;
  if (__builtin_expect(norm.scale != nullptr, 0)) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i) {
      const float2 v = unpack(x[i / 4][i % 4]);
      squares = fmaf(v.y, v.y, fmaf(v.x, v.x, squares));
    }
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    const float factor = rsqrtf(__fdiv_rn(squares, static_cast<float>(kD)) + norm.eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t of[4] = {scales.of[i].x, scales.of[i].y, scales.of[i].z, scales.of[i].w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float2 v = unpack(x[i][word]), s = unpack(of[word]);
        x[i][word] = pack(v.x * factor * (s.x + offset), v.y * factor * (s.y + offset));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kHalf; ++i)
#pragma unroll
    for (int word = 0; word < 4; word += 2) {
      const float4 &c = angles.cos[2 * i + word / 2], &s = angles.sin[2 * i + word / 2];
      const auto rotate = [](uint32_t& low_pair, uint32_t& high_pair, float cx, float cy, float sx, float sy) {
        const float2 low = unpack(low_pair), high = unpack(high_pair);
        low_pair = pack(low.x * cx - high.x * sx, low.y * cy - high.y * sy);
        high_pair = pack(high.x * cx + low.x * sx, high.y * cy + low.y * sy);
      };
      rotate(x[i][word], x[i + kHalf][word], c.x, c.y, s.x, s.y);
      rotate(x[i][word + 1], x[i + kHalf][word + 1], c.z, c.w, s.z, s.w);
    }
}

// What a warp, and then a CTA, has found: of each head the largest score, the weights' sum and that of values times weights.
// Rows are a little longer than they need be, so that four heads' lie in different banks.
template <int kD, int kHeads>
struct Found {
  float largest[kHeads], total[kHeads];
  float sums[kHeads][kD + 4];
};

// How much each of several `Found` counts: exp2(largest - the largest of all), 0 where nothing was seen.
__device__ __forceinline__ float share_of(float largest, float of_all) { return largest == -INFINITY ? 0.0f : exp2f(largest - of_all); }

// 4 sums of one head over `count` of these, in order; `of(i)` is the i-th.
template <class Of>
__device__ __forceinline__ float4 add_up(int count, int head, int d, float& largest, float& total, const Of& of) {
  largest = -INFINITY;
#pragma unroll 4
  for (int i = 0; i < count; ++i) largest = fmaxf(largest, of(i)->largest[head]);
  float4 sum = make_float4(0, 0, 0, 0);
  total = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float share = share_of(of(i)->largest[head], largest);
    const float4 v = *reinterpret_cast<const float4*>(&of(i)->sums[head][d]);
    total = fmaf(share, of(i)->total[head], total);
    sum = make_float4(fmaf(share, v.x, sum.x), fmaf(share, v.y, sum.y), fmaf(share, v.z, sum.z), fmaf(share, v.w, sum.w));
  }
  return sum;
}

}  // namespace jaxzip::decode_chain
