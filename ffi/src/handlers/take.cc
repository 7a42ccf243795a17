// The FFI handlers `jaxzip_{tca_tbe,lane_planar}_take`: (ids int32 [..., n], payload) -> bf16 [..., n, K], rows of the weight.
#include "handlers/common.h"

namespace jaxzip {
namespace {

ffi::Error Take(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, JAXZIP_PAYLOAD_PARAMS,
                ffi::Result<ffi::Buffer<ffi::BF16>> out, int64_t m, int64_t k) {
  return Guard("jaxzip_tca_tbe_take", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    const Operand<const int32_t> rows("ids", ids, 1);
    const Operand<uint16_t> result("result", *out, 2);
    result.ExpectCore("result", {rows.core[0], k});
    payload.ExpectBatch(result.batch);
    rows.ExpectBatch("ids", result.batch);
    const For parallel_for = PoolFor(pool);
    for (int64_t i = 0; i < Product(result.batch); ++i) {
      Require(TakeTcaTbe(payload.CheckedAt(i, result.batch), rows.At(i, result.batch), rows.core[0],
                         result.At(i, result.batch), parallel_for));
    }
  });
}

ffi::Error LanePlanarTake(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, JAXZIP_LANE_PLANAR_PARAMS,
                          ffi::Result<ffi::Buffer<ffi::BF16>> out, int64_t m, int64_t k) {
  return Guard("jaxzip_lane_planar_take", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS);
    const Operand<const int32_t> rows("ids", ids, 1);
    const Operand<uint16_t> result("result", *out, 2);
    result.ExpectCore("result", {rows.core[0], k});
    payload.ExpectBatch(result.batch);
    rows.ExpectBatch("ids", result.batch);
    const For parallel_for = PoolFor(pool);
    for (int64_t i = 0; i < Product(result.batch); ++i) {
      Require(TakeLanePlanar(payload.At(i, result.batch), rows.At(i, result.batch), rows.core[0],
                             result.At(i, result.batch), parallel_for));
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_tca_tbe_take, Take,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .JAXZIP_PAYLOAD_BIND.Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_take, LanePlanarTake,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .JAXZIP_LANE_PLANAR_BIND.Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k"));

}  // namespace jaxzip
