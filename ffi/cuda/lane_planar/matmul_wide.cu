// Launch of the matmul of many columns: its plan, the tensor map of x, and the launch itself.
#include "matmul_wide.h"

#include <algorithm>

#include "../launch.h"
#include "../tensor_maps.h"
#include "matmul_wide.cuh"
#include "resident.h"

namespace jaxzip::lane_planar {
namespace {

constexpr int kSharedPerSm = 227 * 1024;

int units_of_slice(const Matrix& w) { return (w.m_blocks() + kWideShare * kWideTeams - 1) / (kWideShare * kWideTeams); }
static_assert(kWideTeams == 2, "a gate's row block and the one that it is for are a CTA's");

// What only a split of K needs is not filled in. `bytes` is 0 if it does not fit.
WgmmaPlan plan_wide(const Matrix& w, int n, bool gated, int plane_bytes) {
  WgmmaPlan p = {};
  p.k_groups = 1;
  p.pair_of_teams = gated;
  p.half = w.m_blocks() / 2;
  p.slices = wgmma_slices(n);
  p.row_blocks = units_of_slice(w);
  p.clusters = std::min(kResident[0][kWideShare - 1], p.row_blocks * p.slices);
  p.chunks = w.k_blocks();
  plan_slots(p, w, kWideTeams, 1);
  const int slot_x = chunk_bytes(kWgmmaMaxN), planes = kWideTeams * 4 * plane_bytes, lines = kWideTeams * kWideAreas * kWideLineColumns * kBlock * 2;
  p.slots = std::min((kSharedPerSm - planes - lines - kWarpAreasBytes - kBarrierBytes) / (slot_x + p.slot_bytes), kMaxSlots);
  if (p.slots < kMinSlots) return p;
  p.received = p.slots * slot_x;  // lines: their swizzle needs an address as of x
  p.planes = p.received + lines;
  p.blocks = p.planes + planes;
  p.barriers = p.blocks + p.slots * p.slot_bytes + kWarpAreasBytes;
  p.bytes = p.barriers + kBarrierBytes;
  return p;
}

}  // namespace

bool wide_fits(const Matrix& w, const __nv_bfloat16* x) { return w.k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0; }

bool wide_is_faster(const Matrix& w, int n) {
  if (n <= kWgmmaMaxN) return false;
  const int units = units_of_slice(w) * wgmma_slices(n), at_once = kResident[0][kWideShare - 1];
  return units * 10 >= (units + at_once - 1) / at_once * at_once * 9;
}

cudaError_t launch_matmul_wide(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, cudaStream_t stream, bool raw,
                               bool overlap) {
  if (n < 1 || !wide_fits(w, x)) return cudaErrorInvalidValue;
  const int rows = epilogue.gated ? w.m / 2 : w.m;  // of the result
  WideOutput output = {};
  output.by_lines = !epilogue.fp32_out && rows % 8 == 0 &&
                    ((reinterpret_cast<uintptr_t>(epilogue.y) | reinterpret_cast<uintptr_t>(epilogue.residual)) & 15) == 0;
  if (epilogue.gated && !output.by_lines) return cudaErrorInvalidValue;
  const auto kernel = raw ? matmul_wide<Raw> : matmul_wide<LanePlanar>;
  WgmmaArgs args = {{}, w, x, epilogue, n, overlap, w.k % kBlock == 0 ? XLoad::kSlot : XLoad::kChunk,
                    plan_wide(w, n, epilogue.gated, raw ? Raw::kPlaneBytes : LanePlanar::kPlaneBytes)};
  if (!args.plan.bytes) return cudaErrorInvalidValue;
  if (const cudaError_t error = make_rows_map(&args.x_map, x, n, w.k, kWgmmaMaxN / kWideShare, 1, args.x_load == XLoad::kSlot)) return error;
  if (output.by_lines)
    if (const cudaError_t error = make_y_map(&output.map, static_cast<__nv_bfloat16*>(epilogue.y), n, rows, kWideLineColumns)) return error;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedPerSm)) return error;
  const Launch launch(dim3(args.plan.clusters * kWideShare), (kWideTeams + 1) * 128, args.plan.bytes, stream, kWideShare, overlap);
  void* parameters[] = {&args, &output};
  return cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(kernel), parameters);
}

}  // namespace jaxzip::lane_planar
