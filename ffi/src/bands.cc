// Where an encoder's rows come from.
#include "bands.h"

#include <memory>
#include <stdexcept>

#include "buffer_pool.h"
#include "dispatch.h"
#include "fault_sink.h"

namespace jaxzip {
namespace {

// Bands that `decode_rows` writes, as [rows, k], into scratch.
template <typename P, typename F>
Bands Decoded(const P& payload, F decode_rows) {
  const auto pool = std::make_shared<BufferPool>();
  return {payload.m, payload.k, [=](int64_t block_row, const std::function<void(const Matrix&)>& use) {
            BufferPool::Lease scratch(*pool, layout::kBlock * payload.k);
            Fault fault;
            decode_rows(payload, block_row, scratch.data(), payload.k, false, &fault);
            if (!fault.field) {
              const int64_t rows = std::min<int64_t>(layout::kBlock, payload.m - block_row * layout::kBlock);
              use({scratch.data(), rows, payload.k, payload.k, 1});
            }
            return fault;
          }};
}

}  // namespace

Bands BandsOf(const Matrix& w) {
  return {w.m, w.k, [w](int64_t block_row, const std::function<void(const Matrix&)>& use) {
            const int64_t m0 = block_row * layout::kBlock, rows = std::min<int64_t>(layout::kBlock, w.m - m0);
            use({w.data + m0 * w.row_stride, rows, w.k, w.row_stride, w.col_stride});
            return Fault{};
          }};
}

Bands BandsOf(const Payload& p) { return Decoded(p, Kernels().decompress_rows); }

Bands BandsOf(const LanePlanarPayload& p) { return Decoded(p, Kernels().lane_planar.decompress_rows); }

void ForEachBand(const Bands& bands, const For& parallel_for,
                 const std::function<void(int64_t block_row, const Matrix& rows)>& use) {
  FaultSink sink;
  parallel_for(layout::CeilDiv(bands.m, layout::kBlock), [&](int64_t block_row) {
    sink.Report(block_row, bands.with(block_row, [&](const Matrix& rows) { use(block_row, rows); }));
  });
  if (sink.Get().field) throw std::invalid_argument(Describe(sink.Get()));
}

}  // namespace jaxzip
