// Launch of the small-N matmul: which kernels are compiled, which one a shape gets, and the launch itself.
#include "matmul_direct.h"

#include <algorithm>

#include "../launch.h"
#include "matmul_direct.cuh"

namespace jaxzip::lane_planar {
namespace {

constexpr int kSharedPerSm = 227 * 1024;

struct Variant {
  int tiles_per_warp, column_tiles, warps, ctas_per_sm;
  bool raw;
  const void* kernel;
};

template <class Weights, int kTilesPerWarp, int kColumnTiles, int kWarps, int kCtasPerSm>
Variant variant() {
  return {kTilesPerWarp, kColumnTiles, kWarps, kCtasPerSm, !Weights::kHasEscapes,
          reinterpret_cast<const void*>(&matmul_direct<Weights, kTilesPerWarp, kColumnTiles, kWarps, kCtasPerSm>)};
}

template <class Weights>
const Variant* find_variant(int n, const DirectConfig& c) {
  static const Variant variants[] = {
      variant<Weights, 1, 1, 16, 1>(), variant<Weights, 2, 1, 16, 1>(), variant<Weights, 4, 1, 16, 1>(),
      variant<Weights, 1, 2, 16, 1>(), variant<Weights, 2, 2, 16, 1>(), variant<Weights, 4, 2, 16, 1>(),
      variant<Weights, 1, 1, 8, 2>(),  variant<Weights, 2, 1, 8, 2>(),  variant<Weights, 4, 1, 8, 2>(),
      variant<Weights, 1, 2, 8, 2>(),  variant<Weights, 2, 2, 8, 2>(),  variant<Weights, 1, 4, 16, 1>(),
      variant<Weights, 2, 4, 16, 1>(), variant<Weights, 4, 4, 8, 1>(),  variant<Weights, 2, 4, 8, 2>(),
      variant<Weights, 2, 4, 8, 1>(),
      variant<Weights, 4, 1, 8, 1>(),  variant<Weights, 2, 1, 8, 1>(),  variant<Weights, 4, 2, 8, 1>(),
      variant<Weights, 2, 2, 8, 1>(),
  };
  const int column_tiles = n <= 8 ? 1 : n <= 16 ? 2 : 4;
  for (const Variant& v : variants)
    if (v.tiles_per_warp == c.tiles_per_warp && v.column_tiles == column_tiles && v.warps == c.warps &&
        v.ctas_per_sm == c.ctas_per_sm)
      return &v;
  return nullptr;
}

const Variant* find_variant(int n, const DirectConfig& c, bool raw) {
  return raw ? find_variant<Raw>(n, c) : find_variant<LanePlanar>(n, c);
}

int shared_limit(const DirectConfig& c) { return kSharedPerSm / c.ctas_per_sm - (c.ctas_per_sm > 1 ? 1024 : 0); }

DirectPlan plan_for(const Matrix& w, int n, const DirectConfig& c, bool raw, bool gated) {
  return raw ? plan_direct<Raw>(w, n, c.tiles_per_warp, c.warps, c.cluster, c.clusters, gated, shared_limit(c))
             : plan_direct<LanePlanar>(w, n, c.tiles_per_warp, c.warps, c.cluster, c.clusters, gated, shared_limit(c));
}

}  // namespace

int direct_shared_bytes(const Matrix& w, int n, const DirectConfig& c, bool raw, bool gated) {
  if (n < 1 || n > kDirectMaxN || c.cluster < 1 || c.cluster > 8 || c.clusters < 1 ||
      !find_variant(n, c, raw))
    return 0;
  const int group_rows = c.tiles_per_warp * kTileRows;
  if (c.clusters > (w.m + group_rows - 1) / group_rows >> gated) return 0;
  const int bytes = plan_for(w, n, c, raw, gated).bytes;
  return bytes <= shared_limit(c) ? bytes : 0;
}

namespace {

struct DirectLaunch : Launch {
  DirectLaunch(const DirectConfig& c, int shared_bytes, bool overlap, cudaStream_t stream)
      : Launch(dim3(c.clusters * c.cluster), c.warps * 32, shared_bytes, stream, c.cluster, overlap) {}
};

// A property of the function on the current device; setting it again costs nothing.
cudaError_t allow_shared(const Variant& v) {
  const int bytes = kSharedPerSm / v.ctas_per_sm - (v.ctas_per_sm > 1 ? 1024 : 0);
  return cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace

int direct_resident_clusters(const Matrix& w, int n, const DirectConfig& c) {
  const int bytes = direct_shared_bytes(w, n, c);
  if (!bytes) return 0;
  const Variant& v = *find_variant(n, c, false);
  const DirectLaunch launch(c, bytes, false, nullptr);
  int clusters = 0;
  if (allow_shared(v)) return 0;
  if (c.cluster == 1) {
    int device, sms;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return 0;
    return sms * c.ctas_per_sm;
  }
  if (cudaOccupancyMaxActiveClusters(&clusters, v.kernel, &launch.config)) return 0;
  return clusters;
}

cudaError_t launch_matmul_direct(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue,
                                 const DirectConfig& c, cudaStream_t stream, bool raw, bool overlap) {
  const int bytes = direct_shared_bytes(w, n, c, raw, epilogue.gated);
  if (!bytes) return cudaErrorInvalidValue;
  const Variant& v = *find_variant(n, c, raw);
  DirectArgs args = {w, x, n, overlap, plan_for(w, n, c, raw, epilogue.gated), epilogue};
  if (const cudaError_t error = allow_shared(v)) return error;
  const DirectLaunch launch(c, bytes, overlap, stream);
  void* parameters[] = {&args};
  return cudaLaunchKernelExC(&launch.config, v.kernel, parameters);
}

}  // namespace jaxzip::lane_planar
