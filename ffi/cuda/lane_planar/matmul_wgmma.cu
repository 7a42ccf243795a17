// Launch of the wgmma matmul: which kernels are compiled, the plan of a launch, the tensor map of x, and the launch itself.
#include "matmul_wgmma.h"

#include <cudaTypedefs.h>

#include <algorithm>

#include "matmul_wgmma.cuh"

namespace jaxzip::lane_planar {

WgmmaPlan plan_wgmma(const Matrix& w, int instruction_n, const WgmmaConfig& c, int plane_bytes, int limit) {
  WgmmaPlan p = {};
  p.groups = c.groups;
  p.k_groups = c.k_groups;
  p.teams = c.groups / c.k_groups;
  p.inverse_k_groups = inverse(p.k_groups);
  p.inverse_teams = inverse(p.teams);
  p.cluster = c.cluster;
  p.clusters = c.clusters;
  p.row_blocks = (w.m_blocks() + c.clusters - 1) / c.clusters;
  p.k_blocks = w.k_blocks() / c.cluster;
  p.k_longer = w.k_blocks() % c.cluster;
  p.items = kTiles * instruction_n / 8;
  p.owned = (p.items + c.cluster - 1) / c.cluster;
  const int sources = c.cluster * c.k_groups;
  p.received_bytes = sources > 1 ? sources * p.owned * kItemBytes : 0;

  const int chunks = p.k_blocks + (p.k_longer > 0), chunk = chunk_bytes(instruction_n);
  constexpr int kStageBytes = 16384, kMaxStageUnits = 8;
  p.stage_chunks = std::min(std::max(1, kStageBytes / (chunk * c.k_groups)), kMaxStageUnits) * c.k_groups;
  while ((chunks + p.stage_chunks - 1) / p.stage_chunks > kMaxStages && p.stage_chunks < 64) p.stage_chunks += c.k_groups;

  constexpr int kBytesInFlight = 72 * 1024;  // of an SM
  const int block = w.block_words * 4;
  const int enough = std::clamp(kBytesInFlight / (c.groups * c.ctas_per_sm * block) + 1, 3, kMaxRing);
  const int fixed = 4 * c.groups * plane_bytes + c.groups / c.k_groups * p.received_bytes + kBarrierBytes + kUnusedBytes;
  for (p.ring = c.ring ? c.ring : enough; p.ring >= 2; --p.ring) {
    const int left = limit - fixed - c.groups * p.ring * block;
    const int room = left / (chunk * p.stage_chunks), needed = (chunks + p.stage_chunks - 1) / p.stage_chunks;
    p.resident = left >= 0 && needed <= room && needed <= kMaxStages;
    p.stages = p.resident ? needed : std::min({room, needed - 1, kMaxStages});
    if (left >= 0 && (p.resident || p.stages >= kMinStages)) break;
    // A ring of single chunks before fewer bytes in flight.
    if (p.stage_chunks > c.k_groups) {
      p.stage_chunks = c.k_groups;
      ++p.ring;
    } else if (c.ring) {
      return p;
    }
  }
  if (p.ring < 2 || p.row_blocks + kMaxGroups > kMaxDivided || chunks + p.stage_chunks > kMaxDivided) return p;
  p.inverse_stage_chunks = inverse(p.stage_chunks);
  p.blocks = p.stages * p.stage_chunks * chunk;
  p.planes = p.blocks + c.groups * p.ring * block;
  p.received = p.planes + 4 * c.groups * plane_bytes;
  p.barriers = p.received + c.groups / c.k_groups * p.received_bytes;
  p.unused = p.barriers + kBarrierBytes;
  p.bytes = p.unused + kUnusedBytes;
  return p;
}

namespace {

constexpr int kSharedPerSm = 227 * 1024;

struct Variant {
  int n, threads;
  bool raw;
  const void* kernel;
};

template <class Weights, int kN, int kGroups, bool kOverlap>
Variant variant() {
  return {kN, kGroups * 128, !Weights::kHasEscapes, reinterpret_cast<const void*>(&matmul_wgmma<Weights, kN, kGroups * 128, kOverlap>)};
}

const Variant* find_variant(int n, bool raw) {
  static const Variant variants[] = {
      variant<LanePlanar, 8, 4, true>(),  variant<LanePlanar, 16, 4, true>(),  variant<LanePlanar, 32, 4, false>(),
      variant<LanePlanar, 64, 4, false>(), variant<LanePlanar, 128, 4, false>(), variant<LanePlanar, 256, 2, true>(),
      variant<Raw, 8, 4, true>(),         variant<Raw, 16, 4, true>(),         variant<Raw, 32, 4, false>(),
      variant<Raw, 64, 4, false>(),        variant<Raw, 128, 4, false>(),        variant<Raw, 256, 2, true>(),
  };
  for (const Variant& v : variants)
    if (v.raw == raw && n <= v.n) return &v;
  return nullptr;
}

int shared_limit(int ctas_per_sm) { return ctas_per_sm > 1 ? 228 * 1024 / ctas_per_sm - 1024 : kSharedPerSm; }

WgmmaPlan plan_for(const Matrix& w, const Variant& v, const WgmmaConfig& c) {
  return plan_wgmma(w, v.n, c, v.raw ? Raw::kPlaneBytes : LanePlanar::kPlaneBytes, shared_limit(c.ctas_per_sm));
}

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ||
        found != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// x[n][k] as [k / 64][n][64], so that one copy brings a stage, or as one [n][k] where k is ragged. What lies outside reads as zero.
bool make_x_map(CUtensorMap* map, const __nv_bfloat16* x, int n, int k, int instruction_n, int stage_chunks, bool whole_chunks) {
  const cuuint64_t row = static_cast<cuuint64_t>(k) * 2;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(whole_chunks ? kBlock : k), static_cast<cuuint64_t>(n),
                               static_cast<cuuint64_t>(whole_chunks ? k / kBlock : 1)};
  const cuuint64_t strides[2] = {row, whole_chunks ? kBlock * 2 : row * n};
  const cuuint32_t box[3] = {kBlock, static_cast<cuuint32_t>(instruction_n), static_cast<cuuint32_t>(whole_chunks ? stage_chunks : 1)};
  const cuuint32_t steps[3] = {1, 1, 1};
  return tensor_map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<__nv_bfloat16*>(x), sizes, strides, box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

struct Launch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  Launch(const WgmmaConfig& c, int shared_bytes, bool overlap, cudaStream_t stream) {
    config.gridDim = dim3(c.clusters * c.cluster);
    config.blockDim = dim3(c.groups * 128);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (c.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(c.cluster), 1, 1};
    }
    if (overlap) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
  }
};

}  // namespace

int wgmma_shared_bytes(const Matrix& w, int n, const WgmmaConfig& c, bool raw) {
  if (n < 1 || n > kWgmmaMaxN || c.cluster < 1 || c.cluster > 8 || c.clusters < 1 || c.clusters > w.m_blocks() || c.groups < 1 ||
      c.k_groups < 1 || c.groups % c.k_groups || c.ctas_per_sm < 1 || w.k_blocks() / c.cluster < c.k_groups)
    return 0;
  const Variant* v = find_variant(n, raw);
  if (!v || c.groups * 128 > v->threads) return 0;
  return plan_for(w, *v, c).bytes;
}

int wgmma_resident_clusters(const Matrix& w, int n, const WgmmaConfig& c) {
  const int bytes = wgmma_shared_bytes(w, n, c);
  if (!bytes) return 0;
  const Variant& v = *find_variant(n, false);
  if (cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedPerSm)) return 0;
  int clusters = 0;
  if (c.cluster == 1) {
    int device, sms;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, v.kernel, c.groups * 128, bytes))
      return 0;
    return sms * clusters;
  }
  Launch launch(c, bytes, false, nullptr);
  if (cudaOccupancyMaxActiveClusters(&clusters, v.kernel, &launch.config)) return 0;
  return clusters;
}

cudaError_t launch_matmul_wgmma(const Matrix& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, const WgmmaConfig& c,
                                cudaStream_t stream, bool raw, bool overlap) {
  const int bytes = wgmma_shared_bytes(w, n, c, raw);
  if (!bytes) return cudaErrorInvalidValue;
  const Variant& v = *find_variant(n, raw);
  WgmmaArgs args = {{}, w, x, epilogue, n, overlap, XLoad::kPlain, plan_for(w, v, c)};
  if (w.k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    if (!tensor_map_encoder()) return cudaErrorNotSupported;
    args.x_load = w.k % kBlock == 0 ? XLoad::kStage : XLoad::kChunk;
    if (!make_x_map(&args.x_map, x, n, w.k, v.n, args.plan.stage_chunks, args.x_load == XLoad::kStage)) return cudaErrorInvalidValue;
  }
  // A property of the function on the current device; setting it again costs nothing.
  if (const cudaError_t error = cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedPerSm)) return error;
  Launch launch(c, bytes, overlap, stream);
  void* parameters[] = {&args};
  return cudaLaunchKernelExC(&launch.config, v.kernel, parameters);
}

}  // namespace jaxzip::lane_planar
