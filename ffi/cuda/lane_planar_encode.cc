// The CUDA handlers `jaxzip_lane_planar_{shifts,counts,encode}`: the three steps of encoding on the device.
#include <cuda_runtime.h>

#include "handlers/common.h"
#include "lane_planar/encode.h"

namespace jaxzip {
namespace {

namespace lp = lane_planar;

void Check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// The weights, which no batch may be of, and the sizes that go with them.
struct Weights {
  lp::DenseBits w;
  int64_t row_blocks, k_blocks;

  Weights(const ffi::Buffer<ffi::U16>& bits, bool transposed) {
    const Operand<const uint16_t> operand("bits", bits, 2);
    operand.ExpectBatch("bits", {});
    const int64_t m = operand.core[transposed ? 1 : 0], k = operand.core[transposed ? 0 : 1];
    if (m < 1 || k < 1 || m > INT32_MAX || k > INT32_MAX)
      throw InvalidArgument("bits is " + Show(operand.core) + ", too small or too large");
    w = {operand.data, static_cast<int>(m), static_cast<int>(k), transposed};
    row_blocks = (m + lp::kBlock - 1) / lp::kBlock;
    k_blocks = (k + lp::kBlock - 1) / lp::kBlock;
  }
};

template <typename T, typename Buffer>
T* Expect(const char* name, const Buffer& buffer, const Dims& core) {
  const Operand<T> operand(name, buffer, core.size());
  operand.ExpectCore(name, core);
  operand.ExpectBatch(name, {});
  return operand.data;
}

ffi::Error Shifts(cudaStream_t stream, ffi::Buffer<ffi::U16> bits, ffi::Result<ffi::Buffer<ffi::S8>> shift, bool transposed) {
  return Guard("jaxzip_lane_planar_shifts", [&] {
    const Weights weights(bits, transposed);
    Check(lp::launch_choose_shifts(weights.w, Expect<int8_t>("shift", *shift, {weights.row_blocks * lp::kBlock}), stream));
  });
}

ffi::Error Counts(cudaStream_t stream, ffi::Buffer<ffi::U16> bits, ffi::Buffer<ffi::S8> shift,
                  ffi::Result<ffi::Buffer<ffi::U32>> counts, bool transposed) {
  return Guard("jaxzip_lane_planar_counts", [&] {
    const Weights weights(bits, transposed);
    const auto* by = Expect<const int8_t>("shift", shift, {weights.row_blocks * lp::kBlock});
    auto* out = Expect<uint32_t>("counts", *counts, {weights.row_blocks * weights.k_blocks});
    Check(lp::launch_count_escapes(weights.w, by, out, stream));
  });
}

ffi::Error Encode(cudaStream_t stream, ffi::Buffer<ffi::U16> bits, ffi::Buffer<ffi::S8> shift, ffi::Buffer<ffi::U32> starts,
                  ffi::Result<ffi::Buffer<ffi::U32>> blocks, ffi::Result<ffi::Buffer<ffi::U32>> overflow, bool transposed) {
  return Guard("jaxzip_lane_planar_encode", [&] {
    const Weights weights(bits, transposed);
    const auto* by = Expect<const int8_t>("shift", shift, {weights.row_blocks * lp::kBlock});
    const auto* first = Expect<const uint32_t>("starts", starts, {weights.row_blocks * weights.k_blocks + 1});
    const auto dims = blocks->dimensions();
    const int64_t words = dims.size() == 3 ? dims[2] : 0, length = overflow->element_count();
    if (words > lp::kMaxBlockWords || length % 2 || length / 2 > INT32_MAX) throw InvalidArgument("no such width of blocks or overflow");
    auto* out = Expect<uint32_t>("blocks", *blocks, {weights.row_blocks, weights.k_blocks, words});
    auto* entries = Expect<uint32_t>("overflow", *overflow, {length});
    Check(lp::launch_encode(weights.w, by, first, static_cast<int>(words), out, reinterpret_cast<lp::OverflowEntry*>(entries),
                            static_cast<uint32_t>(length / 2), stream));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_shifts, Shifts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Ret<ffi::Buffer<ffi::S8>>()
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_counts, Counts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_lane_planar_encode, Encode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Attr<bool>("transposed"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
