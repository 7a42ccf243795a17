// The FFI handlers `jaxzip_{tca_tbe,lane_planar,raw}_ragged_matmul`: x [N, K], group_sizes [E], weights [E, ...] -> [N, M].
#include <algorithm>
#include <cstring>
#include <functional>

#include "handlers/products.h"
#include "ragged.h"

namespace jaxzip {
namespace {

// weight_of(e): the weight of expert e, which is asked for only if it has rows.
void GroupedMatmul(ffi::ThreadPool pool, const ffi::AnyBuffer& x_buffer, const ffi::Buffer<ffi::S32>& sizes_buffer,
                   ffi::AnyBuffer& y_buffer, int64_t m, int64_t k,
                   const std::function<void(const Dims&)>& expect_weight_batch,
                   const std::function<Weight(int64_t)>& weight_of) {
  const bool x_f32 = IsF32("x", x_buffer), y_f32 = IsF32("y", y_buffer);
  const Operand<const char> x("x", x_buffer, x_buffer.dimensions().size());
  const Operand<const int32_t> sizes("group_sizes", sizes_buffer, sizes_buffer.dimensions().size());
  const Operand<char> y("y", y_buffer, y_buffer.dimensions().size());
  if (sizes.core.size() != 1) throw InvalidArgument("group_sizes have shape " + Show(sizes.core) + ", expected [E]");
  const int64_t n = x.core.empty() ? 0 : x.core[0], experts = sizes.core[0];
  x.ExpectCore("x", {n, k});
  y.ExpectCore("y", {n, m});
  expect_weight_batch({experts});

  std::vector<RowGroup> groups;
  int64_t row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = std::clamp<int64_t>(sizes.data[e], 0, n - row);
    if (rows) groups.push_back({row, rows, weight_of(e)});
    row += rows;
  }
  const int64_t row_bytes = m * (y_f32 ? 4 : 2);
  if (row < n) std::memset(y.data + row * row_bytes, 0, static_cast<size_t>((n - row) * row_bytes));
  if (row == 0) return;
  const Scratch packed = AllocateScratch(PackedSize(row, k));
  Require(RaggedMatmul(groups, x.data, x_f32, packed.get(), y.data, y_f32, PoolFor(pool)));
}

ffi::Error TbeRaggedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> group_sizes,
                           JAXZIP_PAYLOAD_PARAMS, ffi::Result<ffi::AnyBuffer> y, int64_t m, int64_t k) {
  return Guard("jaxzip_tca_tbe_ragged_matmul", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    const Dims experts = {static_cast<int64_t>(group_sizes.element_count())};
    std::vector<Payload> payloads(experts[0]);
    GroupedMatmul(
        pool, x, group_sizes, *y, m, k, [&](const Dims& full) { payload.ExpectBatch(full); },
        [&](int64_t e) {
          payloads[e] = payload.CheckedAt(e, experts);
          return Weight{&payloads[e], nullptr, nullptr, m, k, 0, 0};
        });
  });
}

ffi::Error LanePlanarRaggedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> group_sizes,
                                  JAXZIP_LANE_PLANAR_PARAMS, ffi::Result<ffi::AnyBuffer> y, int64_t m, int64_t k) {
  return Guard("jaxzip_lane_planar_ragged_matmul", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS);
    const Dims experts = {static_cast<int64_t>(group_sizes.element_count())};
    std::vector<LanePlanarPayload> payloads(experts[0]);
    GroupedMatmul(
        pool, x, group_sizes, *y, m, k, [&](const Dims& full) { payload.ExpectBatch(full); },
        [&](int64_t e) {
          payloads[e] = payload.At(e, experts);
          return Weight{nullptr, &payloads[e], nullptr, m, k, 0, 0};
        });
  });
}

// rows_first: w is [E, M, K], otherwise [E, K, M].
ffi::Error RawRaggedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> group_sizes,
                           ffi::Buffer<ffi::BF16> w, ffi::Result<ffi::AnyBuffer> y, int64_t m, int64_t k,
                           bool rows_first) {
  return Guard("jaxzip_raw_ragged_matmul", [&] {
    const RawOperand weight(w, m, k, rows_first);
    const Dims experts = {static_cast<int64_t>(group_sizes.element_count())};
    GroupedMatmul(
        pool, x, group_sizes, *y, m, k, [&](const Dims& full) { weight.values.ExpectBatch("w", full); },
        [&](int64_t e) { return weight.At(e, experts); });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_tca_tbe_ragged_matmul, TbeRaggedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .JAXZIP_PAYLOAD_BIND.Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_ragged_matmul, LanePlanarRaggedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .JAXZIP_LANE_PLANAR_BIND.Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_raw_ragged_matmul, RawRaggedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("rows_first"));

}  // namespace jaxzip
