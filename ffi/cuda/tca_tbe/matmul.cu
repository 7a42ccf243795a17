// The fused product. Blocks of the weight, row by row, are cut into one contiguous range a CTA and, inside it, one a warp. A warp
// streams its range through a ring of two stages of its own, so that warps never wait for each other until the end.
//
// Sums of a row block: a warp that covers it whole stores results; else its part goes to shared memory (the row block that the
// warp's range ends in) or to the workspace (one that it ends, begun by an earlier warp), the CTA adds the parts in the order
// of k, and what the CTA does not have whole goes to the workspace for the second kernel, which adds in the order of k again.
#include <algorithm>

#include "../launch.h"
#include "../tensor_maps.h"
#include "columns.cuh"
#include "decode.cuh"
#include "epilogue.cuh"
#include "matmul.h"

namespace jaxzip::tca_tbe {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kFragRows = layout::kBlock / layout::kFrag;  // rows of FragTiles in a block

template <int kColumns>  // of x: 8, 16 or 32
struct Shape {
  static constexpr int tiles = Columns<kColumns>::tiles, halves = Columns<kColumns>::halves;
  static constexpr int pairs = kFragRows * tiles * halves;  // float2 a lane and row block
  static constexpr int part_bytes = pairs * 32 * 8;
  static constexpr int warp_bytes = whole_lines(kStages * kStageBytes + kScratchBytes + Columns<kColumns>::shared_bytes);
  static constexpr int max_warps = kColumns == 32 ? 12 : kMaxWarps;  // registers: 168 and 128 a thread
  static_assert(part_bytes <= warp_bytes, "parts take the place of the ring");
};

struct Arguments {
  Source source;
  const uint4* raw;
  Activations x;
  Epilogue epilogue;
  float* workspace;  // [column group][row block or 2 * CTA + ...][part]
  int m, k, n, k_blocks, row_blocks;
  int share, extra;  // blocks a CTA; the first `extra` CTAs have one more
};

__device__ __forceinline__ int cta_start(const Arguments& g, int cta) { return cta * g.share + min(cta, g.extra); }

// A band's weights, as the B operand of two rows of FragTiles: of row g of each the k that x has there, see `Columns`.
template <int kColumns>
struct Band {
  static constexpr bool kInOrder = Columns<kColumns>::shared_bytes > 0;  // of k
  uint32_t w[4][4];
  // Of the m-th row of FragTiles for x's i-th operand.
  __device__ __forceinline__ const uint32_t* operand(int i, int m) const { return kInOrder ? w[i] + 2 * m : w[i / 2 * 2 + m] + i % 2 * 2; }
  // From a plane, see `Decoder`; FragTile 2 c + m of a band has 8 k, those from 8 c on.
  __device__ __forceinline__ void load(uint32_t plane, int lane) {
    if constexpr (kInOrder) {
      const uint32_t of_lane = plane + (lane / 16 + lane / 8 % 2 * 2) * kFragBytes + lane % 8 * kRowBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrices(w[i], of_lane + 4 * i * kFragBytes);
    } else {
      const uint32_t of_lane = plane + lane % 4 * (2 * kFragBytes) + lane / 4 * kRowBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) set(i, load_16(of_lane + (i / 2 * 8 + i % 2) * kFragBytes));
    }
  }
  // The same from the control's FragTiles in global memory, 128 bytes each.
  __device__ __forceinline__ void load(const uint4* frags, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kInOrder) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(frags) + lane;
#pragma unroll
        for (int j = 0; j < 4; ++j) w[i][j] = load_stream(words + (4 * i + j / 2 + j % 2 * 2) * 32);
      } else {
        set(i, load_stream(frags + lane % 4 * 16 + lane / 4 + (i / 2 * 8 + i % 2) * 8));
      }
    }
  }

 private:
  __device__ __forceinline__ void set(int i, uint4 v) { w[i][0] = v.x, w[i][1] = v.y, w[i][2] = v.z, w[i][3] = v.w; }
};

template <int kColumns>
__device__ __forceinline__ float* closing_part(const Arguments& g, int row_block) {
  const int64_t parts = static_cast<int64_t>(blockIdx.y) * (g.row_blocks + 2 * kMaxCtas) + row_block;
  return g.workspace + parts * (Shape<kColumns>::part_bytes / 4);
}
// Of a CTA: 0 for the row block that an earlier CTA began, 1 for the one that it begins and does not end.
template <int kColumns>
__device__ __forceinline__ float* cta_part(const Arguments& g, int cta, int which) {
  return closing_part<kColumns>(g, g.row_blocks + 2 * cta + which);
}

__device__ __forceinline__ void add(float2& a, float2 b) { a.x += b.x, a.y += b.y; }

template <int kColumns>
struct Sums {
  using S = Shape<kColumns>;
  float c[kFragRows][S::tiles][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kFragRows; ++r)
#pragma unroll
      for (int t = 0; t < S::tiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[r][t][i] = 0;
  }
  __device__ __forceinline__ void add(int band, const Columns<kColumns>& x, const Band<kColumns>& weights) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int t = 0; t < S::tiles; ++t)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t* w = weights.operand(i, m);
          mma(c[2 * band + m][t], x.a[t][i], w[0], w[1]);
        }
  }
  // Two neighbouring rows of the weight at a time.
  template <class Store>
  __device__ __forceinline__ void each_pair(Store&& store) const {
#pragma unroll
    for (int p = 0; p < S::pairs; ++p) {
      const int column_tile = p % (S::tiles * S::halves), half = column_tile % 2;
      const float* v = c[p / (S::tiles * S::halves)][column_tile / 2];
      store(p, make_float2(v[2 * half], v[2 * half + 1]));
    }
  }
};

template <int kColumns, bool kRaw>
__global__ void __launch_bounds__(32 * Shape<kColumns>::max_warps, 1) product(const __grid_constant__ Arguments g) {
  using S = Shape<kColumns>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = warp_index(), warps = blockDim.x / 32;
  const int first = cta_start(g, blockIdx.x), length = cta_start(g, blockIdx.x + 1) - first;
  const int warp_share = length / warps, warp_extra = length - warp_share * warps;
  const auto warp_start = [&](int w) { return first + w * warp_share + min(w, warp_extra); };
  const auto warp_of = [&](int block) {  // that has this block of the CTA's
    const int b = block - first, larger = warp_extra * (warp_share + 1);
    return b < larger ? b / (warp_share + 1) : warp_extra + (b - larger) / max(warp_share, 1);
  };
  const int begin = warp_start(warp), end = warp_start(warp + 1), blocks = g.row_blocks * g.k_blocks;
  const int column0 = blockIdx.y * kColumns;
  const uint32_t own = shared_address(shared) + warp * S::warp_bytes, its_x = own + kStages * kStageBytes;
  const uint32_t scratch = its_x + Columns<kColumns>::shared_bytes;
  launch_dependents();

  const uint32_t plane = scratch + 3 * kBitmapBytes;
  int row_block = begin / g.k_blocks, k_block = begin - row_block * g.k_blocks;
  Columns<kColumns> x(g.x, column0, its_x, lane);
  constexpr bool kXWithBlock = Columns<kColumns>::shared_bytes > 0;  // its copy is one of the block's
  if (!kXWithBlock && begin < end) x.fetch(g.x, column0, k_block, lane);
  const uint32_t start_exp = kRaw ? 0 : *g.source.start_exp;
  const Ring ring(own, scratch, lane);
  Runs runs, next_runs;  // of 32 blocks from `runs_from` on, one a lane; of the last block whose copies were started
  int runs_from = begin;
  const auto load_runs = [&](int block) {
    runs_from = block, runs.load(g.source, min(block + lane, blocks), min(block + lane + 1, blocks));
  };
  const auto copy = [&](int block, int k_block) {
    if (block >= end) return;
    if constexpr (!kRaw) {
      if (block - runs_from == 32) load_runs(block);
      next_runs = runs.of_lane(block - runs_from, lane);
      ring.copy(g.source, block - begin, block, next_runs, lane, kXWithBlock ? x.expected_bytes(g.x) : 0);
    }
    if constexpr (kXWithBlock) x.fetch(g.x, column0, k_block, lane, kRaw ? 0 : ring.barrier(block - begin));
  };
  if constexpr (!kRaw) {
    if (begin < end) load_runs(begin);
  }
  copy(begin, k_block);

  Sums<kColumns> sums;
  sums.clear();
  Decoder decoder(start_exp, plane, lane);
  bool whole = k_block == 0;  // the sums' row block was begun by this warp
  for (int block = begin; block < end; ++block) {
    const uint32_t turn = block - begin;
    const int next_k = k_block + 1 == g.k_blocks ? 0 : k_block + 1;
    Bitmaps bits;
    Ranks ranks;
    if constexpr (kRaw) {
      copy_async_wait();
      __syncwarp();
    } else {
      ring.wait(turn);
      bits.load(ring.bitmaps, lane);
    }
    if constexpr (kXWithBlock) x.arrange(g.x, lane);
    __syncwarp();
    const Runs its_runs = next_runs;
    copy(block + 1, next_k);
    if constexpr (!kRaw) {
      ranks.count(bits);
      decoder.begin_block(g.source, block, ring.stage(turn), its_runs, ranks, lane);
    }
    Band<kColumns> weights;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      const auto add_last = [&] {
        if (band > 0) sums.add(band - 1, x, weights);
      };
      if constexpr (kRaw) {
        add_last();
        weights.load(g.raw + (int64_t{block} * kBands + band) * layout::kFragsPerBand * 8, lane);
      } else {
        decoder.band(bits.b[band], ranks.before[band], band, lane, add_last);
        __syncwarp();
        weights.load(plane, lane);
        __syncwarp();
      }
      if (!kXWithBlock && band == 0) x.arrange(g.x, lane);
      if (!kXWithBlock && band == 2 && block + 1 < end) x.fetch(g.x, column0, next_k, lane);
    }
    sums.add(kBands - 1, x, weights);
    k_block = next_k;
    if (next_k == 0) {
      if (whole) {
        sums.each_pair([&](int p, float2 v) {
          store_pair<kColumns>(g.epilogue, g.m, g.n, row_block * layout::kBlock, column0, p, lane, v);
        });
      } else {
        float2* part = reinterpret_cast<float2*>(closing_part<kColumns>(g, row_block));
        sums.each_pair([&](int p, float2 v) { part[p * 32 + lane] = v; });
      }
      sums.clear();
      whole = true;
      ++row_block;
    }
  }
  __syncwarp();
  sums.each_pair([&](int p, float2 v) { store_8(own + (p * 32 + lane) * 8, v); });
  __syncthreads();

  // Row blocks that no warp had whole.
  if (length == 0) return;
  const int last_row = (first + length - 1) / g.k_blocks;
  for (int row = first / g.k_blocks; row <= last_row; ++row) {
    const int row_begin = row * g.k_blocks, row_end = row_begin + g.k_blocks;
    const int w0 = warp_of(max(row_begin, first)), w1 = warp_of(min(row_end, first + length) - 1) + 1;  // the warps with a part
    if (warp_start(w0) <= row_begin && row_end <= warp_start(w0 + 1)) continue;
    const bool ended = warp_start(w1) >= row_end;  // by the last of them, which has put its part elsewhere
    for (int i = threadIdx.x; i < S::pairs * 32; i += blockDim.x) {
      float2 closing = make_float2(0, 0), v = closing;
      if (ended) closing = reinterpret_cast<const float2*>(closing_part<kColumns>(g, row))[i];
#pragma unroll 4
      for (int w = w0; w < w1 - ended; ++w) add(v, reinterpret_cast<const float2*>(shared + w * S::warp_bytes)[i]);
      if (ended) add(v, closing);
      const bool begun_here = first <= row_begin, ended_here = row_end <= first + length;
      if (begun_here && ended_here) {
        store_pair<kColumns>(g.epilogue, g.m, g.n, row * layout::kBlock, column0, i / 32, i % 32, v);
      } else {
        reinterpret_cast<float2*>(cta_part<kColumns>(g, blockIdx.x, begun_here))[i] = v;
      }
    }
  }
}

constexpr int kAddThreads = 256;

// CTA (i, column group, part): the row block that the border between CTAs i and i + 1 of the product cuts, unless an earlier border
// cuts it too; a pair of sums a thread.
template <int kColumns>
__global__ void __launch_bounds__(kAddThreads) add_parts(const __grid_constant__ Arguments g, int ctas) {
  wait_for_previous_grid();
  const int before = blockIdx.x, border = cta_start(g, before + 1), row = border / g.k_blocks;
  const int row_begin = row * g.k_blocks, row_end = row_begin + g.k_blocks;
  if (border == row_begin || cta_start(g, before) > row_begin) return;
  const int i = blockIdx.z * kAddThreads + threadIdx.x;
  const auto part = [&](int cta, int which) { return reinterpret_cast<const float2*>(cta_part<kColumns>(g, cta, which))[i]; };
  float2 v = part(before, 1);
  const float2 next = part(before + 1, 0);
  add(v, next);
  for (int cta = before + 2; cta < ctas && cta_start(g, cta) < row_end; ++cta) add(v, part(cta, 0));
  store_pair<kColumns>(g.epilogue, g.m, g.n, row * layout::kBlock, blockIdx.y * kColumns, i / 32, i % 32, v);
}

template <int kColumns, bool kRaw>
cudaError_t launch(Arguments& g, const MatmulOptions& options, cudaStream_t stream) {
  using S = Shape<kColumns>;
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
  const auto kernel = product<kColumns, kRaw>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;

  // One instruction instead of four a lane; those do where there is no map.
  if (Columns<kColumns>::shared_bytes && major >= 9 && g.x.aligned)
    g.x.mapped = make_rows_map(&g.x.map, g.x.x, g.n, g.k, kColumns, 1, false) == cudaSuccess;

  const int64_t blocks = int64_t{g.row_blocks} * g.k_blocks;
  int ctas = std::min(kMaxCtas, options.max_ctas > 0 ? options.max_ctas : multiprocessors);
  ctas = static_cast<int>(std::min<int64_t>(ctas, blocks));
  g.share = static_cast<int>(blocks / ctas);
  g.extra = static_cast<int>(blocks % ctas);
  const unsigned groups = (g.n + kColumns - 1) / kColumns;
  kernel<<<dim3(ctas, groups), 32 * warps, bytes, stream>>>(g);
  status = cudaGetLastError();
  const bool cut = g.extra || g.share % g.k_blocks;
  if (status != cudaSuccess || ctas == 1 || !cut) return status;

  static_assert(S::pairs * 32 % kAddThreads == 0);
  const Launch launch(dim3(ctas - 1, groups, S::pairs * 32 / kAddThreads), kAddThreads, 0, stream, 1, options.overlap && major >= 9);
  return cudaLaunchKernelEx(&launch.config, add_parts<kColumns>, g, ctas);
}

}  // namespace

cudaError_t launch_matmul(const Payload& w, const __nv_bfloat16* x, int n, const Epilogue& epilogue, float* workspace,
                          cudaStream_t stream, const MatmulOptions& options, const uint16_t* raw) {
  const int64_t blocks = w.m > 0 && w.k > 0 ? layout::NumBlocks(w.m, w.k) : 0;
  if (w.m < 1 || w.k < 1 || w.m > INT32_MAX - 64 || w.k > INT32_MAX - 64 || blocks > INT32_MAX / 32 || n < 1 || n > kMaxColumns)
    return cudaErrorInvalidValue;
  Arguments g = {};
  g.source = MakeSource(w);
  g.raw = reinterpret_cast<const uint4*>(raw);
  g.x = {x, n, static_cast<int>(w.k), 0, w.k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0, false, {}};
  g.epilogue = epilogue;
  g.workspace = workspace;
  g.m = static_cast<int>(w.m), g.k = static_cast<int>(w.k), g.n = n;
  g.k_blocks = static_cast<int>(layout::CeilDiv(w.k, layout::kBlock));
  g.row_blocks = static_cast<int>(layout::CeilDiv(w.m, layout::kBlock));
  const auto run = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    return raw ? launch<kColumns, true>(g, options, stream) : launch<kColumns, false>(g, options, stream);
  };
  if (n <= 8) return run(std::integral_constant<int, 8>());
  if (n <= 16) return run(std::integral_constant<int, 16>());
  return run(std::integral_constant<int, 32>());
}

}  // namespace jaxzip::tca_tbe
