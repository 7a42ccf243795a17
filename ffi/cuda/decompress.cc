// The CUDA handler `jaxzip_tca_tbe_decompress`: payload -> bf16 [..., K, M] (transposed) or [..., M, K].
#include "tca_tbe/decompress.h"

#include <cuda_runtime.h>

#include "handlers/common.h"
#include "tca_tbe/operands.h"

namespace jaxzip {
namespace {

ffi::Error Decompress(cudaStream_t stream, JAXZIP_PAYLOAD_PARAMS, Bf16Result out, int64_t m, int64_t k, bool transposed) {
  return Guard("jaxzip_tca_tbe_decompress", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    DecompressEach(payload, out, m, k, transposed, [&](int64_t i, const Dims& batch, uint16_t* to) {
      const Payload p = payload.At(i, batch);
      tca_tbe::ExpectAligned(p);
      tca_tbe::RequireSuccess(tca_tbe::launch_decompress(p, to, transposed, stream));
    });
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
