// The CUDA handler `jaxzip_tca_tbe_decompress`: payload -> bf16 [..., K, M] (transposed) or [..., M, K].
#include "tca_tbe/decompress.h"

#include <cuda_runtime.h>

#include "handlers/common.h"
#include "tca_tbe/operands.h"

namespace jaxzip {
namespace {

ffi::Error Decompress(cudaStream_t stream, JAXZIP_PAYLOAD_PARAMS, ffi::Result<ffi::Buffer<ffi::BF16>> out, int64_t m,
                      int64_t k, bool transposed) {
  return Guard("jaxzip_tca_tbe_decompress", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    const Operand<uint16_t> result("result", *out, 2);
    result.ExpectCore("result", transposed ? Dims{k, m} : Dims{m, k});
    payload.ExpectBatch(result.batch);
    for (int64_t i = 0; i < Product(result.batch); ++i) {
      const Payload p = payload.At(i, result.batch);
      tca_tbe::ExpectAligned(p);
      tca_tbe::RequireSuccess(tca_tbe::launch_decompress(p, result.At(i, result.batch), transposed, stream));
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_tca_tbe_decompress, Decompress,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .JAXZIP_PAYLOAD_BIND.Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<int64_t>("m")
                                  .Attr<int64_t>("k")
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
