// A gated activation of a row's two halves.
#include <algorithm>

#include "rows.cuh"
#include "rows.h"

namespace jaxzip::decode_chain {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxGrid = 528;  // four a multiprocessor of an H200: more only queue

// Rows of `features` whole vectors.
__global__ void __launch_bounds__(kThreads) gated(const uint4* x, uint4* y, int n, int features, Activation activation) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grid();
  const auto of = [&](uint32_t gates, uint32_t ups) { return gated_activation(activation, gates, ups); };
  const int total = n * features;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    const uint4* gate_at = x + i + static_cast<size_t>(i / features) * features;
    const uint4 gate = gate_at[0], up = gate_at[features];
    y[i] = make_uint4(of(gate.x, up.x), of(gate.y, up.y), of(gate.z, up.z), of(gate.w, up.w));
  }
}

__global__ void __launch_bounds__(kThreads) gated_plain(const __nv_bfloat16* x, __nv_bfloat16* y, int n, int features, Activation activation) {
  ptx::launch_dependents();
  ptx::wait_for_previous_grid();
  const size_t total = static_cast<size_t>(n) * features;
  for (size_t i = blockIdx.x * static_cast<size_t>(kThreads) + threadIdx.x; i < total; i += static_cast<size_t>(gridDim.x) * kThreads) {
    const __nv_bfloat16* gate = x + i + i / features * features;
    y[i] = __float2bfloat16_rn(gated_activation(activation, __bfloat162float(gate[0]), __bfloat162float(gate[features])));
  }
}

}  // namespace

cudaError_t launch_gated_activation(Activation activation, const __nv_bfloat16* x, __nv_bfloat16* y, int n, int features, cudaStream_t stream,
                                    bool overlap) {
  const bool vectors = whole_vectors(features, x, y) && static_cast<long long>(n) * (features / kVector) < INT32_MAX;
  const long long work = static_cast<long long>(n) * (vectors ? features / kVector : features);
  const int grid = static_cast<int>(std::min<long long>((work + kThreads - 1) / kThreads, kMaxGrid));
  if (vectors)
    return launch(gated, grid, kThreads, stream, overlap, reinterpret_cast<const uint4*>(x), reinterpret_cast<uint4*>(y), n,
                  features / kVector, activation);
  return launch(gated_plain, grid, kThreads, stream, overlap, x, y, n, features, activation);
}

}  // namespace jaxzip::decode_chain
