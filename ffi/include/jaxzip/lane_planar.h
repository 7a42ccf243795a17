// Lane-planar on the CPU: a view of one payload, and what every instruction-set level provides for it.
//
// Like kernels.h, this is compiled several times with different flags: nothing here may pull in inline library code.
#pragma once
#include <cstdint>

namespace jaxzip {

struct Fault;

// One lane-planar payload without batch dimensions; see cuda/lane_planar/layout.h for a block's inside. Kernels check
// every count and index in it that they use as an address, and nothing else.
struct LanePlanarPayload {
  int64_t m, k;
  const int8_t* shift;       // [64 R]: stored exponent = exponent + shift of its row
  const uint32_t* blocks;    // [R, C, block_words]
  const uint32_t* overflow;  // [2 * overflow_length]: 1 + block, position | five high exponent bits << 12
  int64_t overflow_length;   // entries
  int block_words;           // one of lane_planar::kBlockWidths
};

struct LanePlanarKernels {
  // Decodes the 64 rows of `block_row` into out, element (m, k) at out[(m - m0) * stride + k], or, transposed,
  // out[k * stride + m - m0], where m0 = 64 * block_row.
  void (*decompress_rows)(const LanePlanarPayload&, int64_t block_row, uint16_t* out, int64_t stride, bool transposed,
                          Fault*);

  // Decodes one row into out[k].
  void (*decode_row)(const LanePlanarPayload&, int64_t row, uint16_t* out, Fault*);

  // Whether one of a row's k elements is subnormal.
  bool (*has_subnormals)(const uint16_t* row, int64_t k);

  // dst[j * dst_stride + i] = src[i * src_stride + j] for a 64x64 tile.
  void (*transpose_tile)(const uint16_t* src, int64_t src_stride, uint16_t* dst, int64_t dst_stride);

  // Copies a 64x64 tile, adding each row's shift to its exponents.
  void (*load_tile)(const uint16_t* src, int64_t stride, const int8_t* shift, uint16_t* tile);

  // Escapes of a shifted 64x64 tile.
  int32_t (*count_escapes)(const uint16_t* tile);

  // Writes a shifted 64x64 tile as a block, all but its overflow word, and what does not fit to `overflow`; returns the
  // number of entries there. `name`: 1 + index of the block.
  int64_t (*encode_block)(const uint16_t* tile, uint32_t name, int block_words, uint32_t* block, uint32_t* overflow);
};

}  // namespace jaxzip
