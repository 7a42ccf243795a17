// Launch of the grouped matmul: which kernels are compiled, which one a shape gets, and the launch itself.
#include "matmul_ragged.h"

#include <algorithm>

#include "matmul_ragged.cuh"

namespace jaxzip::lane_planar {
namespace {

constexpr int kMostShared = 227 * 1024;
constexpr int kSms = 132;  // of an H200, on which these were measured
constexpr int kLongK = 128, kFewWarpsPerSm = 7;

struct Variant {
  RaggedConfig config;
  const void* kernel;
  RaggedPlan (*plan)(int experts, int warps);
};

template <class Weights, int kTilesPerWarp, int kColumnTiles, int kWarps, int kTeams>
Variant variant() {
  return {{kTilesPerWarp, kColumnTiles, kWarps, kTeams},
          reinterpret_cast<const void*>(&matmul_ragged<Weights, kTilesPerWarp, kColumnTiles, kWarps, kTeams>),
          &RaggedShape<Weights, kTilesPerWarp, kColumnTiles>::plan};
}

template <class Weights>
const Variant* find_variant(const RaggedConfig& c) {
  static const Variant variants[] = {
      variant<Weights, 2, 1, 4, 4>(), variant<Weights, 4, 1, 4, 4>(), variant<Weights, 4, 2, 4, 4>(), variant<Weights, 4, 4, 4, 2>(),
      variant<Weights, 2, 1, 8, 2>(), variant<Weights, 4, 1, 8, 2>(), variant<Weights, 4, 2, 8, 2>(), variant<Weights, 4, 4, 8, 1>(),
  };
  for (const Variant& v : variants)
    if (v.config.tiles_per_warp == c.tiles_per_warp && v.config.column_tiles == c.column_tiles && v.config.warps == c.warps &&
        v.config.teams == c.teams)
      return &v;
  return nullptr;
}

const Variant* find_variant(const RaggedConfig& c, bool raw) { return raw ? find_variant<Raw>(c) : find_variant<LanePlanar>(c); }

}  // namespace

int ragged_shared_bytes(const Stack& w, const RaggedConfig& c, bool raw) {
  const Variant* v = find_variant(c, raw);
  if (!v || w.experts < 1 || w.experts > kRaggedMaxExperts) return 0;
  const int bytes = v->plan(w.experts, c.warps * c.teams).bytes;
  return bytes <= kMostShared ? bytes : 0;
}

RaggedConfig choose_ragged(const Stack& w, int n) {
  // A team of eight needs fewer items to fill the GPU, but its warps wait for each other more often.
  const int warps = w.first.k_blocks() >= kLongK ? 8 : 4;
  // Most experts have a row or two where some have ten: 16 columns cost 1% more than 8, a second pass over an expert 100%.
  const int column_tiles = n <= 8 ? 1 : n <= 16 * w.experts ? 2 : 4;
  // The warps that the row groups of 64 rows keep busy, if no two rows of x meet at an expert.
  const long long busy = static_cast<long long>(std::min(n, w.experts)) * w.first.m_blocks() * warps;
  const bool few = column_tiles == 1 && busy <= kFewWarpsPerSm * kSms;
  return {few ? 2 : 4, column_tiles, warps, (column_tiles == 4 ? 8 : 16) / warps};
}

cudaError_t launch_matmul_ragged(const Stack& w, const Groups& groups, void* y, bool fp32_out, const RaggedConfig& c,
                                 cudaStream_t stream, bool raw) {
  const int bytes = ragged_shared_bytes(w, c, raw);
  const bool rows_fit = groups.n >= 0 && groups.n <= kRaggedMaxRows;
  const bool pitch_fits = groups.pitch % 8 == 0 && groups.pitch >= w.first.k && groups.pitch <= w.first.k_blocks() * kBlock;
  if (!bytes || !rows_fit || !pitch_fits || (reinterpret_cast<uintptr_t>(groups.x) & 15)) return cudaErrorInvalidValue;
  if (groups.n == 0) return cudaSuccess;
  const Variant& v = *find_variant(c, raw);
  int device, sms;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return error;
  if (const cudaError_t error = cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared))
    return error;
  const int group_rows = c.tiles_per_warp * kTileRows;
  RaggedArgs args = {w.first, groups, w.experts, (w.first.m + group_rows - 1) / group_rows, v.plan(w.experts, c.warps * c.teams),
                     {y, fp32_out, nullptr, nullptr}};
  void* parameters[] = {&args};
  return cudaLaunchKernel(v.kernel, dim3(sms), dim3(c.warps * c.teams * 32), parameters, bytes, stream);
}

}  // namespace jaxzip::lane_planar
