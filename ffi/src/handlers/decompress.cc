// The FFI handlers `jaxzip_{tca_tbe,lane_planar}_decompress`: payload -> bf16 [..., K, M] (transposed) or [..., M, K].
#include "handlers/common.h"

namespace jaxzip {
namespace {

ffi::Error Decompress(ffi::ThreadPool pool, JAXZIP_PAYLOAD_PARAMS, Bf16Result out, int64_t m, int64_t k, bool transposed) {
  return Guard("jaxzip_tca_tbe_decompress", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    const For parallel_for = PoolFor(pool);
    DecompressEach(payload, out, m, k, transposed, [&](int64_t i, const Dims& batch, uint16_t* to) {
      Require(DecompressTcaTbe(payload.CheckedAt(i, batch), to, transposed ? 1 : k, transposed ? m : 1, parallel_for));
    });
  });
}

ffi::Error LanePlanarDecompress(ffi::ThreadPool pool, JAXZIP_LANE_PLANAR_PARAMS, Bf16Result out, int64_t m, int64_t k,
                                bool transposed) {
  return Guard("jaxzip_lane_planar_decompress", [&] {
    const LanePlanarOperands payload(m, k, JAXZIP_LANE_PLANAR_ARGS);
    const For parallel_for = PoolFor(pool);
    DecompressEach(payload, out, m, k, transposed, [&](int64_t i, const Dims& batch, uint16_t* to) {
      Require(DecompressLanePlanar(payload.At(i, batch), to, transposed ? 1 : k, transposed ? m : 1, parallel_for));
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_tca_tbe_decompress, Decompress,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .JAXZIP_PAYLOAD_BIND.Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_decompress, LanePlanarDecompress,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .JAXZIP_LANE_PLANAR_BIND.Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("transposed"));

}  // namespace jaxzip
