// The FFI handlers `jaxzip_{tca_tbe,lane_planar}_take`: (ids int32 [..., n], payload) -> bf16 [..., n, K], rows of the weight.
#include "handlers/common.h"

namespace jaxzip {
namespace {

ffi::Error Take(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, JAXZIP_PAYLOAD_PARAMS, Bf16Result out, int64_t m,
                int64_t k) {
  return Guard("jaxzip_tca_tbe_take", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    const For parallel_for = PoolFor(pool);
    TakeEach(payload, ids, out, k, [&](int64_t i, const Dims& batch, const int32_t* rows, int64_t count, uint16_t* to) {
      Require(TakeTcaTbe(payload.CheckedAt(i, batch), rows, count, to, parallel_for));
    });
  });
}

ffi::Error LanePlanarTake(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> ids, JAXZIP_LANE_PLANAR_PARAMS, Bf16Result out,
                          int64_t m, int64_t k) {
  return Guard("jaxzip_lane_planar_take", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS);
    const For parallel_for = PoolFor(pool);
    TakeEach(payload, ids, out, k, [&](int64_t i, const Dims& batch, const int32_t* rows, int64_t count, uint16_t* to) {
      Require(TakeLanePlanar(payload.At(i, batch), rows, count, to, parallel_for));
    });
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
