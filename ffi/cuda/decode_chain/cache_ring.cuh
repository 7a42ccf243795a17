// A warp's keys and values on their way from the cache: a ring of slots in shared memory, each a unit's keys or its values, in turns, which
// tensor copies fill. Rows of a slot are 128 bytes of a cache slot, those of `head_dim`'s first 64 elements before those of the next, and
// their 16-byte pieces are permuted as 128-byte swizzle has them.
#pragma once
#include <cuda.h>

#include "../ptx.cuh"
#include "attention.cuh"

namespace jaxzip::decode_chain {

template <int kD>
class CacheRing {
 public:
  static constexpr int kBytes = kUnit * kD * 2;

  // One lane of the warp asks for copies.
  __device__ __forceinline__ CacheRing(const CUtensorMap& keys, const CUtensorMap& values, uint32_t shared, uint32_t barriers, int slots, bool asks)
      : keys_(keys), values_(values), shared_(shared), barriers_(barriers), slots_(slots), asks_(asks) {
    if (!asks_) return;
    ptx::prefetch_tensor_map(&keys_);
    ptx::prefetch_tensor_map(&values_);
#pragma unroll 1
    for (int slot = 0; slot < slots_; ++slot) ptx::barrier_init_only(barriers_ + 8 * slot, 1);
    ptx::barrier_init_done();
  }
  // Asks for as many of the units `first`, `first + step`, ... before `units` as there is room for. Unit 0 begins at the cache's row `row`.
  __device__ __forceinline__ void begin(int row, int first, int step, int units) {
    row_ = row, first_ = first, step_ = step, units_ = units;
#pragma unroll 1
    for (int i = 0; i < slots_; ++i) ask(i, i);
    __syncwarp();
  }
  // Until the next slot's copy is there; its address.
  __device__ __forceinline__ uint32_t wait() const {
    ptx::barrier_wait(barriers_ + 8 * slot_, phase_);
    return shared_ + slot_ * kBytes;
  }
  // All lanes have read it.
  __device__ __forceinline__ void next() {
    __syncwarp();
    ask(taken_ + slots_, slot_);
    ++taken_;
    if (++slot_ == slots_) slot_ = 0, phase_ ^= 1;
  }

 private:
  __device__ __forceinline__ void ask(int i, int slot) const {
    const int unit = first_ + (i >> 1) * step_;
    if (!asks_ || unit >= units_) return;
    ptx::barrier_expect(barriers_ + 8 * slot, kBytes);
    ptx::tensor_copy(shared_ + slot * kBytes, i & 1 ? &values_ : &keys_, 0, row_ + unit * kUnit, 0, barriers_ + 8 * slot);
  }

  const CUtensorMap &keys_, &values_;
  const uint32_t shared_, barriers_;
  const int slots_;
  const bool asks_;
  int row_, first_, step_, units_, taken_ = 0, slot_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace jaxzip::decode_chain
