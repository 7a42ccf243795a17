// The FFI handlers `jaxzip_{tca_tbe,lane_planar,raw}_matmul`: x [..., N, K] times a weight -> [..., N, M].
#include <functional>

#include "handlers/products.h"

namespace jaxzip {
namespace {

// weight_at(i): the weight for flat batch index i; one_weight: it is the same for all of them.
void BatchedMatmul(ffi::ThreadPool pool, const ffi::AnyBuffer& x_buffer, ffi::AnyBuffer& y_buffer, int64_t m,
                   int64_t k, bool one_weight, const std::function<void(const Dims&)>& expect_weight_batch,
                   const std::function<Fault(int64_t, const Dims&, const std::function<Fault(const Weight&)>&)>& use) {
  const bool x_f32 = IsF32("x", x_buffer), y_f32 = IsF32("y", y_buffer);
  const Operand<const char> x("x", x_buffer, 2);
  const Operand<char> y("y", y_buffer, 2);
  int64_t n = x.core[0];
  x.ExpectCore("x", {n, k});
  y.ExpectCore("y", {n, m});
  x.ExpectBatch("x", y.batch);
  expect_weight_batch(y.batch);
  const For parallel_for = PoolFor(pool);

  int64_t batch = Product(y.batch);
  const int64_t x_batch = Product(x.batch);
  if (one_weight && x_batch == batch) {  // fold the batch into the rows: the weight is decoded once
    n *= batch;
    batch = batch ? 1 : 0;
  }
  if (n == 0 || batch == 0) return;
  const int64_t x_count = batch == 1 ? 1 : x_batch;
  const Scratch packed = AllocateScratch(x_count * PackedSize(n, k));
  for (int64_t i = 0; i < x_count; ++i) {
    PackRows(x.data + i * n * k * (x_f32 ? 4 : 2), x_f32, n, k, packed.get() + i * PackedSize(n, k), parallel_for);
  }
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t xi = batch == 1 ? 0 : x.BatchIndex(i, y.batch);
    Require(use(i, y.batch, [&](const Weight& w) {
      return Matmul(w, packed.get() + xi * PackedSize(n, k), n, y.data + i * n * m * (y_f32 ? 4 : 2), y_f32,
                    parallel_for);
    }));
  }
}

ffi::Error TbeMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, JAXZIP_PAYLOAD_PARAMS, ffi::Result<ffi::AnyBuffer> y,
                     int64_t m, int64_t k) {
  return Guard("jaxzip_tca_tbe_matmul", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    BatchedMatmul(
        pool, x, *y, m, k, payload.Unbatched(), [&](const Dims& full) { payload.ExpectBatch(full); },
        [&](int64_t i, const Dims& full, const std::function<Fault(const Weight&)>& multiply) {
          const Payload p = payload.CheckedAt(i, full);
          return multiply({&p, nullptr, nullptr, m, k, 0, 0});
        });
  });
}

ffi::Error LanePlanarMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, JAXZIP_LANE_PLANAR_PARAMS,
                            ffi::Result<ffi::AnyBuffer> y, int64_t m, int64_t k) {
  return Guard("jaxzip_lane_planar_matmul", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS);
    BatchedMatmul(
        pool, x, *y, m, k, payload.Unbatched(), [&](const Dims& full) { payload.ExpectBatch(full); },
        [&](int64_t i, const Dims& full, const std::function<Fault(const Weight&)>& multiply) {
          const LanePlanarPayload p = payload.At(i, full);
          return multiply({nullptr, &p, nullptr, m, k, 0, 0});
        });
  });
}

// rows_first: w is [..., M, K], otherwise [..., K, M].
ffi::Error RawMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::BF16> w, ffi::Result<ffi::AnyBuffer> y,
                     int64_t m, int64_t k, bool rows_first) {
  return Guard("jaxzip_raw_matmul", [&] {
    const RawOperand weight(w, m, k, rows_first);
    BatchedMatmul(
        pool, x, *y, m, k, weight.values.Unbatched(), [&](const Dims& full) { weight.values.ExpectBatch("w", full); },
        [&](int64_t i, const Dims& full, const std::function<Fault(const Weight&)>& multiply) {
          return multiply(weight.At(i, full));
        });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_tca_tbe_matmul, TbeMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .JAXZIP_PAYLOAD_BIND.Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_matmul, LanePlanarMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .JAXZIP_LANE_PLANAR_BIND.Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_raw_matmul, RawMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("rows_first"));

}  // namespace jaxzip
