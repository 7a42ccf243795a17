// Whole-tensor operations over the kernel table, for the Python bindings and the FFI handlers alike.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "jaxzip/kernels.h"
#include "jaxzip/lane_planar.h"
#include "jaxzip/layout.h"

namespace jaxzip {

// Runs body(unit) for each unit, in any order and on any thread.
using For = std::function<void(int64_t units, const std::function<void(int64_t)>& body)>;

// A logical [m, k] matrix of bf16 bits with any strides, in elements.
struct Matrix {
  const uint16_t* data;
  int64_t m, k, row_stride, col_stride;
};

// An owned array for large results, aligned for XLA so that JAX can take it without a copy.
template <typename T>
struct Array {
  std::unique_ptr<T, void (*)(void*)> data{nullptr, [](void*) {}};
  int64_t size = 0;
};

struct Encoded {
  uint8_t start_exp = 0;
  Array<uint64_t> bitmap[3];
  Array<uint8_t> sign_mantissa;
  Array<uint16_t> full;
  Array<uint32_t> tile_offsets;
  Array<int32_t> band_offsets;
};

struct EncodedLanePlanar {
  Array<int8_t> shift;
  Array<uint32_t> blocks, overflow;
  int64_t block_rows = 0, block_columns = 0;
  int block_words = 0;
};

struct Bands;

// Throws std::overflow_error when the values of the tensor outnumber what 32-bit offsets reach.
Encoded EncodeTcaTbe(const Matrix& weight, const For& parallel_for);
// The same from any source of rows, which it asks three times for each; throws std::invalid_argument for its faults.
Encoded EncodeTcaTbe(const Bands& bands, const For& parallel_for);

// Asks up to twice for each band, and for some once more; throws std::invalid_argument for the source's faults,
// std::overflow_error when there are more escapes without a place than 32 bits count.
EncodedLanePlanar EncodeLanePlanar(const Bands& bands, const For& parallel_for);

// The first fault of the payload's values; shapes are the caller's to check.
Fault CheckTcaTbe(const Payload& payload, const For& parallel_for);

// Decodes into out, element (m, k) at out[m * row_stride + k * col_stride].
Fault DecompressTcaTbe(const Payload& payload, uint16_t* out, int64_t row_stride, int64_t col_stride,
                       const For& parallel_for);

Fault DecompressLanePlanar(const LanePlanarPayload& payload, uint16_t* out, int64_t row_stride, int64_t col_stride,
                           const For& parallel_for);

// What is wrong with a payload's values, in words; empty when nothing is. Names what the reference would name first.
std::string CheckLanePlanar(const LanePlanarPayload& payload, const For& parallel_for);

// y[n, m] = sum_k x[n, k] w[m, k]; x packed by PackRows.
Fault Matmul(const Weight& weight, const float* packed, int64_t n, void* y, bool y_is_f32, const For& parallel_for);
int64_t PackedSize(int64_t n, int64_t k);  // floats
void PackRows(const void* x, bool x_is_f32, int64_t n, int64_t k, float* packed, const For& parallel_for);

// Rows `ids` of the weight into out [n, k]. An id outside [0, m) gives a row of NaN.
Fault TakeTcaTbe(const Payload& payload, const int32_t* ids, int64_t n, uint16_t* out, const For& parallel_for);

Fault TakeLanePlanar(const LanePlanarPayload& payload, const int32_t* ids, int64_t n, uint16_t* out,
                     const For& parallel_for);

std::string Describe(const Fault& fault);

}  // namespace jaxzip
