// The CUDA handler `jaxzip_tca_tbe_decompress`: payload -> bf16 [..., K, M] (transposed) or [..., M, K], a warp
// for each band.
#include <cuda_runtime.h>

#include "handlers/common.h"

namespace jaxzip {
namespace {

constexpr int kWarpsPerGroup = 4;

// Lane l owns positions 2l and 2l + 1 of each FragTile. The payload was checked when it was built; an index past
// the arrays, which then cannot occur, is clamped so that nothing is ever read out of bounds.
__global__ void DecompressBands(Payload p, uint16_t* out, int64_t row_stride, int64_t col_stride, int64_t bands) {
  const int64_t band = int64_t{blockIdx.x} * kWarpsPerGroup + threadIdx.x / 32;
  if (band >= bands) return;
  const int lane = threadIdx.x % 32;
  const int64_t block = band / layout::kBandsPerBlock;
  const int64_t blocks_per_row = (p.k + layout::kBlock - 1) / layout::kBlock;
  const int64_t row0 = block / blocks_per_row * layout::kBlock + band % layout::kBandsPerBlock * layout::kBandRows;
  const int64_t col0 = block % blocks_per_row * layout::kBlock;
  const unsigned start_exp = *p.start_exp;
  int64_t sm = int64_t{p.tile_offsets[2 * block]} + p.band_offsets[2 * band];
  int64_t full = int64_t{p.tile_offsets[2 * block + 1]} + p.band_offsets[2 * band + 1];
  for (int f = 0; f < layout::kFragsPerBand; ++f) {
    const int64_t frag = band * layout::kFragsPerBand + f;
    uint64_t bits[3];
    for (int i = 0; i < 3; ++i) {
      bits[i] = uint64_t{p.bitmap[i][2 * frag + 1]} << 32 | p.bitmap[i][2 * frag];
    }
    const uint64_t any = bits[0] | bits[1] | bits[2];
    const int64_t row = row0 + (f & 1) * layout::kFrag + lane / 4;
    for (int e = 0; e < 2; ++e) {
      const int position = 2 * lane + e;
      const int before = __popcll(any & ((uint64_t{1} << position) - 1));
      const unsigned code = (bits[0] >> position & 1) | (bits[1] >> position & 1) << 1 | (bits[2] >> position & 1) << 2;
      uint16_t value = 0;
      if (code) {
        const int64_t i = sm + before;
        const unsigned byte = i >= 0 && i < p.sign_mantissa_len ? p.sign_mantissa[i] : 0;
        value = static_cast<uint16_t>((byte & 0x80) << 8 | ((start_exp + code) & 0xff) << 7 | (byte & 0x7f));
      } else {
        const int64_t i = full + position - before;
        if (i >= 0 && i < p.full_len) value = p.full[i];
      }
      const int64_t col = col0 + (f / 4 * 2 + (f >> 1 & 1)) * layout::kFrag + position % 8;
      if (row < p.m && col < p.k) out[row * row_stride + col * col_stride] = value;
    }
    sm += __popcll(any);
    full += layout::kFragSize - __popcll(any);
  }
}

ffi::Error Decompress(cudaStream_t stream, JAXZIP_PAYLOAD_PARAMS, ffi::Result<ffi::Buffer<ffi::BF16>> out, int64_t m,
                      int64_t k, bool transposed) {
  return Guard("jaxzip_tca_tbe_decompress", [&] {
    const PayloadOperands payload(m, k, JAXZIP_PAYLOAD_ARGS);
    const Operand<uint16_t> result("result", *out, 2);
    result.ExpectCore("result", transposed ? Dims{k, m} : Dims{m, k});
    payload.ExpectBatch(result.batch);
    const int64_t bands = layout::NumBlocks(m, k) * layout::kBandsPerBlock;
    const int64_t groups = layout::CeilDiv(bands, kWarpsPerGroup);
    if (groups > INT32_MAX) throw InvalidArgument("too many bands for one launch: " + std::to_string(bands));
    for (int64_t i = 0; i < Product(result.batch); ++i) {
      DecompressBands<<<static_cast<unsigned>(groups), 32 * kWarpsPerGroup, 0, stream>>>(
          payload.At(i, result.batch), result.At(i, result.batch), transposed ? 1 : k, transposed ? m : 1, bands);
    }
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
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
