// What every instruction-set level provides: plain structs and one table of function pointers.
//
// The functions are compiled several times with different compiler flags, so nothing here may pull in
// inline library code: the linker could keep a copy that an older machine cannot run.
#pragma once
#include <cstdint>

#include "jaxzip/lane_planar.h"

namespace jaxzip {

// One TCA-TBE payload, without batch dimensions. Lengths are those of the arrays, which may be longer than
// the totals (bucket padding). Nothing in it is trusted.
struct Payload {
  int64_t m, k;
  const uint8_t* start_exp;
  const uint32_t* bitmap[3];  // [F, 2]: low word, high word
  const uint8_t* sign_mantissa;
  const uint16_t* full;
  const uint32_t* tile_offsets;  // [B + 1, 2]
  const int32_t* band_offsets;   // [4 B, 2]
  int64_t sign_mantissa_len, full_len;
};

// The first inconsistency found in a payload; `field` is null when there is none.
struct Fault {
  const char* field = nullptr;
  int64_t index = 0, expected = 0, found = 0;
};

// The weight of one matrix product: a payload of either format, or (both null) dense bf16 values, element (m, k) at
// dense[m * row_stride + k * col_stride].
struct Weight {
  const Payload* tbe;
  const LanePlanarPayload* lane_planar;
  const uint16_t* dense;
  int64_t m, k, row_stride, col_stride;
};

struct KernelTable {
  const char* name;
  int n_block;  // rows of x that one pass of the inner loop covers; fixes the packing of x

  // Decodes the 64 rows of `block_row` into out, element (m, k) at out[(m - m0) * stride + k], or, transposed,
  // out[k * stride + m - m0], where m0 = 64 * block_row.
  void (*decompress_rows)(const Payload&, int64_t block_row, uint16_t* out, int64_t stride, bool transposed,
                          Fault*);

  // Packs x rows [n0, n0 + count), count <= n_block, into packed[RoundUp(k, 64) / 8][count][8].
  void (*pack_x)(const void* x, bool is_f32, int64_t k, int64_t n0, int count, float* packed);

  // y[n, m] for the 64 rows m of block_row and n in [0, n_count), n_count <= kMatmulRows; `packed` is what
  // pack_x made of these rows, block after block. y_row_stride in elements.
  void (*matmul_rows)(const Weight&, int64_t block_row, const float* packed, int64_t n_count, void* y,
                      bool y_is_f32, int64_t y_row_stride, Fault*);

  // src: a 64x64 tile of weights, element (i, j) at src[i * stride + j], (i, j) = (m, k) or, transposed,
  // (k, m). Writes the tile's 64 words of each bitmap and the counts of in-window elements per band.
  void (*encode_bitmaps)(const uint16_t* src, int64_t stride, bool transposed, uint8_t start_exp,
                         uint64_t* const bitmaps[3], int32_t in_window[4]);

  // Same tile: appends its values to sign_mantissa and full, both with room for 64 elements past the last.
  void (*encode_values)(const uint16_t* src, int64_t stride, bool transposed, const uint64_t* const bitmaps[3],
                        uint8_t* sign_mantissa, uint16_t* full);

  // In-window elements per band of one block.
  void (*count_bands)(const Payload&, int64_t block, int32_t in_window[4]);

  LanePlanarKernels lane_planar;
};

inline constexpr int64_t kMatmulRows = 128;  // rows of x per call of matmul_rows; bounds its scratch

}  // namespace jaxzip
