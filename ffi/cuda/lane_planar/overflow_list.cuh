// The overflow entries of a CTA's blocks, in its shared memory: warps that have nothing else to do gather them before the first blocks come.
// Read from the matrix' list when a block needs them, they would hold up its warps by 500 cycles (bench/NOTES.md, 78 and 80).
#pragma once
#include "arrivals.cuh"
#include "weights.cuh"
#include "wgmma_x.cuh"

namespace jaxzip::lane_planar {

constexpr int kGatheringWarps = 3;
static_assert(kOverflowListBytes == kOverflowListHeader + kOverflowRoom * sizeof(OverflowEntry));

// A barrier that says that it is complete, how many entries the CTA has, and these. Where there is no room for one it is only counted.
struct OverflowList {
  uint32_t barrier;
  __device__ __forceinline__ uint32_t count() const { return barrier + 8; }
  __device__ __forceinline__ uint32_t entry(uint32_t i) const { return barrier + kOverflowListHeader + i * uint32_t{sizeof(OverflowEntry)}; }

  // By one thread, before the CTA's warps meet.
  __device__ __forceinline__ void begin() const {
    ptx::barrier_init_only(barrier, kGatheringWarps * kArrivingLanes);
    ptx::store_shared(count(), 0);
  }
  // By the gathering warps: constructed before the CTA's warps meet, so that memory brings the first entries meanwhile.
  class Gatherer {
    static constexpr uint32_t kThreads = kGatheringWarps * 32, kAtOnce = 4;
    const OverflowList& list_;
    const uint32_t thread_;
    OverflowEntry e_[kAtOnce];

    __device__ __forceinline__ void load(const Matrix& w, uint32_t first) {
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        const uint32_t at = first + i * kThreads;
        e_[i] = at < w.overflow_length ? w.overflow[at] : OverflowEntry{0, 0};
      }
    }

   public:
    __device__ __forceinline__ Gatherer(const OverflowList& list, const Matrix& w, int warp, int lane) : list_(list), thread_(warp * 32 + lane) {
      load(w, thread_);
    }
    // After they met. The order of entries changes from run to run, and nothing with it.
    template <class Work>
    __device__ __forceinline__ void gather(const WgmmaArgs& args, const Work& work, int lane) {
      for (uint32_t first = thread_;;) {
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) {
          if (!e_[i].block || !work.has_block(args, e_[i].block - 1)) continue;
          const uint32_t place = ptx::add_shared(list_.count(), 1);
          if (place < kOverflowRoom) ptx::store_shared(list_.entry(place), e_[i].block, e_[i].entry);
        }
        first += kThreads * kAtOnce;
        if (first - thread_ >= args.w.overflow_length || !e_[kAtOnce - 1].block) break;  // behind padding is more of it
        load(args.w, first);
      }
      __syncwarp();
      arrive(list_.barrier, lane);
    }
  };

  // As scatter_overflow, by a whole warp. False if the list has not all of the CTA's.
  __device__ __forceinline__ bool scatter(uint32_t block, uint32_t plane, uint32_t tile) const {
    const uint32_t lane = threadIdx.x & 31;
    uint32_t count, e[2];
    ptx::barrier_wait(barrier, 0);
    ptx::load_shared_words<1>(&count, this->count());
    ptx::load_shared(e, entry(lane));
    if (count > kOverflowRoom) return false;
    if (lane < count && e[0] == block + 1) put_overflow(plane, position_of(e[1]), high_of(e[1]), tile * kTileElements, kTileElements);
    return true;
  }
};

}  // namespace jaxzip::lane_planar
