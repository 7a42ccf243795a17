// The fused product. Blocks of the weight, row by row, are cut into one contiguous range a CTA and, inside it, one a warp. A warp
// streams its range through a ring of two stages of its own, so that warps never wait for each other until the end.
//
// Sums of a row block: a warp that covers it whole stores results; else its part goes to shared memory (the row block that the
// warp's range ends in) or to the workspace (one that it ends, begun by an earlier warp), the CTA adds the parts in the order
// of k, and what the CTA does not have whole goes to the workspace for the second kernel, which adds in the order of k again.
#include <algorithm>

#include "decode.cuh"
#include "epilogue.cuh"
#include "matmul.h"

namespace jaxzip::tca_tbe {
namespace {

constexpr int kMaxWarps = 16;

template <int kColumnTiles>
struct Shape {
  static constexpr int columns = 8 * kColumnTiles;
  static constexpr int x_bytes = columns * layout::kBlock * 2;       // of one block's k
  static constexpr int quads = kBands * kColumnTiles;                // float4 a lane and row block
  static constexpr int part_bytes = quads * 32 * 16;
  static constexpr int warp_bytes = kStages * kStageBytes + kScratchBytes + x_bytes;
  static constexpr int max_warps = kColumnTiles == 4 ? 12 : kMaxWarps;  // registers: 168 and 128 a thread
  static_assert(part_bytes <= warp_bytes, "parts take the place of the ring");
};

struct Arguments {
  Source source;
  const uint32_t* raw;
  const __nv_bfloat16* x;
  Epilogue epilogue;
  float* workspace;  // [column group][row block or 2 * CTA + ...][part]
  int m, k, n, k_blocks, row_blocks;
  int share, extra;  // blocks a CTA; the first `extra` CTAs have one more
  bool x_aligned;
};

__device__ __forceinline__ int cta_start(const Arguments& g, int cta) { return cta * g.share + min(cta, g.extra); }

// The chunk of x for one block, [columns][64], 16-byte pieces swizzled by column; zeros outside x.
template <int kColumnTiles>
__device__ __forceinline__ void copy_x(const Arguments& g, int column0, int k_block, uint32_t to, int lane) {
  const int k0 = k_block * layout::kBlock;
  if (g.x_aligned) {
#pragma unroll
    for (int i = 0; i < Shape<kColumnTiles>::columns / 4; ++i) {
      const int column = i * 4 + lane / 8, piece = lane % 8;
      const bool valid = column0 + column < g.n && k0 + piece * 8 < g.k;
      const __nv_bfloat16* from = valid ? g.x + static_cast<size_t>(column0 + column) * g.k + k0 + piece * 8 : g.x;
      copy_async_16(to + column * 128 + ((piece ^ (column & 7)) << 4), from, valid ? 16 : 0);
    }
    return;
  }
  const uint16_t* x = reinterpret_cast<const uint16_t*>(g.x);
  for (int i = lane; i < Shape<kColumnTiles>::columns * 64; i += 32) {
    const int column = i / 64, k = i % 64;
    const bool valid = column0 + column < g.n && k0 + k < g.k;
    const uint32_t v = valid ? x[static_cast<size_t>(column0 + column) * g.k + k0 + k] : 0;
    store_half(to + column * 128 + ((k / 8 ^ (column & 7)) << 4) + k % 8 * 2, v);
  }
}

template <int kColumnTiles>
__device__ __forceinline__ float* closing_part(const Arguments& g, int row_block) {
  const int64_t parts = static_cast<int64_t>(blockIdx.y) * (g.row_blocks + 2 * kMaxCtas) + row_block;
  return g.workspace + parts * (Shape<kColumnTiles>::part_bytes / 4);
}
// Of a CTA: 0 for the row block that an earlier CTA began, 1 for the one that it begins and does not end.
template <int kColumnTiles>
__device__ __forceinline__ float* cta_part(const Arguments& g, int cta, int which) {
  return closing_part<kColumnTiles>(g, g.row_blocks + 2 * cta + which);
}

__device__ __forceinline__ void add(float4& a, float4 b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; }

template <int kColumnTiles>
struct Sums {
  float c[kBands][kColumnTiles][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int b = 0; b < kBands; ++b)
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[b][t][i] = 0;
  }
  template <class Store>
  __device__ __forceinline__ void each_quad(Store&& store) const {
#pragma unroll
    for (int q = 0; q < kBands * kColumnTiles; ++q) {
      const float* v = c[q / kColumnTiles][q % kColumnTiles];
      store(q, make_float4(v[0], v[1], v[2], v[3]));
    }
  }
};

template <int kColumnTiles, bool kRaw>
__global__ void __launch_bounds__(32 * Shape<kColumnTiles>::max_warps, 1) product(const __grid_constant__ Arguments g) {
  using S = Shape<kColumnTiles>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int first = cta_start(g, blockIdx.x), length = cta_start(g, blockIdx.x + 1) - first;
  const int warp_share = length / warps, warp_extra = length - warp_share * warps;
  const auto warp_start = [&](int w) { return first + w * warp_share + min(w, warp_extra); };
  const int begin = warp_start(warp), end = warp_start(warp + 1), blocks = g.row_blocks * g.k_blocks;
  const int column0 = blockIdx.y * S::columns;
  const uint32_t own = shared_address(shared) + warp * S::warp_bytes, scratch = own + kStages * kStageBytes;
  const uint32_t chunk = scratch + kScratchBytes;  // of x
  launch_dependents();

  const uint32_t exponent = kRaw ? 0 : *g.source.start_exp * 0x00800080u;
  const Ring ring(own, scratch, lane);
  Offsets offsets;
  Bitmaps bits;
  int row_block = begin / g.k_blocks, k_block = begin - row_block * g.k_blocks;
  const auto copy = [&](int block) {
    if (block < end) {
      if constexpr (!kRaw) {
        if (!offsets.holds(block)) offsets.load(g.source, block, blocks, lane);
        ring.copy(g.source, block - begin, offsets.at(block), offsets.at(block + 1), lane);
      }
    }
    copy_async_commit();
  };
  if (begin < end) {
    if constexpr (!kRaw) {
      offsets.load(g.source, begin, blocks, lane);
      bits.aim(g.source, begin, lane);
#pragma unroll
      for (int band = 0; band < kBands; ++band) bits.load_band(band);
    }
    copy_x<kColumnTiles>(g, column0, k_block, chunk, lane);
#pragma unroll
    for (int i = 0; i < kStages; ++i) copy(begin + i);
  }

  Sums<kColumnTiles> sums;
  sums.clear();
  const Reader read(scratch, lane);
  bool whole = k_block == 0;  // the sums' row block was begun by this warp
  for (int block = begin; block < end; ++block) {
    const uint32_t stage = ring.stage(block - begin);
    copy_async_wait<kStages - 1>();
    if constexpr (!kRaw) ring.wait(block - begin);
    __syncwarp();
    uint32_t b[kColumnTiles][8];
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = lane % 8, piece = half * 4 + lane / 8;
        load_matrices(&b[t][4 * half], chunk + t * 1024 + column * 128 + ((piece ^ column) << 4));
      }
    __syncwarp();
    const int next_k = k_block + 1 == g.k_blocks ? 0 : k_block + 1;
    if (block + 1 < end) copy_x<kColumnTiles>(g, column0, next_k, chunk, lane);
    copy_async_commit();
    Ranks ranks;
    const uint16_t* fallbacks = nullptr;
    int64_t fallbacks_left = 0;
    if constexpr (!kRaw) {
      ranks.count(bits, lane);
      bits.aim(g.source, min(block + 1, end - 1), lane);
      if (layout::kBlockSize - ranks.inside > kFullStaged) {
        const int64_t start = g.source.tile_offsets[block].y;
        fallbacks = g.source.full + start, fallbacks_left = g.source.full_len - start;
      }
    }
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      if constexpr (!kRaw) {
        fill_plane(bits.b[band], ranks.before[band], band, exponent, stage, scratch, fallbacks, fallbacks_left, lane);
        bits.load_band(band);
        __syncwarp();
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[4];
        if constexpr (kRaw) {
          const uint4 v = load_stream(reinterpret_cast<const uint4*>(g.raw) + (int64_t{block} * 16 + band * kTiles + tile) * 32 + lane);
          a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
        } else {
          read(tile, a);
        }
#pragma unroll
        for (int t = 0; t < kColumnTiles; ++t) mma(sums.c[band][t], a, b[t][2 * tile], b[t][2 * tile + 1]);
      }
      if constexpr (!kRaw) __syncwarp();
    }
    __syncwarp();
    copy(block + kStages);
    k_block = next_k;
    if (next_k == 0) {
      if (whole) {
        sums.each_quad([&](int q, float4 v) {
          store_quad<kColumnTiles>(g.epilogue, g.m, g.n, row_block * layout::kBlock, column0, q, lane, v);
        });
      } else {
        float4* part = reinterpret_cast<float4*>(closing_part<kColumnTiles>(g, row_block));
        sums.each_quad([&](int q, float4 v) { part[q * 32 + lane] = v; });
      }
      sums.clear();
      whole = true;
      ++row_block;
    }
  }
  copy_async_wait<0>();
  __syncwarp();
  sums.each_quad([&](int q, float4 v) { store_16(own + (q * 32 + lane) * 16, v); });
  __syncthreads();

  // Row blocks that no warp had whole.
  if (length == 0) return;
  const int last_row = (first + length - 1) / g.k_blocks;
  for (int row = first / g.k_blocks; row <= last_row; ++row) {
    const int row_begin = row * g.k_blocks, row_end = row_begin + g.k_blocks;
    int w0 = 0, w1 = warps;  // the warps with a part
    while (warp_start(w0 + 1) <= row_begin) ++w0;
    while (warp_start(w1 - 1) >= row_end) --w1;
    if (warp_start(w0) <= row_begin && row_end <= warp_start(w0 + 1)) continue;
    for (int i = threadIdx.x; i < S::quads * 32; i += blockDim.x) {
      float4 v = make_float4(0, 0, 0, 0);
      for (int w = w0; w < w1; ++w) {
        if (warp_start(w) == warp_start(w + 1)) continue;
        const bool ends = warp_start(w + 1) >= row_end;
        add(v, ends ? reinterpret_cast<const float4*>(closing_part<kColumnTiles>(g, row))[i]
                    : reinterpret_cast<const float4*>(shared + w * S::warp_bytes)[i]);
      }
      const bool begun_here = first <= row_begin, ended_here = row_end <= first + length;
      if (begun_here && ended_here) {
        store_quad<kColumnTiles>(g.epilogue, g.m, g.n, row * layout::kBlock, column0, i / 32, i % 32, v);
      } else {
        reinterpret_cast<float4*>(cta_part<kColumnTiles>(g, blockIdx.x, begun_here))[i] = v;
      }
    }
  }
}

// CTA i: the row block that the border between CTAs i and i + 1 of the product cuts, unless an earlier border cuts it too.
template <int kColumnTiles>
__global__ void add_parts(const __grid_constant__ Arguments g, int ctas) {
  using S = Shape<kColumnTiles>;
  wait_for_previous_grid();
  const int before = blockIdx.x, border = cta_start(g, before + 1), row = border / g.k_blocks;
  const int row_begin = row * g.k_blocks, row_end = row_begin + g.k_blocks;
  if (border == row_begin || cta_start(g, before) > row_begin) return;
  for (int i = threadIdx.x; i < S::quads * 32; i += blockDim.x) {
    float4 v = reinterpret_cast<const float4*>(cta_part<kColumnTiles>(g, before, 1))[i];
    for (int cta = before + 1; cta < ctas && cta_start(g, cta) < row_end; ++cta)
      add(v, reinterpret_cast<const float4*>(cta_part<kColumnTiles>(g, cta, 0))[i]);
    store_quad<kColumnTiles>(g.epilogue, g.m, g.n, row * layout::kBlock, blockIdx.y * S::columns, i / 32, i % 32, v);
  }
}

template <int kColumnTiles, bool kRaw>
cudaError_t launch(Arguments& g, const MatmulOptions& options, cudaStream_t stream) {
  using S = Shape<kColumnTiles>;
  int device, multiprocessors, shared_limit, major;
  cudaError_t status = cudaGetDevice(&device);
  const auto get = [&](int* to, cudaDeviceAttr what) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(to, what, device);
  };
  get(&multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&major, cudaDevAttrComputeCapabilityMajor);
  if (status != cudaSuccess) return status;
  int warps = std::min(S::max_warps, shared_limit / S::warp_bytes);
  if (options.max_warps > 0) warps = std::min(warps, options.max_warps);
  const int bytes = warps * S::warp_bytes;
  const auto kernel = product<kColumnTiles, kRaw>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;

  const int64_t blocks = int64_t{g.row_blocks} * g.k_blocks;
  int ctas = std::min(kMaxCtas, options.max_ctas > 0 ? options.max_ctas : multiprocessors);
  ctas = static_cast<int>(std::min<int64_t>(ctas, blocks));
  g.share = static_cast<int>(blocks / ctas);
  g.extra = static_cast<int>(blocks % ctas);
  const unsigned groups = (g.n + S::columns - 1) / S::columns;
  kernel<<<dim3(ctas, groups), 32 * warps, bytes, stream>>>(g);
  status = cudaGetLastError();
  const bool cut = g.extra || g.share % g.k_blocks;
  if (status != cudaSuccess || ctas == 1 || !cut) return status;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas - 1, groups);
  config.blockDim = dim3(S::quads * 32);
  config.stream = stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = options.overlap && major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, add_parts<kColumnTiles>, g, ctas);
}

}  // namespace

cudaError_t launch_matmul(const Payload& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, float* workspace,
                          cudaStream_t stream, const MatmulOptions& options, const uint32_t* raw) {
  const int64_t blocks = w.m > 0 && w.k > 0 ? layout::NumBlocks(w.m, w.k) : 0;
  if (w.m < 1 || w.k < 1 || w.m > INT32_MAX - 64 || w.k > INT32_MAX - 64 || blocks > INT32_MAX / 32 || n < 1 || n > kMaxColumns)
    return cudaErrorInvalidValue;
  Arguments g = {};
  g.source = MakeSource(w);
  g.raw = raw;
  g.x = x;
  g.epilogue = epilogue;
  g.workspace = workspace;
  g.m = static_cast<int>(w.m), g.k = static_cast<int>(w.k), g.n = n;
  g.k_blocks = static_cast<int>(layout::CeilDiv(w.k, layout::kBlock));
  g.row_blocks = static_cast<int>(layout::CeilDiv(w.m, layout::kBlock));
  g.x_aligned = w.k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const auto run = [&](auto tiles) {
    constexpr int kColumnTiles = decltype(tiles)::value;
    return raw ? launch<kColumnTiles, true>(g, options, stream) : launch<kColumnTiles, false>(g, options, stream);
  };
  if (n <= 8) return run(std::integral_constant<int, 1>());
  if (n <= 16) return run(std::integral_constant<int, 2>());
  return run(std::integral_constant<int, 4>());
}

}  // namespace jaxzip::tca_tbe
