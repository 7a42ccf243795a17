// All groups' work is shared out among threads at once: most groups of a decoding step have a row or two.
#include "ragged.h"

#include <algorithm>

#include "dispatch.h"
#include "fault_sink.h"

namespace jaxzip {
namespace {

// What one call of matmul_rows takes.
struct Chunk {
  int64_t first, rows;
  const Weight* weight;
};

}  // namespace

Fault RaggedMatmul(const std::vector<RowGroup>& groups, const void* x, bool x_is_f32, float* packed, void* y, bool y_is_f32,
                   const For& parallel_for) {
  std::vector<Chunk> chunks;
  for (const RowGroup& group : groups) {
    for (int64_t row = 0; row < group.rows; row += kMatmulRows)
      chunks.push_back({group.first + row, std::min(kMatmulRows, group.rows - row), &group.weight});
  }
  if (chunks.empty()) return {};
  const KernelTable& kernels = Kernels();
  const int64_t m = chunks[0].weight->m, k = chunks[0].weight->k;
  parallel_for(static_cast<int64_t>(chunks.size()), [&](int64_t unit) {
    const Chunk& chunk = chunks[unit];
    for (int64_t row = 0; row < chunk.rows; row += kernels.n_block) {
      const int64_t first = chunk.first + row;
      const int count = static_cast<int>(std::min<int64_t>(kernels.n_block, chunk.rows - row));
      kernels.pack_x(x, x_is_f32, k, first, count, packed + PackedSize(first, k));
    }
  });
  const int64_t block_rows = layout::CeilDiv(m, layout::kBlock);
  FaultSink sink;
  parallel_for(static_cast<int64_t>(chunks.size()) * block_rows, [&](int64_t unit) {
    const Chunk& chunk = chunks[unit / block_rows];
    Fault fault;
    kernels.matmul_rows(*chunk.weight, unit % block_rows, packed + PackedSize(chunk.first, k), chunk.rows,
                        static_cast<char*>(y) + chunk.first * m * (y_is_f32 ? 4 : 2), y_is_f32, m, &fault);
    sink.Report(unit, fault);
  });
  return sink.Get();
}

}  // namespace jaxzip
