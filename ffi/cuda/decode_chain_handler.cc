// The CUDA handler `jaxzip_decode_chain` (sm_90): a decode step's kernels between one layer's attention and the next's, see
// decode_chain/chain.h.
#include "decode_chain_operands.h"

namespace jaxzip {
namespace {

constexpr auto kDecodeChain = [](cudaStream_t stream, ffi::Buffer<ffi::BF16> attended, auto... chain) {
  return Guard("jaxzip_decode_chain", [&] {
    const Bf16Operand rows("attended", attended, 2);
    rows.ExpectBatch("attended", {});
    LaunchChain(stream, nullptr, rows.data, rows.core[0], rows.core[1], chain...);
  });
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_decode_chain, kDecodeChain,
                              ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Arg<ffi::Buffer<ffi::BF16>>().JAXZIP_CHAIN_BIND,
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
