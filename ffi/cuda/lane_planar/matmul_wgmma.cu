// Launch of the wgmma matmul: which kernels are compiled, the plan of a launch, the tensor map of x, and the launch itself.
#include "matmul_wgmma.h"

#include <algorithm>

#include "../launch.h"
#include "../tensor_maps.h"
#include "matmul_wgmma.cuh"

namespace jaxzip::lane_planar {

// Of blocks that a CTA asks for before the kernel before has ended: less waits for memory later, more delays that kernel.
constexpr int kEarlyBytesFew = 120 << 10, kEarlyBytes = 72 << 10;

WgmmaPlan plan_wgmma(const Matrix& w, int n, int instruction_n, int groups, const WgmmaConfig& c, bool gated, int plane_bytes, int limit) {
  WgmmaPlan p = {};
  p.slices = wgmma_slices(n);
  p.k_groups = c.k_groups;
  p.teams = groups / c.k_groups;
  while (1 << p.log_k_groups < p.k_groups) ++p.log_k_groups;
  p.cluster = c.cluster;
  p.clusters = c.clusters;
  p.half = w.m_blocks() / 2;
  p.dealt = w.m_blocks() >> gated;
  p.row_blocks = (p.dealt + c.clusters - 1) / c.clusters;
  const auto passes = [&](int takers) { return (p.row_blocks + takers - 1) / takers; };
  p.pair_of_teams = gated && p.teams > 1 && passes(p.teams / 2) < 2 * passes(p.teams);
  p.pair_of_passes = gated && !p.pair_of_teams;
  p.takers = p.teams >> p.pair_of_teams;
  while (1 << p.log_takers < p.takers) ++p.log_takers;
  p.busy = std::min(p.takers, p.row_blocks) << p.pair_of_teams;
  p.chunks = w.k_blocks() / c.cluster;
  p.k_longer = w.k_blocks() % c.cluster;
  p.items = kTiles * instruction_n / 8;
  p.owned = (p.items + c.cluster - 1) / c.cluster;
  p.owning_most = p.items - (p.owned - 1) * c.cluster;
  p.ranks_inverse = ((1 << 16) + c.cluster - 1) / c.cluster;
  if (instruction_n <= kFewColumns && c.cluster > 1)
    p.received_bytes = c.cluster * c.k_groups * p.owned * kItemBytes;
  else
    p.received_bytes = ((c.k_groups - 1) * p.items + (c.cluster > 1 ? c.cluster * p.owned : 0)) * kItemBytes;

  plan_slots(p, w, p.busy, c.k_groups);
  const int slot_x = c.k_groups * chunk_bytes(instruction_n), slot = slot_x + p.slot_bytes;
  const int planes = p.busy_warps() * plane_bytes, fixed = planes + kWarpAreasBytes + kBarrierBytes;
  int sum_bytes = p.busy * p.received_bytes;
  // Of a single pass sums can use the slots, after the last of them. That costs a wait for all of the cluster, so only where few
  // slots are left otherwise.
  constexpr int kEnoughSlots = 5;
  const int slots_of_pass = (p.chunks + (p.k_longer > 0) + c.k_groups - 1) / c.k_groups;
  const bool enough = (limit - fixed - sum_bytes) / slot >= std::max(kMinSlots, std::min(kEnoughSlots, slots_of_pass));
  p.sums_in_slots = sum_bytes > 0 && !enough && !gated && p.row_blocks <= p.teams && sum_bytes <= limit - fixed;
  if (p.sums_in_slots) sum_bytes = 0;
  const int fitting = std::min((limit - fixed - sum_bytes) / slot, kMaxSlots);
  p.slots = c.slots ? std::min(c.slots, kMaxSlots) : fitting;
  if (p.slots < kMinSlots || p.slots > fitting) return p;
  p.early = std::max(1, (instruction_n <= kFewColumns ? kEarlyBytesFew : kEarlyBytes) / (groups * w.block_words * 4));
  p.planes = p.slots * slot_x;  // as x's slots, whole kilobytes from the start
  p.blocks = p.planes + planes;
  const int ring = std::max(p.blocks + p.slots * p.slot_bytes, p.sums_in_slots ? p.busy * p.received_bytes : 0);
  p.received = p.sums_in_slots ? 0 : ring;
  p.barriers = ring + sum_bytes + kWarpAreasBytes;
  p.overflow = p.barriers + kBarrierBytes;
  // In what is left behind all slots that fit.
  p.overflow_listed = w.overflow_length && w.overflow_length <= kMaxGathered && p.overflow + kOverflowListBytes <= limit;
  p.bytes = p.overflow + (p.overflow_listed ? kOverflowListBytes : 0);
  return p;
}

namespace {

constexpr int kSharedPerSm = 227 * 1024;

struct Variant {
  int n;
  bool raw;
  const void* kernel;
  int groups() const { return wgmma_groups(n); }
  int threads() const { return (groups() + 1) * 128; }
};

template <class Weights, int kN, bool kPairs>
Variant variant() {
  return {kN, !Weights::kHasEscapes, reinterpret_cast<const void*>(&matmul_wgmma<Weights, kN, wgmma_groups(kN), kPairs>)};
}

template <class Weights, bool kPairs, int... kNs>
const Variant* find_variant(int n) {
  static const Variant variants[] = {variant<Weights, kNs, kPairs>()...};
  for (const Variant& v : variants)
    if (std::min(n, kWgmmaMaxN) <= v.n) return &v;
  return nullptr;
}

// A chain's products have the same kernels, gated or not: code that another product has just run is fetched faster.
const Variant* find_variant(int n, bool raw, bool gated, bool chained) {
  static_assert(kGatedMaxN == 64);
  if (gated || (chained && n <= kGatedMaxN)) return raw ? find_variant<Raw, true, 8, 16, 32, 64>(n) : find_variant<LanePlanar, true, 8, 16, 32, 64>(n);
  return raw ? find_variant<Raw, false, 8, 16, 32, 64, 128, 256>(n) : find_variant<LanePlanar, false, 8, 16, 32, 64, 128, 256>(n);
}

WgmmaPlan plan_for(const Matrix& w, int n, const Variant& v, const WgmmaConfig& c, bool gated) {
  return plan_wgmma(w, n, v.n, v.groups(), c, gated, v.raw ? Raw::kPlaneBytes : LanePlanar::kPlaneBytes, kSharedPerSm);
}

struct WgmmaLaunch : Launch {
  WgmmaLaunch(const WgmmaConfig& c, int slices, int threads, int shared_bytes, bool overlap, cudaStream_t stream)
      : Launch(dim3(c.clusters * slices * c.cluster), threads, shared_bytes, stream, c.cluster, overlap) {}
};

// With `bytes` 0 if there is none.
WgmmaPlan any_plan(const Matrix& w, int n, const WgmmaConfig& c, bool raw, bool gated = false) {
  const Variant* v = n < 1 || wgmma_slices(n) > kWgmmaMaxSlices ? nullptr : find_variant(n, raw, gated, false);
  if (!v || c.cluster < 1 || c.cluster > 8 || c.clusters < 1 || c.clusters > w.m_blocks() >> gated || c.k_groups < 1 ||
      v->groups() % c.k_groups || w.k_blocks() / c.cluster < c.k_groups)
    return {};
  return plan_for(w, n, *v, c, gated);
}

}  // namespace

int wgmma_shared_bytes(const Matrix& w, int n, const WgmmaConfig& c, bool raw, bool gated) { return any_plan(w, n, c, raw, gated).bytes; }

int wgmma_slots(const Matrix& w, int n, const WgmmaConfig& c, bool raw, bool gated) {
  const WgmmaPlan plan = any_plan(w, n, c, raw, gated);
  return plan.bytes ? plan.slots : 0;
}

int wgmma_resident_clusters(const Matrix& w, int n, const WgmmaConfig& c) {
  const int bytes = wgmma_shared_bytes(w, n, c);
  if (!bytes) return 0;
  const Variant& v = *find_variant(n, false, false, false);
  if (cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedPerSm)) return 0;
  int clusters = 0;
  if (c.cluster == 1) {
    int device, sms;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, v.kernel, v.threads(), bytes))
      return 0;
    return sms * clusters;
  }
  const WgmmaLaunch launch(c, 1, v.threads(), bytes, false, nullptr);
  if (cudaOccupancyMaxActiveClusters(&clusters, v.kernel, &launch.config)) return 0;
  return clusters;
}

cudaError_t launch_matmul_wgmma(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, const WgmmaConfig& c,
                                cudaStream_t stream, bool raw, bool overlap, const RowBlocks& part) {
  const int all = w.m_blocks() >> epilogue.gated;
  if (part.first < 0 || part.count < 0 || part.first + part.count > all) return cudaErrorInvalidValue;
  const Matrix dealt = part.count ? with_row_blocks(w, part.count, epilogue.gated) : w;
  const int bytes = wgmma_shared_bytes(dealt, n, c, raw, epilogue.gated);
  if (!bytes) return cudaErrorInvalidValue;
  const Variant& v = *find_variant(n, raw, epilogue.gated, overlap);
  overlap |= part.behind_other;
  WgmmaArgs args = {{}, w, x, epilogue, n, overlap, XLoad::kPlain, plan_for(dealt, n, v, c, epilogue.gated)};
  args.plan.first = part.first;
  args.plan.half = w.m_blocks() / 2;
  if (w.k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    args.x_load = w.k % kBlock == 0 ? XLoad::kSlot : XLoad::kChunk;
    if (const cudaError_t error = make_rows_map(&args.x_map, x, n, w.k, v.n, c.k_groups, args.x_load == XLoad::kSlot)) return error;
  }
  // A property of the function on the current device; setting it again costs nothing.
  if (const cudaError_t error = cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedPerSm)) return error;
  const WgmmaLaunch launch(c, args.plan.slices, v.threads(), bytes, overlap, stream);
  void* parameters[] = {&args};
  return cudaLaunchKernelExC(&launch.config, v.kernel, parameters);
}

}  // namespace jaxzip::lane_planar
