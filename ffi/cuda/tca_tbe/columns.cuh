// x as the A operand of mma.m16n8k16.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

#include "jaxzip/layout.h"
#include "ptx.cuh"

namespace jaxzip::tca_tbe {

struct Activations {
  const __nv_bfloat16* x;  // [n, k]
  int n, k;
  uint32_t zero;  // 0, what the compiler must not know
  bool aligned;   // rows start on 16 bytes
  bool mapped;    // by the tensor map
  CUtensorMap map;
};

// x of one block's k, as the A operand: lane 4 g + t has rows g and g + 8 of a tile. Zeros outside x. The next block's x is fetched meanwhile:
// to registers, where a lane has of each row k 8 t .. 8 t + 7 and 32 more, so that the order of k inside an instruction is the lanes' (`Band`
// has the same for the weights), or, where registers are too few, to shared memory, by a tensor copy if x has a map, and from there in the
// order that k has.
template <int kColumns>  // 8, 16 or 32
struct Columns {
  static constexpr int tiles = (kColumns + 15) / 16;    // rows of mma.m16n8k16 hold x, its columns the weight's rows
  static constexpr int halves = kColumns == 8 ? 1 : 2;  // of a tile that hold anything
  static constexpr int kColumnBytes = layout::kBlock * 2, shared_bytes = kColumns < 32 ? 0 : kColumns * kColumnBytes;
  // A fetch takes 16 bytes a lane, lane l from column l / kPieces of its columns and piece l % kPieces.
  static constexpr int kPieces = shared_bytes ? 8 : 4, kFetches = kColumns * 8 / 32;
  uint32_t a[tiles][4][4];
  uint4 fetched[kFetches];
  uint32_t shared;             // 128-byte aligned
  const __nv_bfloat16* first;  // the lane's of a block's first fetch, for k = 0

  __device__ __forceinline__ Columns(const Activations& g, int column0, uint32_t shared, int lane)
      : shared(shared), first(g.x + static_cast<size_t>(column0 + lane / kPieces) * g.k + lane % kPieces * 8) {}
  // Bytes that `barrier` of a fetch has to expect.
  static __device__ __forceinline__ uint32_t expected_bytes(const Activations& g) { return g.mapped ? shared_bytes : 0; }
  __device__ __forceinline__ void fetch(const Activations& g, int column0, int k_block, int lane, uint32_t barrier = 0) {
    const int k0 = k_block * layout::kBlock;
#ifdef JAXZIP_BULK_COPIES
    if (shared_bytes && barrier && g.mapped) {
      if (elect_one()) tensor_copy(shared, &g.map, k0, column0, 0, barrier);
      return;
    }
#endif
    if (g.aligned && column0 + kColumns <= g.n && k0 + layout::kBlock <= g.k) {
      each_fetch(g, k0, [&](int i, int, int, const __nv_bfloat16* from) { fetch_8(i, true, from, lane); });
    } else {
      each_fetch(g, k0, [&](int i, int columns, int pieces, const __nv_bfloat16* from) {
        const int k = k0 + (lane % kPieces + pieces) * 8, count = column0 + lane / kPieces + columns < g.n ? g.k - k : 0;
        if (g.aligned) {
          fetch_8(i, count > 0, count > 0 ? from : g.x, lane);
        } else {
          fetched[i] = gather(from, count);
          if (shared_bytes) store_16(place(i * 4 + lane / 8, lane % 8), fetched[i].x, fetched[i].y, fetched[i].z, fetched[i].w);
        }
      });
    }
  }
  __device__ __forceinline__ void arrange(const Activations& g, int lane) {
    if constexpr (shared_bytes > 0) {
      const uint32_t of_lane = place(lane % 16, lane / 16);
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) load_matrices(a[tile][i], (of_lane ^ i * 32) + tile * 16 * kColumnBytes);
      return;
    }
    // What was fetched together is not what an instruction takes together: joined to a zero that the compiler does not know, words are
    // moved here once and not again before each instruction.
#pragma unroll
    for (int column_tile = 0; column_tile < kColumns / 8; ++column_tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 v = fetched[column_tile * 2 + i];
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t* to = a[column_tile / 2][2 * i + j / 2] + j % 2 * 2;
          to[column_tile % 2] = words[j] | g.zero;
          if (halves == 1) to[1] = words[j] & g.zero;
        }
      }
  }

 private:
  // (which, columns past the lane's first, pieces past it, from where)
  template <class Body>
  __device__ __forceinline__ void each_fetch(const Activations& g, int k0, Body&& body) const {
    constexpr int kAtOnce = 8 / kPieces;  // fetches of the same columns
#pragma unroll
    for (int i = 0; i < kFetches; ++i) {
      const int columns = i / kAtOnce * (32 / kPieces), pieces = i % kAtOnce * kPieces;
      body(i, columns, pieces, first + k0 + static_cast<size_t>(g.k) * columns + pieces * 8);
    }
  }
  __device__ __forceinline__ void fetch_8(int i, bool valid, const __nv_bfloat16* from, int lane) {
    if (shared_bytes) {
      copy_async_16(place(i * 4 + lane / 8, lane % 8), from, valid ? 16 : 0);
    } else {
      fetched[i] = load_if(valid, from);
    }
  }
  // Of 8 k of a column in shared memory, by the 128-byte swizzle of tensor copies, which counts from address 0 on.
  __device__ __forceinline__ uint32_t place(int column, int piece) const {
    const uint32_t at = shared + column * kColumnBytes;
    return at + (piece ^ at / kColumnBytes % 8) * 16;
  }
  // The first `count` of 8 values at any address.
  static __device__ __forceinline__ uint4 gather(const __nv_bfloat16* from, int count) {
    uint32_t v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = e < count ? __ldg(reinterpret_cast<const uint16_t*>(from) + e) : 0;
    return make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
  }
};

}  // namespace jaxzip::tca_tbe
