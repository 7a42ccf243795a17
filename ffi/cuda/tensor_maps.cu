// The driver's encoder of tensor maps, looked up once: the library is not linked with the driver.
#include "tensor_maps.h"

#include <cudaTypedefs.h>

namespace jaxzip {
namespace {

constexpr int kBlock = 64;  // k, or rows of y, in a box: 128 bytes

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ||
        found != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

}  // namespace

cudaError_t make_rows_map(CUtensorMap* map, const __nv_bfloat16* rows, int n, int k, int rows_at_once, int chunks_at_once, bool whole_chunks) {
  if (!tensor_map_encoder()) return cudaErrorNotSupported;
  const cuuint64_t row = static_cast<cuuint64_t>(k) * 2;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(whole_chunks ? kBlock : k), static_cast<cuuint64_t>(n),
                               static_cast<cuuint64_t>(whole_chunks ? k / kBlock : 1)};
  const cuuint64_t strides[2] = {row, whole_chunks ? kBlock * 2 : row * n};
  const cuuint32_t box[3] = {kBlock, static_cast<cuuint32_t>(rows_at_once), static_cast<cuuint32_t>(whole_chunks ? chunks_at_once : 1)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult made = tensor_map_encoder()(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<__nv_bfloat16*>(rows), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t make_y_map(CUtensorMap* map, __nv_bfloat16* y, int n, int rows, int columns_at_once) {
  if (!tensor_map_encoder()) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(n)}, stride = static_cast<cuuint64_t>(rows) * 2;
  const cuuint32_t box[2] = {kBlock, static_cast<cuuint32_t>(columns_at_once)}, steps[2] = {1, 1};
  const CUresult made = tensor_map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, y, sizes, &stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jaxzip
